"""Durations of one model shape measured whole, by token count: what a calibration run writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hetis_sim.cost.curve import Curve
from hetis_sim.spec.errors import SpecError, require
from hetis_sim.spec.model import ModelSpec

# What decides the work of a layer or of the head; a table is used only where all of it agrees.
SHAPE_FIELDS = ("hidden", "query_heads", "kv_heads", "head_dim", "ffn_hidden", "vocab", "gated_mlp",
                "experts", "experts_per_token", "shared_ffn_hidden", "weight_bytes")

ShapeKey = tuple[int, ...]


def shape_key(model: ModelSpec) -> ShapeKey:
    """The numbers of ``model`` that a table must agree with."""
    return tuple(int(getattr(model, name)) for name in SHAPE_FIELDS)


@dataclass(frozen=True)
class TokenTables:
    """Curves of seconds by tokens for (model shape, tensor-parallel degree)."""

    curves: Mapping[tuple[ShapeKey, int], Curve]

    def find(self, model: ModelSpec, tp: int) -> Curve | None:
        """The curve for exactly this shape and degree."""
        return self.curves.get((shape_key(model), tp))

    def degrees(self, model: ModelSpec) -> list[int]:
        """Tensor-parallel degrees that were measured of this shape."""
        shape = shape_key(model)
        return sorted(tp for found, tp in self.curves if found == shape)

    @classmethod
    def parse(cls, raw: Any, key: str) -> TokenTables:
        """Read ``{tables: [{shape: {...}, tp, tokens: [...], seconds: [...]}]}``."""
        tables = raw.get("tables")
        if not isinstance(tables, list) or not tables:
            raise SpecError(f"{key}.tables", tables, "a list with at least one table")
        curves = {}
        for number, table in enumerate(tables):
            place = f"{key}.tables[{number}]"
            require(isinstance(table, dict), place, table, "an object")
            shape, tp = table.get("shape"), table.get("tp")
            if not isinstance(shape, dict) or set(shape) != set(SHAPE_FIELDS):
                raise SpecError(f"{place}.shape", shape, f"an object with {', '.join(SHAPE_FIELDS)}")
            for name, value in shape.items():
                require(isinstance(value, int) and value >= 0, f"{place}.shape.{name}", value,
                        "an integer >= 0")
            require(isinstance(tp, int) and tp >= 1, f"{place}.tp", tp, "an integer >= 1")
            curve = Curve.parse(table, place, "tokens", falls=True)
            curves[tuple(int(shape[name]) for name in SHAPE_FIELDS), tp] = curve
        return cls(curves)

    @staticmethod
    def dump_table(model: ModelSpec, tp: int, curve: Curve) -> dict[str, Any]:
        """One entry of ``tables``."""
        shape = {name: getattr(model, name) for name in SHAPE_FIELDS}
        return {"shape": shape, "tp": tp, **curve.dump("tokens")}
