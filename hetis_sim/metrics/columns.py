"""Layouts of the records and the typed tables made from them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

STEP_KINDS = ("prefill", "decode", "mixed")
TRANSFER_KINDS = ("push", "move", "swap_out", "swap_in", "handoff")
WIRE_KINDS = ("cache", "heads", "collectives", "activations")
"""What wires carry: cache; queries, keys, values and outputs of heads away from home; all-reduces; and what
goes from stage to stage."""

STATUSES = ("finished", "rejected")

PARTS = ("host", "dense", "collective", "attention", "head_transfer", "hop", "waiting")
"""Named parts of an iteration's time, in the order of the record."""


class Layout:
    """A packed row: names and NumPy types of its fields, and the function that packs one.

    Packing into bytes is the cheapest way to keep a row from Python: half a microsecond for
    16 fields, and no memory beyond the fields themselves.
    """

    def __init__(self, fields: Mapping[str, str]) -> None:
        codes = {"i1": "b", "i4": "i", "i8": "q", "f8": "d"}
        packer = struct.Struct("<" + "".join(codes[kind] for kind in fields.values()))
        self.dtype = np.dtype([(name, "<" + kind) for name, kind in fields.items()])
        self.size_bytes = packer.size
        self.pack = packer.pack

    def columns(self, rows: bytearray) -> dict[str, NDArray[Any]]:
        """One contiguous array a field, copied out, integers widened to 64 bits."""
        view = np.frombuffer(rows, dtype=self.dtype)
        return {name: view[name].astype(np.int64 if view[name].dtype.kind == "i" else np.float64)
                for name in self.dtype.names or ()}


STEP = Layout({
    "instance": "i4", "lane": "i4", "kind": "i1", "start_s": "f8", "end_s": "f8", "iterations": "i8",
    "requests": "i8", "prefill_tokens": "i8", "decode_tokens": "i8",
    **{f"{part}_s": "f8" for part in PARTS},
})
ITL = Layout({"first_s": "f8", "last_s": "f8", "count": "i8", "weight": "i8"})
TRANSFER = Layout({"request_id": "i8", "kind": "i1", "start_s": "f8", "end_s": "f8", "size_bytes": "f8",
                   "source": "i4", "target": "i4"})
REQUEST = Layout({
    "request_id": "i8", "arrival_s": "f8", "prompt_tokens": "i8", "output_tokens": "i8", "status": "i1",
    "reason": "i4", "instance": "i4", "first_scheduled_s": "f8", "first_token_s": "f8", "finish_s": "f8",
    "preemptions": "i8", "moves": "i8", "moved_bytes": "f8", "remote_share": "f8",
})


@dataclass(frozen=True)
class Table:
    """Named columns of equal length; those in ``categories`` hold codes into the names given there."""

    columns: dict[str, NDArray[Any]]
    categories: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def rows(self, chosen: NDArray[Any]) -> Table:
        """The rows that a mask or an index array chooses."""
        return Table({name: values[chosen] for name, values in self.columns.items()}, self.categories)

    def to_pandas(self) -> pd.DataFrame:
        """A data frame: int64, float64 and categories."""
        import pandas as pd

        return pd.DataFrame({
            name: pd.Categorical.from_codes(values.astype(np.int32), _names(self.categories[name]))
            if name in self.categories else values
            for name, values in self.columns.items()
        })

    def to_arrow(self) -> Any:
        """A ``pyarrow.Table`` without metadata, so that equal rows give equal files."""
        import pyarrow as pa

        arrays = {
            name: pa.DictionaryArray.from_arrays(pa.array(values.astype(np.int32)),
                                                 pa.array(self.categories[name], pa.string()))
            if name in self.categories else pa.array(values)
            for name, values in self.columns.items()
        }
        return pa.table(arrays)

    @classmethod
    def from_pandas(cls, frame: pd.DataFrame) -> Table:
        """The inverse of :meth:`to_pandas`."""
        import pandas as pd

        columns: dict[str, NDArray[Any]] = {}
        categories: dict[str, tuple[str, ...]] = {}
        for name in frame.columns:
            series = frame[name]
            if isinstance(series.dtype, pd.CategoricalDtype):
                columns[name] = series.cat.codes.to_numpy(np.int64)
                categories[name] = tuple(series.cat.categories)
            else:
                columns[name] = series.to_numpy()
        return cls(columns, categories)


def _names(categories: tuple[str, ...]) -> pd.Index[str]:
    import pandas as pd

    return pd.Index(categories, dtype=str)
