"""Random integers that are the same on every machine and in every version of numpy.

numpy promises stable streams for SeedSequence and for the raw output of a bit generator, and none for
the distributions of Generator. So everything here is made of raw 64-bit words, by integer arithmetic
and by single IEEE operations that round alike everywhere (no libm, no SIMD logarithm).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_LN2 = 0.6931471805599453
_TERMS = 12  # of the atanh series: 0.0295^12 / 25 is far below 2^-53


def trial_rng(seed: int, trial: int) -> np.random.Generator:
    """The generator of trial `trial` (>= 0) of seed `seed` (>= 0), whoever runs it and in whatever order."""
    sequence = np.random.SeedSequence(seed, spawn_key=(trial,))
    return np.random.Generator(np.random.PCG64(sequence))


def words(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """The next `count` raw 64-bit words."""
    return np.asarray(rng.bit_generator.random_raw(count), dtype=np.uint64)


def below(rng: np.random.Generator, bound: int, count: int) -> NDArray[np.int64]:
    """`count` independent integers, uniform in [0, bound), by rejection: no modulo bias."""
    mask = np.uint64((1 << (bound - 1).bit_length()) - 1)
    found = np.empty(0, dtype=np.int64)
    while found.size < count:
        drawn = (words(rng, 2 * (count - found.size)) & mask).astype(np.int64)
        found = np.concatenate([found, drawn[drawn < bound]])
    return found[:count]


def distinct(rng: np.random.Generator, bound: int, count: int) -> NDArray[np.int64]:
    """A uniformly drawn set of `count` of the integers in [0, bound), ascending; needs count <= bound."""
    if 3 * count > bound:
        keys = words(rng, bound)
        return np.sort(np.argsort(keys, kind="stable")[:count]).astype(np.int64)
    found = below(rng, bound, count)
    while True:
        values, first = np.unique(found, return_index=True)
        if values.size >= count:
            return np.sort(found[np.sort(first)[:count]])
        found = np.concatenate([found, below(rng, bound, count - values.size)])


def bernoulli(rng: np.random.Generator, bound: int, rate: float) -> NDArray[np.int64]:
    """The integers in [0, bound) that come up when each does so independently with probability `rate`, ascending.

    Draws the gaps between them, floor(log U / log(1 - rate)), so that work and memory grow with what
    comes up and not with `bound`. (Devroye, Non-Uniform Random Variate Generation, 1986, section X.2)
    """
    scale = _log1m(rate)
    found: list[NDArray[np.int64]] = []
    last = -1
    while last < bound:
        left = bound - 1 - last
        count = int(left * rate + 6 * (left * rate) ** 0.5) + 8
        uniform = ((words(rng, count) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        gaps = np.minimum(np.floor(_log(uniform) / scale), float(bound)).astype(np.int64)
        positions = last + np.cumsum(gaps + 1)
        found.append(positions)
        last = int(positions[-1])
    merged = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    return merged[: int(np.searchsorted(merged, bound))]


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of values in (0, 1], within 2 units in the last place, by additions and multiplications."""
    mantissa, exponent = np.frexp(values)
    small = mantissa < 0.7071067811865476
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    exponent = exponent - small
    return _atanh2((mantissa - 1.0) / (mantissa + 1.0)) + exponent * _LN2


def _log1m(rate: float) -> float:
    """log(1 - rate), exact also for small rates."""
    if rate > 0.25:
        return float(_log(np.array([1.0 - rate]))[0])
    return float(_atanh2(np.array([-rate / (2.0 - rate)]))[0])


def _atanh2(s: NDArray[np.float64]) -> NDArray[np.float64]:
    """2 atanh(s) = log((1 + s) / (1 - s)) for |s| <= 0.172, by its power series."""
    z = s * s
    total = np.full_like(s, 1.0 / (2 * _TERMS + 1))
    for k in range(_TERMS - 1, -1, -1):
        total = total * z + 1.0 / (2 * k + 1)
    return 2.0 * s * total
