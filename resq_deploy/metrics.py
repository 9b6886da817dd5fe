"""Outcomes and accuracies: what a run of the deployed network is compared by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


def top1(logits: Logits) -> NDArray[np.int64]:
    """Index of the largest logit of each row, int64 [B]; the first of equals; -1 where a row holds a NaN."""
    best: NDArray[np.int64] = np.argmax(logits, axis=1).astype(np.int64)
    best[np.isnan(logits).any(axis=1)] = -1
    return best


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Share of rows whose top-1 is the label, in [0, 1]; a NaN row counts as wrong."""
    return float(np.mean(top1(logits) == labels))


def agreement(a: Logits, b: Logits) -> float:
    """Share of rows on which two networks have the same top-1, in [0, 1]."""
    return float(np.mean(top1(a) == top1(b)))


def sqnr_db(reference: NDArray[np.floating], approximate: NDArray[np.floating]) -> float:
    """Signal-to-quantization-noise ratio in dB, 10 log10(sum r^2 / sum (r - a)^2); 200 where there is no noise."""
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(reference.astype(np.float64) - approximate)))
    if noise <= signal * 1e-20:
        return 200.0
    return float(10 * np.log10(max(signal, 1e-300) / noise))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one faulty run did, image by image, against the golden run (counts out of `images`).

    masked: logits bit-identical; sdc1: top-1 changed; sdc5: the golden top-1 left the top 5;
    critical: a right answer became wrong; due: a NaN or infinity in the logits (a detectable,
    unrecoverable error). `correct`: top-1 is the label. `changed`: which images became right or wrong, see `packed`.
    """

    images: int
    correct: int
    masked: int
    sdc1: int
    sdc5: int
    critical: int
    due: int
    changed: bytes = b""


def classify(
    golden: Logits, faulty: Logits, labels: NDArray[np.int64], versions: int = 1
) -> Outcome:
    """Compare a faulty run with the golden run of the same images; both float32 [B, classes].

    `versions`: the batch is so many blocks of the same B / versions images, each altered otherwise. An image is then
    right or masked where all its versions are, and corrupted where any is.
    """
    before, after = top1(golden), top1(faulty)
    right = after == labels
    same = (golden.view(np.uint32) == faulty.view(np.uint32)).all(axis=1)
    broken = ~np.isfinite(faulty).all(axis=1)
    stood, stands = (x.reshape(versions, -1).all(axis=0) for x in (before == labels, right))

    def any_of(rows: Any) -> int:
        return int(rows.reshape(versions, -1).any(axis=0).sum())

    return Outcome(
        images=labels.size // versions,
        correct=int(stands.sum()),
        masked=int(same.reshape(versions, -1).all(axis=0).sum()),
        sdc1=any_of(before != after),
        sdc5=any_of(~_in_top5(faulty, before)),
        critical=int((stood & ~stands).sum()),
        due=any_of(broken),
        changed=packed(stood != stands),
    )


def right(logits: Logits, labels: NDArray[np.int64], versions: int = 1) -> NDArray[np.bool_]:
    """Which images are right in all versions, bool [B / versions]; logits float32 [B, classes], labels int64 [B]."""
    stands: NDArray[np.bool_] = (top1(logits) == labels).reshape(versions, -1).all(axis=0)
    return stands


def packed(flags: NDArray[np.bool_]) -> bytes:
    """Flags, bool [N], as at most N / 8 bytes, the first flag the highest bit; zero bytes at the end are left out."""
    return np.packbits(flags).tobytes().rstrip(b"\0")


def unpacked(content: bytes, count: int) -> NDArray[np.bool_]:
    """What `packed` made of `count` flags, bool [count]. Raises ValueError where there are more bytes than that."""
    size = -(-count // 8)
    if len(content) > size:
        raise ValueError(f"{len(content)} bytes for {count} flags")
    whole = np.frombuffer(content.ljust(size, b"\0"), np.uint8)
    return np.unpackbits(whole, count=count).view(np.bool_)


def _in_top5(logits: Logits, wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    rows = np.arange(len(logits))
    value = logits[rows, np.maximum(wanted, 0)]
    with np.errstate(invalid="ignore"):
        ahead = (logits > value[:, None]).sum(axis=1)
    inside: NDArray[np.bool_] = (ahead < 5) & ~np.isnan(value)
    return inside
