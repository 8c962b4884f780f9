"""A log of decisions: what was seen, as a hash, and what was decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hetis_sim.policies.view import InstanceLoad, InstanceView, MeshView, RequestView


class DecisionLog:
    """Collects one JSON line per decision; does nothing unless enabled.

    Two runs that make the same decisions on the same snapshots produce equal lines, in
    whichever world they ran: no line holds a time.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.lines: list[str] = []

    def record(self, kind: str, view: InstanceView | InstanceLoad | MeshView,
               requests: Sequence[RequestView], decision: Any) -> None:
        """Append a decision about ``requests`` on the snapshot ``view``."""
        if not self.enabled:
            return
        shown = [asdict(request) for request in requests]
        for request in shown:
            del request["arrival_s"]  # measured on a wall clock by an executor
            if not request["blocks"]:
                del request["blocks"]
        text = json.dumps({"view": view.to_dict(), "requests": shown}, sort_keys=True, separators=(",", ":"))
        entry = {"n": len(self.lines), "kind": kind, "instance": view.index,
                 "requests": [request["request_id"] for request in shown],
                 "snapshot": hashlib.sha256(text.encode()).hexdigest()[:16], "decision": decision}
        self.lines.append(json.dumps(entry, sort_keys=True, separators=(",", ":"), default=_plain))


def _plain(value: Any) -> Any:
    return asdict(value)
