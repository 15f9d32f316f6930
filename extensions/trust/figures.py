"""Figures of an adapter that depend on its updates alone: the size and dominance of each layer, and a sketch.

All are computed from the factors, in the time it takes to read them a few times, and none depends on how the update is
factored: (A, B) and (R A, B R^-1) have the same figures.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraweave import Adapter, Factors
from loraweave.extend import algebra
from loraweave.extend.hubs import Connection

Array = NDArray[Any]

CODE_BITS = 128
# the length of the rows of the two random matrices of sketches; longer factors are folded to it
_FOLD = 4096
# the number of entries in one stack of factors: 16 MiB in fp32
_STACK = 2**22
# the largest share of a singular value that is used: for rank 1 it is 1, whose logit is infinite
_NEARLY_ALL = 1 - 1e-6

# The figures of a hub's adapters are rows, so that a new one is compared with a sample of its kin and its near-duplicates at
# once. The sample has the smallest content hashes: random, independent of the order of addition, and found by an index.
# Near-duplicates share at least one of eight pieces of their sketches' codes, each of which is indexed. Neither look-up
# takes longer as the hub grows.
NUM_REFERENCE = 256
NUM_PIECES = 8
MAX_LOOKED_AT = 256
# bits that differ between adapters with cosine 0.99 are 4.5 % of all, give or take 1.8 %
MAX_DISTANCE = 16

_PIECE_BYTES = CODE_BITS // 8 // NUM_PIECES
_PIECES = tuple(f"piece_{number}" for number in range(NUM_PIECES))


@dataclass(frozen=True, eq=False)
class Figures:
    """The figures of one adapter. `kin` is equal for comparable adapters: of one base, updating the same layers.

    By layer, sorted by path and NaN for an update of zero: `log_norm_L`, the log of the Frobenius norm, and `dominance_L`,
    the logit of the largest singular value's share in the sum of squares. `code` has the signs of a random sketch of the
    whole update: two adapters' codes differ in a share of angle / pi of their bits.
    """

    kin: str
    layers: tuple[str, ...]
    log_norm_L: Array
    dominance_L: Array
    code: bytes

    def store(self, connection: Connection, name: str, content_hash: str) -> None:
        """Store or replace the figures of the adapter of that name."""
        (seq,) = connection.execute("SELECT seq FROM adapters WHERE name = ?", (name,)).fetchone()
        values = np.stack([self.log_norm_L, self.dominance_L]).astype("<f4").tobytes()
        connection.execute("DELETE FROM figures WHERE seq = ?", (seq,))
        connection.execute(
            f"INSERT INTO figures (seq, kin, hash, numbers, code, {', '.join(_PIECES)}) "
            f"VALUES (?, ?, ?, ?, ?, {', '.join('?' * NUM_PIECES)})",
            (seq, self.kin, content_hash, values, self.code, *_keys(self)),
        )


def figures_of(adapter: Adapter, base_model: str) -> Figures:
    """Return the figures of the low-rank updates; gains, biases, magnitudes and heads are left out."""
    layers = {name: algebra.within_sides(adapter.layers[name]) for name in sorted(adapter.layers)}
    names = tuple(layers)
    spectra_L2, sketch_K = np.full((len(names), 2), np.nan), torch.zeros(CODE_BITS)
    for places in _stacks(list(layers.values())):
        a_SRI = torch.stack([layers[names[place]].a_RI for place in places]).float()
        b_SRO = torch.stack([layers[names[place]].b_OR for place in places]).float().mT.contiguous()
        spectra_L2[places] = _spectra(b_SRO, a_SRI)
        sketch_K += _sketch(b_SRO, a_SRI, [names[place] for place in places])
    code = np.packbits(sketch_K.numpy() > 0).tobytes()
    return Figures(_kin(base_model, layers), names, spectra_L2[:, 0], spectra_L2[:, 1], code)


def hamming(left: bytes, right: bytes) -> int:
    """Return the number of bits in which two codes differ."""
    return (int.from_bytes(left) ^ int.from_bytes(right)).bit_count()


def _stacks(layers: Sequence[Factors]) -> Iterator[Sequence[int]]:
    """Yield lists of indices of layers with the same shape, small enough for one stack; layers of rank 0 are left out."""
    by_shape = defaultdict(list)
    for place, factors in enumerate(layers):
        if factors.rank:
            by_shape[factors.rank, factors.a_RI.shape[1], factors.b_OR.shape[0]].append(place)
    for (rank, *sides), places in by_shape.items():
        count = max(1, _STACK // (rank * max(sides)))
        for start in range(0, len(places), count):
            yield places[start : start + count]


def _spectra(b_SRO: Tensor, a_SRI: Tensor) -> Array:
    """Return (log norm, logit of the dominant share) of each layer of a stack."""
    (b_SRR, b_size_S), (a_SRR, a_size_S) = _gram(b_SRO), _gram(a_SRI)
    # the squares of the singular values of b a are the eigenvalues of (b^T b)(a a^T)
    root_SRR, failed_S = torch.linalg.cholesky_ex(b_SRR)
    if bool(failed_S.any()):
        # a layer whose rank is below its number of rows
        values_SR, vectors_SRR = torch.linalg.eigh(b_SRR)
        root_SRR = vectors_SRR * values_SR.clamp(min=0).sqrt()[:, None, :]
    squares_SR = torch.linalg.eigvalsh(root_SRR.mT @ a_SRR @ root_SRR).clamp(min=0).numpy()
    energy_S = np.where(squares_SR.sum(axis=1) > 0, squares_SR.sum(axis=1), np.nan)
    share_S = np.minimum(squares_SR[:, -1] / energy_S, _NEARLY_ALL)
    size_S = np.log(np.where(b_size_S, b_size_S, np.nan)) + np.log(np.where(a_size_S, a_size_S, np.nan))
    return np.stack([0.5 * np.log(energy_S) + size_S, np.log(share_S / (1 - share_S))], axis=1)


def _gram(rows_SRN: Tensor) -> tuple[Tensor, Array]:
    """Return (R R^T, s) of each of S matrices, R = rows / s; s, the largest absolute entry, prevents overflow."""
    size_S = rows_SRN.abs().amax(dim=(1, 2))
    scaled_SRN = rows_SRN / torch.where(size_S > 0, size_S, 1)[:, None, None]
    return (scaled_SRN @ scaled_SRN.mT).double(), size_S.double().numpy()


def _kin(base_model: str, layers: Mapping[str, Factors]) -> str:
    digest = hashlib.sha256(repr(base_model).encode())
    for name, factors in layers.items():
        digest.update(repr((name, factors.kind, factors.a_RI.shape[1], factors.b_OR.shape[0])).encode())
    return digest.hexdigest()[:32]


def _sketch(b_SRO: Tensor, a_SRI: Tensor, names: Sequence[str]) -> Tensor:
    """Return the sum over layers of +-u^T b a v for K fixed random pairs u, v; products of sketches estimate inner products.

    Layers of one shape share one matrix product.
    """
    left_SRK, right_SRK = (
        _fold(rows_SRN, side) @ _projection(side)[:, : rows_SRN.shape[2]].T for side, rows_SRN in enumerate((b_SRO, a_SRI))
    )
    signs_SK = torch.stack([_layer_signs(name) for name in names])
    return (signs_SK * (left_SRK * right_SRK).sum(dim=1)).sum(dim=0)


@lru_cache(maxsize=4096)
def _layer_signs(name: str) -> Tensor:
    bits_K = np.unpackbits(np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8))[:CODE_BITS]
    return torch.from_numpy(1 - 2 * bits_K.astype(np.float32))


def _fold(rows_SRN: Tensor, side: int) -> Tensor:
    """Return rows with entries beyond `_FOLD` added to earlier ones, with random signs to keep expected inner products."""
    size = rows_SRN.shape[2]
    if size <= _FOLD:
        return rows_SRN
    sign_N = torch.from_numpy(_signs(size, side))
    padded_SRN = torch.nn.functional.pad(rows_SRN * sign_N, (0, -size % _FOLD))
    return padded_SRN.reshape(*padded_SRN.shape[:2], -1, _FOLD).sum(dim=2)


@lru_cache(maxsize=2)
def _projection(side: int) -> Tensor:
    values_KN = np.random.Generator(np.random.Philox(key=side)).standard_normal((CODE_BITS, _FOLD), np.float32)
    return torch.from_numpy(values_KN)


@lru_cache(maxsize=16)
def _signs(size: int, side: int) -> Array:
    return np.random.Generator(np.random.Philox(key=2 + side)).integers(0, 2, size).astype(np.float32) * 2 - 1


def reference(connection: Connection, figures: Figures, content_hash: str) -> list[tuple[Array, Array]]:
    """Return (log norms, dominances) by layer of a sample of comparable adapters, none quarantined or of this content."""
    samples = connection.execute(
        "SELECT numbers FROM figures WHERE kin = ? AND hash <> ? "
        "AND NOT EXISTS (SELECT 1 FROM quarantine WHERE quarantine.seq = figures.seq) "
        f"ORDER BY hash LIMIT {NUM_REFERENCE}",
        (figures.kin, content_hash),
    ).fetchall()
    expected = 8 * len(figures.layers)
    # rows of another size come from a damaged page: they are skipped
    arrays = [np.frombuffer(bytes(data), "<f4").reshape(2, -1).astype(float) for (data,) in samples if len(data) == expected]
    return [(array[0], array[1]) for array in arrays]


def alike(connection: Connection, figures: Figures, name: str) -> list[str]:
    """Return the names of other adapters whose sketches are near the given figures', nearest first."""
    distances: dict[str, int] = {}
    for piece, key in zip(_PIECES, _keys(figures), strict=True):
        neighbours = connection.execute(
            f"SELECT adapters.name, figures.code FROM figures JOIN adapters ON adapters.seq = figures.seq "
            f"WHERE figures.{piece} = ? AND figures.kin = ? LIMIT {MAX_LOOKED_AT}",
            (key, figures.kin),
        ).fetchall()
        distances.update({other: hamming(bytes(code), figures.code) for other, code in neighbours if other != name})
    near = [other for other, distance in distances.items() if distance <= MAX_DISTANCE]
    return sorted(near, key=lambda other: (distances[other], other))


def _keys(figures: Figures) -> list[int]:
    """Return signed 64-bit hashes of each piece of the sketch's `code` with `kin`: an index to look up near codes."""
    keys = []
    for number in range(NUM_PIECES):
        piece = figures.code[number * _PIECE_BYTES : (number + 1) * _PIECE_BYTES]
        digest = hashlib.sha256(f"{figures.kin} {number} {piece.hex()}".encode()).digest()
        keys.append(int.from_bytes(digest[:8], signed=True))
    return keys
