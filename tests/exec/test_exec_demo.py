"""The demonstration command, and messages on their way."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from exec_toys import slow_cache

from hetis_exec.cli import main
from hetis_exec.messages import DRIVER, Beat, CacheData, Stop
from hetis_exec.records import RunRecord
from hetis_exec.transport import InProcessTransport


def test_the_demonstration_prints_the_simulator_s_table(capsys: pytest.CaptureFixture[str],
                                                        tmp_path: Path) -> None:
    """The same table, labelled measured, and a record that can be replayed."""
    assert main(["toy", "--requests", "20", "--rate", "500", "--record", str(tmp_path / "run.json")]) == 0
    printed = capsys.readouterr().out
    assert "measured: hetis serving a toy model on 4 threads" in printed
    assert "ttft (" in printed
    assert "20 submitted, 20 finished" in printed
    assert "byte for byte" in printed
    assert "simulated" not in printed
    assert len(RunRecord.read(tmp_path / "run.json").requests) == 20


@pytest.mark.parametrize(("words", "message"), [
    (["--policy", "hetsi"], "policy.name='hetsi'"), (["--rate", "0"], "rate=0.0"),
    (["--rate", "nan"], "rate=nan"), (["--requests", "0"], "requests=0"),
])
def test_bad_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The key, the value and what is allowed, on standard error, and exit status 1."""
    assert main(["toy", *words]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def piece(tag: int) -> CacheData:
    """A piece of cache without content."""
    nothing = np.empty((0, 0, 0, 0))
    return CacheData(0, tag, 0, 0, (), (), 0, nothing, nothing, False)


def test_messages_of_one_sender_keep_their_order() -> None:
    """Cache on a slow wire is overtaken by other messages, and never by cache."""
    transport = InProcessTransport(slow_cache(0.02))
    sender, receiver = transport.endpoint(1), transport.endpoint(2)
    for message in (piece(1), Beat(1), piece(2), Beat(2)):
        sender.send(2, message)
    received = [receiver.receive(1.0) for _ in range(4)]
    assert [type(message) for message in received] == [Beat, Beat, CacheData, CacheData]
    assert [getattr(m, "tag", None) or getattr(m, "device", None) for m in received] == [1, 2, 1, 2]


def test_receiving_ends_in_time() -> None:
    """Nobody waits longer than told, whatever is still on its way."""
    transport = InProcessTransport(slow_cache(5.0))
    receiver = transport.endpoint(DRIVER)
    transport.endpoint(1).send(DRIVER, piece(1))
    begun_s = time.monotonic()
    assert receiver.receive(0.05) is None
    assert time.monotonic() - begun_s < 1.0
    transport.endpoint(1).send(DRIVER, Stop(at_once=True))
    assert receiver.receive(0.5) == Stop(at_once=True)
