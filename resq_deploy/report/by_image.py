"""How often each image was right: what a comparison of two reports on the same images needs."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from resq_deploy.paired import KEPT, Spread


class ByImage(BaseModel):
    """Of one figure: in how many of `trials` each of `count` images was right; one trial where no faults were drawn.

    `images`: sha256 (hex) of the images' places in their sample, of their labels and of their pixels before any attack:
    equal ones are the same images. `right`: base64 of one whole number an image, in as few bytes (little-endian: 1, 2,
    4 or 8) as `trials` takes; of one bit an image, the first the highest, where there is one trial. `variance`: of the
    figure by the draw of the faults, with `freedom` degrees of freedom; both 0 where none were drawn. `by_trial`:
    base64 of how many images were right in each of the first 4,096 trials, in as few bytes as `count` takes; empty
    where no faults were drawn, and where some trials count for nothing, so that the others have lost their numbers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    images: str = Field(pattern=r"^[0-9a-f]{64}$")
    count: int = Field(ge=1, le=2**31)
    trials: int = Field(ge=1, le=2**53)
    right: str
    variance: float = Field(default=0.0, ge=0.0, le=1.0)
    freedom: int = Field(default=0, ge=0)
    by_trial: str = ""

    @classmethod
    def of(
        cls,
        images: str,
        right: NDArray[np.integer | np.bool_],
        trials: int = 1,
        spread: Spread | None = None,
        by_trial: Sequence[int] = (),
    ) -> ByImage:
        """From the counts themselves, [images]; `spread` None: no faults were drawn."""
        by_faults = spread or Spread()
        return cls(
            images=images,
            count=right.size,
            trials=trials,
            right=_encoded(right, trials),
            variance=by_faults.variance,
            freedom=by_faults.freedom,
            by_trial=_text(np.array(by_trial[:KEPT]).astype(_type(right.size))),
        )

    @property
    def counts(self) -> NDArray[np.int64]:
        """Trials in which each image was right, int64 [count]."""
        return _decoded(self.right, self.count, self.trials)

    @property
    def shares(self) -> NDArray[np.float64]:
        """Share of the trials in which each image was right, float64 [count]."""
        return self.counts / self.trials

    @property
    def trial_shares(self) -> NDArray[np.float64]:
        """Share of the images that were right in each trial that is kept one by one, float64."""
        return self._hits / self.count

    @property
    def mean(self) -> float:
        """Mean of the shares: the figure itself."""
        return int(self.counts.sum()) / (self.count * self.trials)

    @property
    def spread(self) -> Spread:
        """What the draw of the faults adds to the variance of a difference."""
        return Spread(self.variance, self.freedom)

    @model_validator(mode="after")
    def _fits(self) -> ByImage:
        counts = self.counts
        inside = int(counts.min()) >= 0 and int(counts.max()) <= self.trials
        if not inside or _encoded(counts, self.trials) != self.right:
            raise ValueError(f"no counts of {self.count} images in {self.trials} trials")
        if (self.variance > 0) > (self.freedom > 0):
            raise ValueError("a variance of no degrees of freedom")
        hits = self._hits
        if hits.size > min(self.trials, KEPT) or (hits > self.count).any():
            raise ValueError(f"no counts of {self.trials} trials of {self.count} images")
        return self

    @property
    def _hits(self) -> NDArray[np.int64]:
        content, kind = base64.b64decode(self.by_trial, validate=True), _type(self.count)
        if len(content) % kind.itemsize:
            raise ValueError(f"by_trial ends in the midst of a number of {kind.itemsize} bytes")
        return np.frombuffer(content, kind).astype(np.int64)


def _encoded(counts: NDArray[np.integer | np.bool_], trials: int) -> str:
    return _text(np.packbits(counts > 0) if trials == 1 else counts.astype(_type(trials)))


def _text(numbers: NDArray[np.integer]) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _decoded(text: str, count: int, trials: int) -> NDArray[np.int64]:
    content = base64.b64decode(text, validate=True)
    width = _type(trials).itemsize
    if len(content) != (-(-count // 8) if trials == 1 else count * width):
        raise ValueError(f"{len(content)} bytes for {count} images in {trials} trials")
    if trials == 1:
        return np.unpackbits(np.frombuffer(content, np.uint8), count=count).astype(np.int64)
    return np.frombuffer(content, _type(trials)).astype(np.int64)


def _type(trials: int) -> np.dtype[np.unsignedinteger]:
    return np.min_scalar_type(trials).newbyteorder("<")
