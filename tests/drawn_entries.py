"""The 16 bits that each entry of an update draws, one by one, for methods that drop entries at random."""

from __future__ import annotations


def splitmix64(seed: int, number: int) -> list[int]:
    """Steele, Lea and Flood 2014, as Java's SplittableRandom has it."""
    words = []
    for place in range(1, number + 1):
        z = (seed + place * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        words.append(z ^ (z >> 31))
    return words


def drawn(seed: int, size: int, part: int) -> list[int]:
    """16 bits for each entry, from the stream of that seed; a bias has that of the seed plus 2^63."""
    words = splitmix64(seed + part * 2**63, (size + 3) // 4)
    return [(word >> 16 * k) & 0xFFFF for word in words for k in range(4)][:size]
