"""``python -m hetis_exec serve`` and ``generate``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hetis_exec.config import ExecutionConfig
from hetis_exec.language.params import GenerationParams
from hetis_exec.places import devices_of
from hetis_exec.run import Execution
from hetis_exec.serving.start import serving_engine
from hetis_sim.spec.errors import HetisError

KEY_VARIABLE = "HETIS_API_KEY"


def serve(config: ExecutionConfig, execution: Execution) -> bool:
    """Serve a model over HTTP until told to stop; whether that has ended in peace.

    Raises:
        HetisError: it cannot be served.
    """
    try:
        from hetis_exec.serving.http import Api
        from hetis_exec.serving.server import listen, run_server
    except ModuleNotFoundError as error:
        raise HetisError(f"{error.name} is not installed: the server needs the extra serve "
                         "(pip install 'hetis-sim[exec,serve]')") from None
    settings = config.serve
    door = listen(settings.host, settings.port)
    with door, serving_engine(config, execution) as engine:
        name = settings.name or Path(config.model.path or "").expanduser().resolve().name
        api = Api(engine, name, settings.body_kib * 1024, os.environ.get(KEY_VARIABLE, ""))
        host, port = door.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host

        def ready() -> None:
            workers = len(devices_of(execution.given.plan))
            print(f"{name} on http://{shown}:{port}/v1: policy {execution.given.policy.name}, "
                  f"{workers} workers, contexts of up to {engine.longest_context} tokens", flush=True)

        peace = run_server(engine, api, door, settings.requests_max, ready)
        if not peace:
            print(f"error: {engine.error}", file=sys.stderr)
        return peace


def generate(config: ExecutionConfig, execution: Execution, prompt: str) -> bool:
    """Print how a model goes on with a prompt, as it does; whether it has come to an end.

    Raises:
        HetisError: it cannot.
    """
    settings = config.executor
    with serving_engine(config, execution) as engine:
        assert engine.tokenizer is not None
        if settings.chat:
            tokens = engine.encode_chat([{"role": "user", "content": prompt}])
        else:
            print(prompt, end="", flush=True)
            tokens = engine.encode(prompt)
        most = min(settings.max_tokens, engine.longest_context - len(tokens))
        stream = engine.submit(tokens, GenerationParams(most, ignore_eos=bool(settings.ignore_eos)))
        try:
            for piece in stream:
                print(piece.text, end="", flush=True)
                if piece.finish_reason == "error":
                    print(f"\nerror: {piece.error}", file=sys.stderr)
                    return False
        except KeyboardInterrupt:
            stream.abort()
        print()
    return True
