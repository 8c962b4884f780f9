"""Jobs, spread over processes, whose answers are kept in a folder and never used when stale."""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from hetis_sim.metrics.manifest import PACKAGES, value_sha256
from hetis_sim.metrics.strictjson import dump_line
from hetis_sim.spec.errors import HetisError
from hetis_sim.study.parallel import fan_out

CODE = ("hetis_sim", "traces", "conf")
PACKAGE = "analysis.paper.measure"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """A function (``module.function``) of a package of measurements and its arguments, plain types."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    package: str = PACKAGE

    def __str__(self) -> str:
        return self.function

    @property
    def key(self) -> str:
        """Equal for jobs that must give equal figures, on any machine, as long as the code is the same."""
        return value_sha256({"function": self.function, "arguments": self.arguments,
                             "code": code_hash(self.package)})


@dataclass(frozen=True)
class Answer:
    """What became of a job.

    Attributes:
        value: its figures; None where it failed.
        error: why it failed, for people; empty otherwise.
        defect: whether that was a fault in the code, not an impossible combination.
        cpu_s: processor time.
    """

    value: Any
    error: str = ""
    defect: bool = False
    cpu_s: float = 0.0


@cache
def code_hash(package: str = PACKAGE) -> str:
    """Hash of all files that decide a package's figures, and of the versions of the packages behind them."""
    from importlib import metadata

    digest = hashlib.sha256()
    for folder in (*CODE, package.replace(".", "/")):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    for package in PACKAGES[1:]:
        digest.update(f"{package} {metadata.version(package)}\n".encode())
    return digest.hexdigest()


class Store:
    """Answers in ``folder``, one file a job; what is not there is worked out.

    Args:
        folder: made where it is missing.
        workers: processes; None for one per core.
        told: called with a line on progress, and with (done, total) of the jobs at hand.

    Attributes:
        cpu_s: processor time of all answers that were asked for, whenever they were worked out.
    """

    def __init__(self, folder: Path, workers: int | None = None,
                 told: Callable[[str, int, int], None] | None = None) -> None:
        self.folder = folder
        self.workers = workers
        self._told = told
        self._asked: dict[str, Answer] = {}

    @property
    def cpu_s(self) -> float:
        """Processor time of all answers asked for, whenever they were worked out."""
        return sum(answer.cpu_s for answer in self._asked.values())

    @property
    def defects(self) -> list[str]:
        """Faults in the code that jobs came upon."""
        return [answer.error for answer in self._asked.values() if answer.defect]

    def answers(self, what: str, jobs: Sequence[Job]) -> list[Answer]:
        """The answer to each job, in order; equal jobs are worked out once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted = {job.key: job for job in jobs}
        missing = [key for key in wanted if key not in self._asked and not self._path(key).exists()]
        done = iter(range(1, len(missing) + 1))
        self._tell(what, 0, len(missing))
        fan_out(partial(work, str(self.folder)), [wanted[key] for key in missing], self.workers,
                lambda: self._tell(what, next(done), len(missing)))
        for key in wanted:
            if key not in self._asked:
                self._asked[key] = self._read(key)
        return [self._asked[job.key] for job in jobs]

    def _tell(self, what: str, done: int, total: int) -> None:
        if self._told is not None and total:
            self._told(what, done, total)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, key: str) -> Answer:
        path = self._path(key)
        answer = Answer(**json.loads(path.read_text(encoding="utf-8")))
        if answer.defect:
            # The next run tries again.
            path.unlink()
        return answer


def work(folder: str, job: Job) -> None:
    """In a process: work a job out and keep its answer."""
    started = time.process_time()
    module, _, name = job.function.partition(".")
    try:
        value = getattr(import_module(f"{job.package}.{module}"), name)(**job.arguments)
        answer = Answer(value)
    except HetisError as error:
        answer = Answer(None, str(error))
    except Exception:  # noqa: BLE001 - one faulty job must not stop the others; the command ends in an error
        answer = Answer(None, traceback.format_exc(), defect=True)
    record = {"value": answer.value, "error": answer.error, "defect": answer.defect,
              "cpu_s": round(time.process_time() - started, 3)}
    target = Path(folder) / f"{job.key}.json"
    draft = target.with_suffix(f".{os.getpid()}.part")
    draft.write_text(dump_line(record), encoding="utf-8")
    draft.replace(target)


def values(answers: Sequence[Answer]) -> Iterator[Any]:
    """The figures of the jobs that did not fail."""
    return (answer.value for answer in answers if not answer.error)
