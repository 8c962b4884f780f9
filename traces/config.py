"""Settings of a workload, as plain values that Hydra can check by type."""

from __future__ import annotations

from dataclasses import dataclass, field

from hetis_sim.spec.errors import SpecError, require_finite
from traces.arrivals import CV_MAX, RATE_MAX, RATE_MIN, REQUESTS_MAX
from traces.readers.convert import TOKENS_MAX
from traces.readers.options import ReadOptions, require_int, require_one

ARRIVALS = ("poisson", "gamma", "constant", "onoff", "replay", "closed")


# OmegaConf reads these annotations: only str, int, float, lists and mappings of them, and None.
@dataclass
class WorkloadConfig:
    """What is asked of the cluster, and when.

    Lengths come from a table of the project (``table``), from a file (``path``), or from
    ``prompt_tokens`` and ``output_tokens`` with ``table=fixed``.

    Attributes:
        name: how the workload is called in results.
        table: a table of :func:`traces.table_names`, or ``fixed``; null with a ``path``.
        subset: components of the table to keep, such as LongBench tasks; empty for all.
        path: a trace; null with a ``table``.
        format, columns, where, time_unit, unsorted, start, limit, max_rows, tokenizer,
            bytes_per_token, turns: how it is read, see :class:`traces.ReadOptions`.
        order: rows of the trace in order (``trace``) or drawn with return (``bootstrap``).
        requests: how many; null for as many as the trace has or ``duration_s`` allows.
        duration_s: no request arrives at this time or later; null for no such limit.
        arrivals: poisson, gamma, constant, onoff, replay (the trace's times), or closed.
        rate: mean requests per second; null replays times as they are, gives other
            arrivals the trace's mean rate, and must be null for closed loops.
        cv: coefficient of variation of gamma gaps.
        on_s, off_s, off_share: mean length of the phases of onoff, and the rate in off
            phases over that in on phases.
        users: users of a closed loop, each with one request at a time.
        think_time_s: mean time from an answer to the user's next request.
        think: its law, ``exponential`` or ``constant``.
        stagger_s: time between the first requests of one user and the next of a closed loop.
        common_queue: users of a closed loop take the next row of lengths whoever asks, as a client does that
            keeps so many requests in flight; otherwise each user has rows of its own, the same under every
            policy.
        seed: of all random streams.
        prompt_scale, output_scale: factors on the lengths, rounded, at least 1 token.
        prompt_tokens_min ... output_tokens_max: the range of lengths after scaling.
        out_of_range: outside that range ``clamp``, ``drop`` (counted), or ``error``.
        over_context: when prompt and output exceed the model's context: ``reject`` (the
            request arrives and the simulator turns it away), ``clamp`` (shorten the
            prompt, as LongBench does), ``drop`` (counted), or ``error``.
    """

    name: str = "sharegpt"
    table: str | None = "sharegpt"
    subset: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    path: str | None = None
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    time_unit: str = "auto"
    unsorted: str = "error"
    start: int = 0
    limit: int | None = None
    max_rows: int = 10_000_000
    tokenizer: str | None = None
    bytes_per_token: float = 4.0
    turns: str = "first"
    order: str = "trace"
    requests: int | None = 1000
    duration_s: float | None = None
    arrivals: str = "poisson"
    rate: float | None = 4.0
    cv: float = 2.0
    on_s: float = 10.0
    off_s: float = 30.0
    off_share: float = 0.1
    users: int = 32
    think_time_s: float = 0.0
    think: str = "exponential"
    stagger_s: float = 0.0
    common_queue: bool = False
    seed: int = 0
    prompt_scale: float = 1.0
    output_scale: float = 1.0
    prompt_tokens_min: int = 1
    prompt_tokens_max: int | None = None
    output_tokens_min: int = 1
    output_tokens_max: int | None = None
    out_of_range: str = "clamp"
    over_context: str = "reject"

    def __post_init__(self) -> None:
        self._check_source()
        self._check_arrivals()
        self._check_lengths()
        require_int("workload.seed", self.seed, 0)
        if self.seed >= 2**64:
            raise SpecError("workload.seed", self.seed, "below 2**64")

    def _check_source(self) -> None:
        if (self.table is None) == (self.path is None):
            allowed = f"set when workload.path is null, and only then (workload.path={self.path!r})"
            raise SpecError("workload.table", self.table, allowed)
        fixed = self.table == "fixed"
        for key in ("prompt_tokens", "output_tokens"):
            value = getattr(self, key)
            if fixed:
                require_int(f"workload.{key}", value, 1)
            elif value is not None:
                raise SpecError(f"workload.{key}", value, "null unless table=fixed")
        if self.subset and (self.table is None or fixed):
            raise SpecError("workload.subset", self.subset, "empty unless a table of components is set")
        require_one("workload.order", self.order, ("trace", "bootstrap"))
        try:
            self.read_options()
        except SpecError as error:
            raise SpecError(f"workload.{error.key}", error.value, error.allowed) from None

    def _check_arrivals(self) -> None:
        require_one("workload.arrivals", self.arrivals, ARRIVALS)
        if self.requests is not None:
            require_int("workload.requests", self.requests, 1)
            if self.requests > REQUESTS_MAX:
                raise SpecError("workload.requests", self.requests, f"at most {REQUESTS_MAX}")
        elif self.duration_s is None and (self.path is None or self.arrivals == "closed"
                                          or self.order == "bootstrap"):
            raise SpecError("workload.requests", None, "a count unless duration_s or a trace limits the run")
        if self.duration_s is not None:
            require_finite("workload.duration_s", self.duration_s, 0.0, open_low=True)
        self._check_rate()
        require_finite("workload.cv", self.cv, 0.0, CV_MAX, open_low=True)
        require_finite("workload.on_s", self.on_s, 0.0, 1e9, open_low=True)
        require_finite("workload.off_s", self.off_s, 0.0, 1e9, open_low=True)
        require_finite("workload.off_share", self.off_share, 0.0, 1.0 - 1e-9)
        require_int("workload.users", self.users, 1)
        require_finite("workload.think_time_s", self.think_time_s, 0.0, 1e9)
        require_finite("workload.stagger_s", self.stagger_s, 0.0, 1e9)
        require_one("workload.think", self.think, ("exponential", "constant"))
        if self.common_queue and self.think_time_s and self.think == "exponential":
            raise SpecError("workload.common_queue", True,
                            "false with think times that vary, which are those of a user")

    def _check_rate(self) -> None:
        if self.rate is not None:
            require_finite("workload.rate", self.rate, RATE_MIN, RATE_MAX)
        if self.arrivals == "closed" and self.rate is not None:
            raise SpecError("workload.rate", self.rate, "null for a closed loop, whose users set the rate")
        if self.path is None and self.arrivals == "replay":
            raise SpecError("workload.arrivals", self.arrivals, "another without a path (no times)")
        if self.path is None and self.arrivals != "closed" and self.rate is None:
            raise SpecError("workload.rate", None, "a rate in req/s: tables have none of their own")
        if self.arrivals == "replay" and self.order == "bootstrap":
            raise SpecError("workload.order", self.order, "trace with arrivals=replay")

    def _check_lengths(self) -> None:
        require_finite("workload.prompt_scale", self.prompt_scale, 0.0, 1e6, open_low=True)
        require_finite("workload.output_scale", self.output_scale, 0.0, 1e6, open_low=True)
        for what in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, f"{what}_min"), getattr(self, f"{what}_max")
            require_int(f"workload.{what}_min", low, 1)
            if low > TOKENS_MAX:
                raise SpecError(f"workload.{what}_min", low, f"at most {TOKENS_MAX}")
            if high is not None:
                require_int(f"workload.{what}_max", high, low)
        require_one("workload.out_of_range", self.out_of_range, ("clamp", "drop", "error"))
        require_one("workload.over_context", self.over_context, ("reject", "clamp", "drop", "error"))

    def read_options(self) -> ReadOptions:
        """How the file at ``path`` is to be read."""
        return ReadOptions(
            format=self.format, columns=dict(self.columns), where=dict(self.where), time_unit=self.time_unit,
            unsorted=self.unsorted, start=self.start, limit=self.limit, max_rows=self.max_rows,
            tokenizer=self.tokenizer, bytes_per_token=self.bytes_per_token, turns=self.turns)
