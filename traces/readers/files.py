"""Opening trace files: compression, encoding, size, and which container they are."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hetis_sim.spec.errors import SpecError

HEAD_BYTES = 1 << 16
CONTAINERS = ("csv", "jsonl", "json", "parquet")
UTF8 = "UTF-8 text, with or without a byte-order mark"
FOREIGN_MAGIC = {
    b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip",
}


@dataclass(frozen=True, slots=True)
class TraceFile:
    """A file that exists and starts like a trace.

    Attributes:
        label: the path as the caller gave it, for messages.
        head: its first decompressed bytes, without a byte-order mark.
        max_bytes: most decompressed bytes that may be read.
    """

    path: Path
    label: str
    gzipped: bool
    container: str
    head: bytes
    max_bytes: int

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The decompressed bytes; every way in which reading can fail is a SpecError."""
        with reading(self.label), open_raw(self.path, self.gzipped) as raw:
            yield cast(BinaryIO, io.BufferedReader(BoundedReader(raw, self.label, self.max_bytes)))


class BoundedReader(io.RawIOBase):
    """Passes bytes through and refuses to pass more than ``max_bytes``."""

    def __init__(self, raw: BinaryIO, label: str, max_bytes: int) -> None:
        self.raw = raw
        self.label = label
        self.max_bytes = max_bytes
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        data = self.raw.read(len(view))
        view[: len(data)] = data
        self.bytes_read += len(data)
        if self.bytes_read > self.max_bytes:
            raise SpecError(f"{self.label}: decompressed bytes", f"> {self.max_bytes}",
                            "at most max_bytes; raise it, or split the file")
        return len(data)


def open_raw(path: Path, gzipped: bool) -> BinaryIO:
    """The file, through gzip where it is compressed."""
    return cast(BinaryIO, gzip.open(path, "rb")) if gzipped else path.open("rb")


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Turn what the standard library and Arrow raise on a bad file into SpecError."""
    try:
        yield
    except SpecError:
        raise
    except EOFError:
        raise SpecError(label, "truncated gzip", "a complete gzip file") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise SpecError(label, str(error), "an intact gzip file") from None
    except UnicodeDecodeError as error:
        raise SpecError(label, error.object[error.start : error.start + 1], UTF8) from None
    except RecursionError:
        raise SpecError(label, "deeply nested JSON", "a list of flat objects") from None
    except (OSError, ValueError) as error:  # Arrow's exceptions derive from these two
        raise SpecError(label, str(error).strip() or type(error).__name__, "a readable trace file") from None


def open_trace(path: str | Path, max_bytes: int) -> TraceFile:
    """Look at the start of a file.

    Raises:
        SpecError: when it is missing, a folder, empty, truncated, compressed by other
            than gzip, or not UTF-8.
    """
    label, where = str(path), Path(path).expanduser()
    if where.is_dir():
        raise SpecError("path", label, "a file, not a folder")
    if not where.exists():
        raise SpecError("path", label, "an existing file")
    if not where.is_file():
        raise SpecError("path", label, "a regular file: it is read more than once")
    with reading(label):
        with where.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
        with open_raw(where, gzipped) as stream:
            head = stream.read(HEAD_BYTES)
    head = _checked_head(head, label)
    container = _container(head)
    if container == "parquet" and gzipped:
        raise SpecError(label, "parquet inside gzip", "a parquet file as it was written")
    return TraceFile(where, label, gzipped, container, head, max_bytes)


def _checked_head(head: bytes, label: str) -> bytes:
    for magic, name in FOREIGN_MAGIC.items():
        if head.startswith(magic):
            raise SpecError(label, f"{name} file", "uncompressed or gzip")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SpecError(label, "UTF-16 text", UTF8)
    head = head.removeprefix(codecs.BOM_UTF8)
    if not head.strip():
        raise SpecError(label, "zero rows", "a trace with at least one row")
    return head


def _container(head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.lstrip()
    if text.startswith(b"["):
        return "json"
    if not text.startswith(b"{"):
        return "csv"
    first, newline, rest = text.partition(b"\n")
    if not newline:
        return "jsonl"
    try:
        json.loads(first)
    except ValueError:
        # An object over several lines is one document; after a broken first line come objects.
        return "jsonl" if rest.lstrip().startswith(b"{") else "json"
    return "jsonl"
