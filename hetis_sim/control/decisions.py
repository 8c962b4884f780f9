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
        self._tuples: dict[tuple[int, ...], str] = {}

    def record(self, kind: str, view: InstanceView | InstanceLoad | MeshView,
               requests: Sequence[RequestView], decision: Any) -> None:
        """Append a decision about ``requests`` on the snapshot ``view``."""
        if not self.enabled:
            return
        shown = ",".join([self._shown(request) for request in requests])
        text = f'{{"requests":[{shown}],"view":{_json(view.to_dict())}}}'
        entry = {"n": len(self.lines), "kind": kind, "instance": view.index,
                 "requests": [request.request_id for request in requests],
                 "snapshot": hashlib.sha256(text.encode()).hexdigest()[:16], "decision": decision}
        self.lines.append(_json(entry))

    def _shown(self, request: RequestView) -> str:
        """A request as JSON with its keys in order, without its arrival: an executor measures that.

        Written out, since snapshots list all that run, and a general encoder takes longer than a run.
        """
        blocks = f'"blocks":{self._listed(request.blocks)},' if request.blocks else ""
        placement = "null" if request.placement is None else self._listed(request.placement)
        return (f'{{{blocks}"context_tokens":{request.context_tokens},'
                f'"generated_tokens":{request.generated_tokens},"movable":{_FLAGS[request.movable]},'
                f'"placement":{placement},"preemptions":{request.preemptions},'
                f'"prompt_tokens":{request.prompt_tokens},"request_id":{request.request_id}}}')

    def _listed(self, numbers: tuple[int, ...]) -> str:
        """Whole numbers as a JSON list; placements are few and come again and again."""
        found = self._tuples.get(numbers)
        if found is None:
            found = self._tuples[numbers] = _json(numbers)
        return found


def _plain(value: Any) -> Any:
    return asdict(value)


_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=_plain).encode
_FLAGS = ("false", "true")
