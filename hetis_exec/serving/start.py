"""From a configuration to an engine that serves."""

from __future__ import annotations

from pathlib import Path

from hetis_exec.config import ExecutionConfig, compose_execution
from hetis_exec.crews import crew_maker
from hetis_exec.language.tokenizer import Tokenizer
from hetis_exec.run import Execution, prepare_execution
from hetis_exec.serving.engine import ServingEngine
from hetis_sim.spec.errors import SpecError


def start_engine(*words: str) -> ServingEngine:
    """The engine of ``python -m hetis_exec serve`` with the same words, such as ``model.path=folder``.

    Raises:
        HetisError: the combination cannot run, or a worker does not start.
    """
    config = compose_execution(*words)
    return serving_engine(config, prepare_execution(config))


def serving_engine(config: ExecutionConfig, execution: Execution) -> ServingEngine:
    """The engine of a checked combination, ready for requests.

    Raises:
        SpecError: the model has no folder, or its folder no tokenizer.
        HetisError: a worker does not start.
    """
    if config.model.path is None:
        raise SpecError("model.path", None, "a folder with a model and its tokenizer")
    tokenizer = Tokenizer(Path(config.model.path), execution.given.model.vocab)
    make_crew = crew_maker(config, execution.given, execution.launch)
    return ServingEngine(execution.given, make_crew, tokenizer, config.serve.requests_max)
