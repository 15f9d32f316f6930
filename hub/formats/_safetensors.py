"""Reading safetensors from a foreign folder: everything is checked against the file's size before memory is allocated.

Tensors are copied, never mapped: if somebody truncates a mapped file, the process is killed.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from loraweave.common.checks import are_texts
from loraweave.common.process import free_host_bytes
from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._files import open_file, parse_json, read_json
from loraweave.lowrank.algebra import all_finite

MAX_HEADER_BYTES = 100 * 10**6
MAX_TENSORS = 200_000
# limits of the header's commas and opening brackets: for one tensor with all its dimensions, and for the metadata
NODES_OF_TENSOR = 16
MAX_NODES = 500_000
MAX_KEY_LENGTH = 512
MAX_DIMENSIONS = 8
# the bytes of tensors read at once, and of the largest header that is cached between its two reads
RUN_BYTES = 2**24
KEPT_HEADER_BYTES = 2**20
# reads that need no more memory skip the check of free memory, which takes as long as reading a small adapter
ALWAYS_FREE_BYTES = 2**24

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# only for formats that store positions in another tensor
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
# known to safetensors, but integers and booleans have no scale, and complex or block-scaled numbers no single value
SIZES_OF_OTHERS = {"U64": 8, "U32": 4, "U16": 2, "BOOL": 1, "C64": 8, "F8_E8M0": 1}
SIZES_OF_OTHERS |= {dtype: kind.itemsize for dtype, kind in INTEGERS.items()}


@dataclass(frozen=True)
class Entry:
    """The place of one tensor: its dtype as the file names it, its shape, and its bytes counted from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_tensors(folder: Path, names: list[str], *, integers: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (key, dtype in the file, tensor in fp32) of every tensor in the named files, in the order of their bytes.

    All headers are checked before the first tensor is read. With `integers`, tensors of whole numbers (places in another
    tensor) are read too, as int64. Raises AdapterCorrupt for a damaged file or a key that two files hold, AdapterUnsupported
    for a dtype that has no exact meaning, and for tensors that need more memory than there is.
    """
    known = {**FLOATS, **INTEGERS} if integers else FLOATS
    headers = {name: _header_of(folder, name)[:2] for name in names}
    seen: dict[str, str] = {}
    for name, (entries, _) in headers.items():
        for key, entry in entries.items():
            if key in seen:
                raise AdapterCorrupt(f"{folder}: tensor {key!r} is in both {seen[key]} and {name}")
            seen[key] = name
            if entry.dtype not in known:
                raise AdapterUnsupported(
                    f"{folder}: tensor {key!r} has dtype {entry.dtype}; only floating point factors "
                    f"({', '.join(FLOATS)}) have an exact meaning, so save the adapter in one of them"
                )
    runs = {name: _runs(entries) for name, (entries, _) in headers.items()}
    _require_memory(folder, [run for file_runs in runs.values() for run in file_runs])
    for name, (_, start) in headers.items():
        with open_file(folder, name) as (file, _):
            for run in runs[name]:
                yield from _read_run(file, folder, name, run, start)


def gather(stored: Iterable[tuple[str, str, Tensor]], folder: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors by key, and their dtypes in the file ("float16+float32"). Raises AdapterCorrupt without tensors."""
    tensors: dict[str, Tensor] = {}
    dtypes: set[str] = set()
    for key, dtype, tensor in stored:
        tensors[key] = tensor
        dtypes.add(dtype)
    if not tensors:
        raise AdapterCorrupt(f"{folder}: the file holds no tensors")
    # named once each: torch takes microseconds to write a dtype's name
    return tensors, "+".join(sorted(str(FLOATS[dtype]).removeprefix("torch.") for dtype in dtypes & FLOATS.keys()))


def require_finite(tensor: Tensor, where: str, what: str) -> None:
    """Raise AdapterCorrupt, with the number of bad values, if a value is NaN or infinite."""
    if not all_finite(tensor):
        num = int((~torch.isfinite(tensor)).sum())
        raise AdapterCorrupt(f"{where}: {num} of {tensor.numel()} values of {what} are NaN or infinite")


def shards(folder: Path, index_name: str) -> list[str]:
    """Return the names of the files that an index lists. Raises AdapterCorrupt unless index and files agree on every key."""
    weight_map = read_json(folder, index_name, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterCorrupt(f"{folder}: {index_name} has no object 'weight_map'")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if "/" in name or "\\" in name or not name.isprintable() or not name.endswith(".safetensors"):
            raise AdapterCorrupt(f"{folder}: {index_name} names {name!r}, which is not a safetensors file of this folder")
    for name in names:
        held = set(_header_of(folder, name)[0])
        claimed = {key for key, value in weight_map.items() if value == name}
        if held != claimed:
            odd = sorted(held ^ claimed)[:3]
            raise AdapterCorrupt(f"{folder}: {index_name} and {name} disagree on {len(held ^ claimed)} tensors: {odd}")
    return names


def tensor_names(folder: Path, name: str) -> list[str]:
    """Return the names of the tensors in a file; only its header is read."""
    return list(_header_of(folder, name)[0])


def file_metadata(folder: Path, name: str) -> dict[str, str]:
    """Return the metadata, texts by name, from a file's header."""
    return dict(_header_of(folder, name)[2])


def _header_of(folder: Path, name: str) -> tuple[Mapping[str, Entry], int, Mapping[str, str]]:
    """Return a file's entries by key, the offset in bytes where its data begins, and its metadata."""
    with open_file(folder, name) as (file, size):
        try:
            return _header(file, size)
        except ValueError as error:
            raise AdapterCorrupt(f"{folder}: {name} is not an intact safetensors file: {error}") from error


def _header(file: BinaryIO, size: int) -> tuple[Mapping[str, Entry], int, Mapping[str, str]]:
    if size < 10:
        raise ValueError(f"it has {size} bytes, fewer than the smallest header")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, more than the limit of {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise ValueError(f"its header claims {length} bytes, but the file has {size}; it was cut off")
    raw = file.read(length)
    parse = _parsed if length <= KEPT_HEADER_BYTES else _parsed.__wrapped__
    entries, metadata = parse(raw, size - 8 - length)
    return entries, 8 + length, metadata


@lru_cache(maxsize=1)
def _parsed(raw: bytes, data_bytes: int) -> tuple[Mapping[str, Entry], Mapping[str, str]]:
    """Return a header's entries by key and its metadata. Raises ValueError unless the tensors cover the data exactly."""
    # parsed JSON takes many times the memory of its text, so its parts are counted first
    num_tensors, nodes = raw.count(b'"dtype"'), raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if num_tensors > MAX_TENSORS or nodes > MAX_NODES + NODES_OF_TENSOR * num_tensors:
        raise ValueError(
            f"its header has {nodes} parts and describes {num_tensors} tensors; the limits are {MAX_TENSORS} tensors, "
            f"{NODES_OF_TENSOR} parts for each and {MAX_NODES} for the rest"
        )
    if not raw.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    table = parse_json(raw)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not are_texts(metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of texts")
    entries = {key: _entry(key, value) for key, value in table.items()}
    _check_cover(entries, data_bytes)
    return MappingProxyType(entries), MappingProxyType(metadata)


def _entry(key: str, value: Any) -> Entry:
    if not 0 < len(key) <= MAX_KEY_LENGTH or not key.isprintable():
        raise ValueError(f"the tensor name {key[:60]!r} is empty, not printable or above {MAX_KEY_LENGTH} characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {key!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or (dtype not in FLOATS and dtype not in SIZES_OF_OTHERS):
        raise ValueError(f"tensor {key!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {key!r} has the shape {str(shape)[:80]}, not up to {MAX_DIMENSIONS} counts")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {key!r} has data_offsets {str(offsets)[:80]}, not two counts")
    item = FLOATS[dtype].itemsize if dtype in FLOATS else SIZES_OF_OTHERS[dtype]
    if offsets[1] - offsets[0] != math.prod(shape) * item:
        raise ValueError(
            f"tensor {key!r} of shape {shape} and dtype {dtype} needs {math.prod(shape) * item} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _is_counts(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    # a loop: all() over a generator takes three times as long, and there are two lists for each tensor
    for count in value:  # noqa: SIM110
        if type(count) is not int or not 0 <= count < 2**63:
            return False
    return True


def _check_cover(entries: Mapping[str, Entry], data_bytes: int) -> None:
    position = 0
    for key, entry in sorted(entries.items(), key=_by_place):
        if entry.begin != position:
            word = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise ValueError(f"tensor {key!r} begins at byte {entry.begin} of the data and {word}, which ends at {position}")
        position = entry.end
    if position != data_bytes:
        raise ValueError(f"its tensors need {position} bytes of data, but it holds {data_bytes}")


Run = list[tuple[str, Entry]]


def _runs(entries: Mapping[str, Entry]) -> list[Run]:
    """Return runs of adjacent tensors of one dtype, of up to `RUN_BYTES`: each run is read and converted at once."""
    runs: list[Run] = []
    for key, entry in sorted(entries.items(), key=_by_place):
        first = runs[-1][0][1] if runs else None
        if first is not None and first.dtype == entry.dtype and entry.end - first.begin <= RUN_BYTES:
            runs[-1].append((key, entry))
        else:
            runs.append([(key, entry)])
    return runs


def _by_place(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].begin, item[1].end


def _require_memory(folder: Path, runs: Collection[Run]) -> None:
    """Raise AdapterUnsupported if the fp32 tensors and the largest run as stored need more memory than is free."""
    entries = [entry for run in runs for _, entry in run]
    needed = sum(max(4, 8 * (entry.dtype in INTEGERS)) * math.prod(entry.shape) for entry in entries)
    needed += max((run[-1][1].end - run[0][1].begin for run in runs), default=0)
    free = None if needed <= ALWAYS_FREE_BYTES else free_host_bytes()
    if free is not None and needed > free:
        raise AdapterUnsupported(
            f"{folder}: its {len(entries)} tensors need {needed:,} bytes of memory to be read, but {free:,} are free; read "
            "it on a larger machine"
        )


def _read_run(file: BinaryIO, folder: Path, name: str, run: Run, start: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (key, dtype in the file, tensor in fp32 or int64) of a run of adjacent tensors; data begins at byte `start`."""
    begin, dtype = run[0][1].begin, run[0][1].dtype
    buffer = bytearray(run[-1][1].end - begin)
    file.seek(start + begin)
    if (count := file.readinto(buffer)) != len(buffer):  # type: ignore[attr-defined]
        key = next(key for key, entry in run if entry.end - begin > count)
        raise AdapterCorrupt(f"{folder}: {name} ended within tensor {key!r}; it changed while it was read")
    if dtype in INTEGERS:
        flat = torch.frombuffer(buffer, dtype=INTEGERS[dtype]).long() if buffer else torch.zeros(0)
    else:
        flat = torch.frombuffer(buffer, dtype=FLOATS[dtype]).float() if buffer else torch.zeros(0)
    for (key, entry), part in zip(run, torch.split(flat, [math.prod(entry.shape) for _, entry in run]), strict=True):
        yield key, dtype, part.view(entry.shape)


def hashed_tensors(folder: Path, name: str, digest: str, *, said_by: str) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises AdapterCorrupt if its SHA-256 is not `digest`, which `said_by` records."""
    # checks the header first
    tensor_names(folder, name)
    with open_file(folder, name) as (file, size):
        raw = file.read(size)
    if (actual_digest := hashlib.sha256(raw).hexdigest()) != digest:
        raise AdapterCorrupt(
            f"{folder / name} has SHA-256 {actual_digest[:12]}, but {said_by} says {digest[:12]}: one of them is damaged or "
            "of another folder; copy or download the folder again"
        )
    try:
        tensors: dict[str, Tensor] = load(raw)
    except (SafetensorError, ValueError) as error:
        raise AdapterCorrupt(f"{folder / name} is not an intact safetensors file: {error}") from error
    return tensors
