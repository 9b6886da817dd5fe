"""Fault models: what one trial of a campaign does to the weight memory.

    model = parse("ber:1e-4")
    flips = model.sample(space, trial_rng(seed, trial))    # a Flips
    drawn = model.trial(space, seed, trial)                # the same, with what the tables need

A model draws locations, distinct integers in [0, N); everything else (its name, its argument, checks,
resolving against the golden memory, the flips) is the base class's. `MODELS` is the table of them; to
add one, see docs/adding-a-fault-model.md.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from resq_deploy._draws import below, bernoulli, distinct, trial_rng, words
from resq_deploy.errors import FaultError
from resq_deploy.faults import FaultSpace, Flips

__all__ = ["MODELS", "Drawn", "FaultModel", "parse", "register", "trial_rng", "usage"]

Locations = NDArray[np.int64]
Takes = Literal["nothing", "count", "rate", "count or rate"]

_EXAMPLE = {"count": "4", "rate": "1e-4", "count or rate": "1e-4"}
_ATTRIBUTED = (
    4096  # locations of one trial up to which it is asked whether they share a layer or a bit
)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """One trial: the flips, and how many locations were drawn (more than flips, where a stuck bit already was so).

    `layer`, `bit`: what all drawn locations share, None where they share none or are several events.
    """

    flips: Flips
    locations: int
    layer: str | None = None
    bit: int | None = None


class FaultModel(ABC):
    """Base of every fault model: a subclass names itself in `word`, says what it `takes`, and writes `draw`.

    `event`: a trial is one event at one place, however many bits it flips; where it is several, the tables by layer
    and bit leave it out unless only one location was drawn. `argument` is what stands behind the colon: None, a count
    (int >= 1) or a rate (float in (0, 1)).
    """

    word: ClassVar[str]
    about: ClassVar[str]
    takes: ClassVar[Takes] = "nothing"
    needs: ClassVar[bool] = True  # whether the argument has to be given
    event: ClassVar[bool] = True

    def __init__(self, argument: int | float | None = None) -> None:
        self.argument = argument

    @abstractmethod
    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        """The locations that one trial hits: int64, distinct. All randomness comes from `rng`'s raw words."""

    def check(self, space: FaultSpace) -> None:
        """Raise FaultError where this space cannot hold the fault."""
        if isinstance(self.argument, int) and self.argument > space.size:
            raise FaultError(f"{self.name} in a fault space of {space.size} bits")

    def effective(self, space: FaultSpace, locations: Locations) -> Locations:
        """Those of the drawn locations that differ from the golden memory; all of them, unless a model says else."""
        return locations

    def different(self, space: FaultSpace) -> int | None:
        """How many different trials there can be, None where there are more than anyone runs."""
        return self.length

    @property
    def length(self) -> int | None:
        """How many trials there are (a fault list), None for no end."""
        return None

    @property
    def name(self) -> str:
        """The text that `parse` reads back: `seu`, `mbu:4`, `ber:0.0001`."""
        if self.argument is None:
            return self.word
        short = f"{self.argument:g}"
        return f"{self.word}:{short if float(short) == self.argument else repr(self.argument)}"

    @final
    def sample(self, space: FaultSpace, rng: np.random.Generator) -> Flips:
        """The flips of one trial. Raises FaultError where the space cannot hold the fault."""
        self.check(space)
        return space.flips(self.effective(space, self.draw(space, rng)))

    def trial(self, space: FaultSpace, seed: int, trial: int) -> Drawn:
        """Trial number `trial` of seed `seed`: the same on every machine, however trials are split among workers."""
        locations = self.draw(space, trial_rng(seed, trial))
        flips = space.flips(self.effective(space, locations))
        alone = self.event or locations.size == 1
        return Drawn(flips, locations.size, *(_shared(space, locations) if alone else (None, None)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FaultModel) and (type(self), self.name) == (
            type(other),
            other.name,
        )

    def __hash__(self) -> int:
        return hash((type(self), self.name))

    def __repr__(self) -> str:
        return f"<fault model {self.name}>"


MODELS: dict[str, type[FaultModel]] = {}

M = TypeVar("M", bound=type[FaultModel])


def register(model: M) -> M:
    """Put a fault model into the table, under its word. Raises FaultError where the word is taken."""
    if MODELS.setdefault(model.word, model) is not model:
        raise FaultError(f"two fault models are called {model.word!r}")
    return model


def parse(text: str) -> FaultModel:
    """`seu`, `bits:10`, `ber:1e-4`, `mbu:4`, `stuck-at-1`, ... to the model. Raises FaultError with what there is."""
    word, colon, argument = text.strip().partition(":")
    model = MODELS.get(word.lower())
    if model is None:
        near = difflib.get_close_matches(word.lower(), MODELS, 1, 0.0) or ["seu"]
        known = ", ".join(_form(m) for m in MODELS.values())
        raise FaultError(
            f"unknown fault model {text!r}, did you mean {near[0]!r}?", f"one of: {known}"
        )
    if not colon:
        if model.takes != "nothing" and model.needs:
            raise FaultError(f"{word} needs a {model.takes}", f"such as {_form(model)}")
        return model()
    if model.takes == "nothing":
        raise FaultError(f"{word} takes no argument, {argument!r} given")
    return model(_argument(model, argument))


def usage() -> tuple[tuple[str, str], ...]:
    """(form, meaning) of every model, for help texts."""
    return tuple((_form(model), model.about) for model in MODELS.values())


def _form(model: type[FaultModel]) -> str:
    if model.takes == "nothing":
        return model.word
    tail = f":{_EXAMPLE[model.takes]}"
    return model.word + (tail if model.needs else f"[{tail}]")


def _argument(model: type[FaultModel], text: str) -> int | float:
    takes, example = model.takes, f"such as {_form(model)}"
    try:
        value = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        value = math.nan
    if "count" in takes and value >= 1 and value == int(min(value, 2**62)):
        return int(value)
    if "rate" in takes and 0 < value < 1:
        return value
    rule = {"count": "a whole number from 1 on", "rate": "between 0 and 1 (both excluded)"}
    want = " or ".join(rule[part] for part in takes.split(" or "))
    raise FaultError(f"{model.word}:{text[:40]}: {want} is needed", example)


def _shared(space: FaultSpace, locations: Locations) -> tuple[str | None, int | None]:
    if not 0 < locations.size <= _ATTRIBUTED:
        return None, None
    tensor, _, bit = space.locate(locations)
    layers = {space.memories[index].layer for index in set(tensor.tolist())}
    bits = set(bit.tolist())
    return layers.pop() if len(layers) == 1 else None, bits.pop() if len(bits) == 1 else None


@register
class SingleBit(FaultModel):
    """One bit, uniform over the fault space."""

    word, about = "seu", "single-event upset: one bit, uniform over the fault space"

    def different(self, space: FaultSpace) -> int | None:
        return space.size

    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        return below(rng, space.size, 1)


@register
class RandomBits(FaultModel):
    """K different bits, uniform over the fault space."""

    word, about, takes = "bits", "so many different bits, uniform over the fault space", "count"
    event = False

    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        return distinct(rng, space.size, _count(self))


@register
class BitErrorRate(FaultModel):
    """Each bit of the fault space independently with probability P."""

    word, about, takes = "ber", "bit error rate: each bit independently with this chance", "rate"
    event = False

    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        return bernoulli(rng, space.size, _rate(self))


@register
class AdjacentBits(FaultModel):
    """M bits that are neighbours in memory: LSB to MSB, then the next element; never across two tensors.

    With a filter by bit position, neighbours among the bits that are left: bit 7 of M successive
    elements, as in memory that interleaves words.
    """

    word, about, takes = "mbu", "multiple-bit upset: so many bits adjacent in memory", "count"

    def check(self, space: FaultSpace) -> None:
        if not self._starts(space).any():
            raise FaultError(f"{self.name}: no tensor has {self.argument} adjacent bits")

    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        starts = np.cumsum(self._starts(space))
        place = int(below(rng, int(starts[-1]), 1)[0])
        tensor = int(np.searchsorted(starts, place, side="right"))
        before = int(space.sizes()[:tensor].sum())
        offset = place - (int(starts[tensor - 1]) if tensor else 0)
        first = before + offset
        found: Locations = np.arange(first, first + _count(self), dtype=np.int64)
        return found

    def different(self, space: FaultSpace) -> int | None:
        return int(self._starts(space).sum())

    def _starts(self, space: FaultSpace) -> Locations:
        fitting: Locations = np.maximum(space.sizes() - _count(self) + 1, 0)
        return fitting


class StuckAt(FaultModel):
    """Bits that can hold one value only; where golden memory has that value already, nothing changes."""

    takes, needs, event = "count or rate", False, False
    held: ClassVar[int]

    def different(self, space: FaultSpace) -> int | None:
        return space.size if self.argument in (None, 1) else None

    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        if isinstance(self.argument, float):
            return bernoulli(rng, space.size, self.argument)
        return distinct(rng, space.size, self.argument or 1)

    def effective(self, space: FaultSpace, locations: Locations) -> Locations:
        changed: Locations = locations[space.values(locations) != self.held]
        return changed


@register
class StuckAtZero(StuckAt):
    """Bits stuck at 0: one, so many, or each with this chance."""

    word, about, held = "stuck-at-0", "bits stuck at 0: one, so many, or each with a chance", 0


@register
class StuckAtOne(StuckAt):
    """Bits stuck at 1: one, so many, or each with this chance."""

    word, about, held = "stuck-at-1", "bits stuck at 1: one, so many, or each with a chance", 1


class Block(FaultModel):
    """An aligned block of bytes takes another value, any of the others with the same chance.

    The block is that of a uniformly drawn location, so each whole block has the same chance; with a
    filter by bit position only the bits that are left change.
    """

    size: ClassVar[int]

    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        block = space.block(int(below(rng, space.size, 1)[0]), self.size)
        lanes = np.arange(block.size, dtype=np.uint64)
        while True:
            chosen = (words(rng, 1) >> lanes) & np.uint64(1)
            if chosen.any():
                hit: Locations = block[chosen.astype(bool)]
                return hit


@register
class WholeByte(Block):
    """One byte takes another value."""

    word, about, size = "byte", "one byte of memory takes another value", 1


@register
class WholeWord(Block):
    """One aligned 32-bit word takes another value."""

    word, about, size = "word", "one aligned 32-bit word of memory takes another value", 4


def _count(model: FaultModel) -> int:
    if not isinstance(model.argument, int) or model.argument < 1:
        raise FaultError(f"{model.word} needs a whole number from 1 on, got {model.argument!r}")
    return model.argument


def _rate(model: FaultModel) -> float:
    if not isinstance(model.argument, float) or not 0 < model.argument < 1:
        raise FaultError(
            f"{model.word} needs a rate between 0 and 1 (both excluded), got {model.argument!r}"
        )
    return model.argument
