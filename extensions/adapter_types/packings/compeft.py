"""Ternary tensors, values -c, 0 and c, in close to as few bits as their entropy allows (ComPEFT, arXiv 2311.13171).

A stream holds the signs of one vector: the gaps between its non-zeros in Rice's code (Golomb's of 1966 with a power of two,
close to optimal for gaps of a geometric distribution), and one bit per sign. If most entries are not zero, the gaps are
those between the zeros. Quotients, remainders and signs are stored apart, so that numpy reads them without a loop.

    byte 0          128 when the gaps are between zeros, plus the parameter k, 0 to 40
    two varints     the number m of gaps, and the number of bits of all quotients
    m * k bits      remainders, lowest bit first
    bits            quotients in unary: that many zeros and a one
    bits            signs of the non-zeros in order, one for positive

Each part begins at a byte, filled up with zero bits; bits fill a byte from the lowest up.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from loraweave import AdapterCorrupt, AdapterUnsupported

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Signs = np.ndarray[tuple[int], np.dtype[np.int8]]

MAX_PARAMETER = 40
# a stream of few bytes may stand for many zeros, but not for so many that they fill the memory
MAX_ENTRIES_PER_BYTE = 2**10
FREE_ENTRIES = 2**22

_INVERTED = 128


def encode(signs: Signs) -> Bytes:
    """Return the stream of an int8 vector of -1, 0 and 1.

    Raises AdapterUnsupported for other values and for so few non-zeros that `decode` would refuse the stream.
    """
    if signs.ndim != 1 or signs.dtype != np.int8 or bool(((signs < -1) | (signs > 1)).any()):
        raise AdapterUnsupported(f"a ternary stream holds a vector of -1, 0 and 1, not {signs.dtype} of shape {signs.shape}")
    nonzero = signs != 0
    inverted = 2 * int(np.count_nonzero(nonzero)) > len(signs)
    places = np.flatnonzero(~nonzero if inverted else nonzero)
    gaps = np.diff(places, prepend=-1) - 1
    # the shortest Rice code has k + 1 bits for each gap, and 1 for each 2^k of its length
    k = int(np.argmin([len(gaps) * (k + 1) + int((gaps >> k).sum()) for k in range(MAX_PARAMETER + 1)]))
    quotients = gaps >> k
    unary = np.zeros(int(quotients.sum()) + len(gaps), np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    header = bytes([_INVERTED * inverted + k]) + _varint(len(gaps)) + _varint(len(unary))
    remainders = (gaps[:, None] >> np.arange(k)) & 1
    parts = [remainders.astype(np.uint8).ravel(), unary, (signs[nonzero] > 0).astype(np.uint8)]
    stream = np.concatenate([np.frombuffer(header, np.uint8), *(np.packbits(part, bitorder="little") for part in parts)])
    if len(signs) > _most_entries(len(stream)):
        raise AdapterUnsupported(
            f"{len(gaps)} non-zeros among {len(signs)} entries are too few for a ternary stream: use a higher density"
        )
    return stream


def decode(stream: Bytes, size: int) -> Signs:
    """Return the int8 vector of `size` entries that a stream holds. Raises AdapterCorrupt if it holds no such vector.

    Every number in its header is checked against the stream's length before memory is allocated.
    """
    if not 0 <= size <= _most_entries(len(stream)):
        raise _corrupt(f"{len(stream)} bytes cannot be {size} entries")
    if not len(stream):
        raise _corrupt("it is empty")
    inverted, k = bool(stream[0] & _INVERTED), int(stream[0]) & ~_INVERTED
    num_gaps, start = _read_varint(stream, 1)
    num_unary, start = _read_varint(stream, start)
    if k > MAX_PARAMETER or num_gaps > size or num_unary < num_gaps or (num_unary - num_gaps) << k > size:
        raise _corrupt(f"parameter {k}, {num_gaps} gaps and {num_unary} bits do not fit {size} entries")
    num_signs = size - num_gaps if inverted else num_gaps
    counts = (num_gaps * k, num_unary, num_signs)
    if start + sum(map(_num_bytes, counts)) != len(stream):
        raise _corrupt(f"{num_gaps} gaps and {num_signs} signs do not take {len(stream) - start} bytes")
    remainders, unary, signs = _bit_parts(stream[start:], counts)
    ends = np.flatnonzero(unary)
    if len(ends) != num_gaps or (num_unary and not unary[-1]):
        raise _corrupt(f"its quotients are {len(ends)}, not {num_gaps}")
    gaps = (np.diff(ends, prepend=-1) - 1) << k
    for bit in range(k):
        gaps += remainders[bit::k].astype(np.int64) << bit
    places = np.cumsum(gaps + 1) - 1
    if num_gaps and int(places[-1]) >= size:
        raise _corrupt(f"its last place is {int(places[-1])} of {size}")
    marked = np.zeros(size, bool)
    marked[places] = True
    vector = np.zeros(size, np.int8)
    vector[~marked if inverted else marked] = signs.astype(np.int8) * 2 - 1
    return vector


def split(tensor: Tensor) -> tuple[Signs, float] | None:
    """Return (signs in row-major order, c) for a tensor that is c * signs bit for bit in fp32, None for any other."""
    flat = tensor.detach().cpu().float().flatten()
    c = float(flat.abs().max()) if flat.numel() else 0.0
    signs = flat.sign()
    rebuilt = torch.where(signs == 0, 0.0, signs * c)
    # as bits, since a negative zero equals zero but is another content
    if not np.isfinite(c) or not torch.equal(rebuilt.view(torch.int32), flat.view(torch.int32)):
        return None
    return signs.numpy().astype(np.int8), c


def pack(tensors: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return (name, ternary tensor) pairs as {"signs": one stream of all in order, "scales": a c for each, or one for all}.

    Raises AdapterUnsupported, naming the first tensor that is not ternary.
    """
    parts, scales = [], []
    for name, tensor in tensors:
        signs_and_scale = split(tensor)
        if signs_and_scale is None:
            raise AdapterUnsupported(
                f"{name} has values other than -c, 0 and c for one c, which a ternary form cannot hold: make the adapter "
                "ternary first with compeft(adapter) of loraweave.extensions.methods, or store its factors as they are"
            )
        parts.append(signs_and_scale[0])
        scales.append(signs_and_scale[1])
    held = sorted({c for signs, c in zip(parts, scales, strict=True) if signs.any()})
    stream = encode(np.concatenate(parts) if parts else np.zeros(0, np.int8))
    # a tensor of zeros fits any c
    kept = held if len(held) == 1 else scales
    return {"signs": torch.from_numpy(stream), "scales": torch.tensor(kept, dtype=torch.float32)}


def unpack(packed: Mapping[str, Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the fp32 tensors of these shapes that `pack` packed. Raises AdapterCorrupt if `packed` does not fit them."""
    signs, scales = packed["signs"], packed["scales"]
    if signs.dtype != torch.uint8 or signs.dim() != 1 or scales.dtype != torch.float32 or scales.dim() != 1:
        raise _corrupt(f"it has signs of {signs.dtype} and scales of {scales.dtype}")
    if len(scales) not in (1, len(shapes)) or not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise _corrupt(f"{len(shapes)} tensors do not have {len(scales)} scales of 0 or more")
    sizes = [int(np.prod(shape, dtype=object)) for shape in shapes]
    values = torch.from_numpy(decode(signs.numpy(), sum(sizes))).float()
    numbers = scales.tolist() * (1 if len(scales) == len(shapes) else len(shapes))
    parts = zip(torch.split(values, sizes), shapes, numbers, strict=True)
    return [torch.where(part == 0, 0.0, part * c).reshape(shape) for part, shape, c in parts]


class Compeft:
    """The packing of ternary tensors as a stream of signs beside their scales; `names` are the keys that `pack` returns."""

    names = ("signs", "scales")
    pack = staticmethod(pack)
    unpack = staticmethod(unpack)


def _bit_parts(stream: Bytes, counts: Sequence[int]) -> list[Bytes]:
    parts, start = [], 0
    for count in counts:
        end = start + _num_bytes(count)
        bits = np.unpackbits(stream[start:end], bitorder="little")
        if bits[count:].any():
            raise _corrupt("it has bits beyond the end of a part")
        parts.append(bits[:count])
        start = end
    return parts


def _num_bytes(num_bits: int) -> int:
    return (num_bits + 7) // 8


def _most_entries(num_bytes: int) -> int:
    return FREE_ENTRIES + MAX_ENTRIES_PER_BYTE * num_bytes


def _varint(number: int) -> bytes:
    groups = []
    while number >= 128:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


def _read_varint(stream: Bytes, start: int) -> tuple[int, int]:
    """Return (the number of at most 63 bits at `start`, the index after it). Raises AdapterCorrupt if it does not end."""
    number = 0
    for place, byte in enumerate(stream[start : start + 9].tolist()):
        number |= (byte & 127) << 7 * place
        if byte < 128:
            return number, start + place + 1
    raise _corrupt("it ends within its header")


def _corrupt(why: str) -> AdapterCorrupt:
    return AdapterCorrupt(f"the ternary stream is damaged: {why}; take the adapter from its source again")
