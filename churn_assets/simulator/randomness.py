"""Counter-based random numbers: any draw of any customer can be made without the draws before it.

Every customer has one SplitMix64 sequence a purpose (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), and a draw is addressed by its place in it. The bits
do not depend on numpy's own generators, whose streams may change between versions.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_SHIFT_30, _SHIFT_27, _SHIFT_31 = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LOW_32 = np.uint64(0xFFFFFFFF)
_HIGH_32 = np.uint64(32)
_UNIT_32 = 2.0**-32
_UNIT_53 = 2.0**-53


def sequences(seed: int, purpose: str, numbers: np.ndarray) -> np.ndarray:
    """The state (uint64, shape of `numbers`) of one sequence per number, for one purpose."""
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    key = np.uint64(int.from_bytes(digest, "little"))
    states = numbers.astype(np.uint64)
    states *= _GAMMA
    states += key
    return _mix(states)


def bits(states: np.ndarray, places: np.ndarray | int = 0) -> np.ndarray:
    """The 64 random bits at `places` (whole numbers, may be negative) of the sequences `states`."""
    counters = np.atleast_1d(places).astype(np.int64).view(np.uint64) + np.uint64(1)
    return _mix(states + counters * _GAMMA)


def uniform(random_bits: np.ndarray) -> np.ndarray:
    """Uniform on the open interval (0, 1), from all 64 bits."""
    return ((random_bits >> np.uint64(11)).astype(np.float64) + 0.5) * _UNIT_53


def uniform_pair(random_bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent uniforms on (0, 1), from the high and the low 32 bits."""
    high = ((random_bits >> _HIGH_32).astype(np.float64) + 0.5) * _UNIT_32
    low = ((random_bits & _LOW_32).astype(np.float64) + 0.5) * _UNIT_32
    return high, low


def normal(random_bits: np.ndarray) -> np.ndarray:
    """Standard normal, by Box and Muller's transformation of the two halves of the bits."""
    radius, angle = uniform_pair(random_bits)
    return np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> _SHIFT_30)
    x *= _FACTOR_1
    x ^= x >> _SHIFT_27
    x *= _FACTOR_2
    x ^= x >> _SHIFT_31
    return x
