"""The configuration of a measured run: that of a simulated one, and how workers run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hetis_exec.measure_config import CalibrateConfig, ValidateConfig
from hetis_exec.models.architecture import ELEMENT_BYTES, ELEMENT_TYPES
from hetis_exec.shaping import NetworkConfig
from hetis_sim.config import RunConfig, compose, register
from hetis_sim.spec.errors import require, require_finite
from hetis_sim.spec.lookup import require_int
from hetis_sim.spec.parse import ModelConfig
from traces.config import WorkloadConfig
from traces.readers import has_texts

SCHEMA = "executor_schema"
MAIN = "executor"
WORKERS = ("auto", "processes", "threads", "distributed")
COLLECTIVES = ("auto", "ordered", "all_reduce")
DEVICE_LINKS = ("auto", "host")
EAGER_KIB_MAX = 1 << 20
TOKENIZER_FILE = "tokenizer.json"


@dataclass
class ExecModelConfig(ModelConfig):
    """A model that is computed.

    Attributes:
        path: a Hugging Face folder (``config.json`` and safetensors). Without one, weights are drawn
            from ``executor.seed`` for the architecture that the other keys give.
    """

    path: str | None = None


@dataclass
class ExecutorConfig:
    """How workers run.

    Attributes:
        workers: ``processes`` of this host joined by pipes, ``threads`` of one process, or ``distributed``:
            ranks joined by TCP and torch.distributed, which this process starts on this host unless
            torchrun or its like has started them. ``auto`` is ``distributed`` where that is so, else
            ``processes``.
        devices: ``auto``, ``cpu``, ``cuda``, or a torch device for each device of the cluster; see
            :func:`hetis_exec.devices.find_places`.
        dtype: of weights, activations and cache: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see
            :func:`hetis_exec.devices.find_type`.
        cuda_graphs: replay steps of models that are whole on one CUDA device from CUDA graphs.
        warm_up: have CUDA devices do each kind of work once before the first request, and take the first
            256 MiB of a processor's cache from the system.
        threads: of torch, in each process.
        seed: of prompts, of sampling, and of weights where no folder is given.
        temperature, top_p, top_k: of sampling; temperature 0 takes the likeliest token, ``top_k`` 0 sets no
            limit.
        max_tokens: of a prompt that does not say how many it wants.
        ignore_eos: whether an end-of-text token ends no text. Null ends texts that answer texts, and gives
            all others the workload's lengths.
        chat: prompts are what a user says: the model's chat template is applied to them.
        timeout_s: a worker that shows no sign of life for so long is lost.
        eager_kib: where workers are distributed, arrays of a message up to this size travel in its frame,
            larger ones over torch.distributed.
        collectives: how tensor-parallel ranks add up. ``ordered`` exchanges their parts and adds them in the
            order of ranks, which gives the same bits whatever the workers are. ``all_reduce`` is that of
            torch.distributed, where workers are distributed: NCCL's where every rank of a stage has a card of
            its own, else gloo's. ``auto`` is ``all_reduce`` where NCCL does it, else ``ordered``.
        device_links: ``auto`` has tensors go from card to card: by NCCL where workers are distributed and
            both have a card of their own, and as they are between threads. ``host`` takes all through host
            memory.
        network: slow links to emulate between workers of one host.
        check: repeat the run in the simulator with the measured times, and compare all decisions.
        record: also write ``record.json``, from which the run can be replayed.
        throttle: by type of device, a factor on the time of its computing, or ``dense`` and ``attention``
            with a factor each; see :mod:`hetis_exec.throttle`.
        pin: ``none``; ``auto``, one core after the other; or a core for each device of the cluster.
    """

    workers: str = "auto"
    devices: Any = "auto"
    dtype: str = "auto"
    cuda_graphs: bool = True
    warm_up: bool = True
    threads: int = 1
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    ignore_eos: bool | None = None
    chat: bool = False
    timeout_s: float = 60.0
    eager_kib: float = 1024.0
    collectives: str = "auto"
    device_links: str = "auto"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    check: bool = True
    record: bool = False
    throttle: Any = None
    pin: Any = "none"

    def __post_init__(self) -> None:
        require(self.workers in WORKERS, "executor.workers", self.workers, f"one of {', '.join(WORKERS)}")
        require(self.collectives in COLLECTIVES, "executor.collectives", self.collectives,
                f"one of {', '.join(COLLECTIVES)}")
        require(self.device_links in DEVICE_LINKS, "executor.device_links", self.device_links,
                f"one of {', '.join(DEVICE_LINKS)}")
        types = ("auto", *ELEMENT_TYPES)
        require(self.dtype in types, "executor.dtype", self.dtype, f"one of {', '.join(types)}")
        require_int("executor.threads", self.threads, 1, 1024)
        require_int("executor.seed", self.seed, 0, 1 << 62)
        require_int("executor.top_k", self.top_k, 0, 1 << 24)
        require_int("executor.max_tokens", self.max_tokens, 1, 1 << 24)
        require_finite("executor.eager_kib", self.eager_kib, 0.0, EAGER_KIB_MAX)
        require_finite("executor.timeout_s", self.timeout_s, 0.0, open_low=True)


@dataclass
class ServeConfig:
    """The server of ``python -m hetis_exec serve``.

    Attributes:
        host: address to listen on. Whoever reaches it may use the model: mind who does before it is
            another than that of this machine.
        port: 0 takes any that is free.
        name: of the model, as clients call it; null for that of its folder.
        requests_max: requests that run or wait, at most; further ones are told to come later.
        body_kib: size of what a client may send.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    requests_max: int = 512
    body_kib: int = 4096

    def __post_init__(self) -> None:
        require_int("serve.port", self.port, 0, 65535)
        require_int("serve.requests_max", self.requests_max, 1, 1 << 20)
        require_int("serve.body_kib", self.body_kib, 1, 1 << 20)


@dataclass
class ExecutionConfig(RunConfig):
    """Everything that decides a measured run.

    Attributes:
        model: see :class:`ExecModelConfig`.
        executor: see :class:`ExecutorConfig`.
        calibrate, validate: see :class:`CalibrateConfig` and :class:`ValidateConfig`.
        serve: see :class:`ServeConfig`.
    """

    model: ExecModelConfig = field(default_factory=ExecModelConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def for_control(self, element_bytes: int = ELEMENT_BYTES) -> RunConfig:
        """The same, as the control plane is to see it: with the folder's model, in the run's type."""
        model = replace(self.model, weight_bytes=element_bytes, kv_bytes=element_bytes)
        if self.model.path is not None:
            model.config = str(Path(self.model.path).expanduser())
        return replace(self, model=model, workload=self._workload())

    def _workload(self) -> WorkloadConfig:
        """The same, with texts counted by the model's tokenizer, and none cut to a share of its length."""
        workload = self.workload
        if workload.path is None:
            return workload
        changes: dict[str, Any] = {}
        if self.model.path is not None and workload.tokenizer is None:
            file = Path(self.model.path).expanduser() / TOKENIZER_FILE
            changes["tokenizer"] = str(file) if file.is_file() else None
        if has_texts(workload.path, workload.read_options()):
            changes |= {"prompt_scale": 1.0, "output_scale": 1.0}
        return replace(workload, **changes)


def register_execution() -> None:
    """Make the schema known to Hydra."""
    register(SCHEMA, ExecutionConfig)


def compose_execution(*overrides: str) -> ExecutionConfig:
    """The configuration that ``python -m hetis_exec replay`` would make of the same words.

    Raises:
        HetisError: an unknown key, group or value.
    """
    register_execution()
    made = compose(*overrides, main=MAIN, schema=ExecutionConfig)
    assert isinstance(made, ExecutionConfig)
    return made
