"""Inputs crafted against faulty memory, replayed with the very same faults: both threats at their worst.

Campaigns on adversarial inputs flip bits under inputs that were crafted for golden memory, and such inputs grow
weaker as faults move the network away from where they aimed. An attacker who knows which bits flipped aims again.
`resq-export --attack-faulty` stores what that attacker finds for some draws of faults; here the same draws are made,
checked against what the bundle says of them, and put into the artifact's memory. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from resq_deploy.bundle import Bundle, Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import AttackError
from resq_deploy.fault_models import parse
from resq_deploy.faults import FaultSpace, Flips
from resq_deploy.manifest import Attack, FaultyMemory
from resq_deploy.metrics import Logits, top1
from resq_deploy.paired import drawn
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.model import Figure, JointAttack
from resq_deploy.runtime import attacks, crossed, evidence
from resq_deploy.runtime.images import images_key
from resq_deploy.runtime.runner import Runner
from resq_deploy.runtime.trials import PlainEngine, check_golden, is_outcome, reach
from resq_deploy.statistics import Estimate

Moved = NDArray[np.float32]  # [trials, N, C, H, W]


@dataclass(frozen=True, slots=True)
class JointTrial:
    """Images of one trial that are right on the faulty artifact, out of `images`.

    `clean`: unattacked; `unaware`: under inputs crafted for the golden network; `aware`: crafted for this faulty one.
    An attacked image counts as right only where the same image is right unattacked.
    """

    images: int
    clean: int
    unaware: int
    aware: int


@dataclass(frozen=True, slots=True)
class JointResult:
    """All trials, and the mean shares; intervals count images and trials as drawn (crossed.py).

    `flips`: bits that were flipped, over all trials; `unreachable`: bits that the engine could not flip; `failed`:
    trials in which the engine gave no answer, so that every image counts as wrong. `right`: int64 [images], trials in
    which each image is right under `aware`.
    """

    trials: tuple[JointTrial, ...]
    flips: int
    unreachable: int
    failed: int
    clean: Estimate
    unaware: Estimate
    aware: Estimate
    right: NDArray[np.int64]


def figure_name(spec: Attack) -> str:
    """The figure of inputs that know the faults: `robust@pgd,eps=8/255,aware@ber=1e-3`."""
    memory = _memory(spec)
    base = attacks.figure_name(spec.attack, spec.eps, spec.norm)
    return f"{base},aware@{evidence.fault_label(memory.model)}"


def sets(bundle: Bundle, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Stored sets that were crafted against faulty memory, by one of these attacks (None: by any)."""
    found = bundle.manifest.attacks.items()
    return tuple(
        name
        for name, a in found
        if a.faulty is not None and (names is None or a.attack in names or name in names)
    )


def stored(bundle: Bundle, name: str) -> tuple[Sample, Moved, Attack]:
    """The originals [N], the inputs crafted for each trial [trials, N, C, H, W], and what made them; checked.

    Raises as attacks.stored does, and AttackError where the trials are not all on the same images.
    """
    clean, moved, spec = attacks.stored(bundle, name)
    trials = _memory(spec).trials
    each, rest = divmod(len(moved), trials)
    same = rest == 0 and (moved.indices.reshape(trials, -1) == moved.indices[:each]).all()
    if not same:
        raise AttackError(
            f"the attack {name!r} in {bundle.path} is not the same images in each of its {trials} trials",
            "craft it again with resq-export",
        )
    return clean.take(each), moved.images.reshape(trials, each, *moved.images.shape[1:]), spec


def draw(memory: FaultyMemory, space: FaultSpace) -> Iterator[Flips]:
    """The faults that inputs were crafted for, drawn again. Raises AttackError where they are others."""
    model, part = parse(memory.model), space.select(memory.where)
    model.check(part)
    for number, digest in enumerate(memory.flips):
        flips = model.trial(part, memory.seed, number).flips
        if flips.digest()[:16] != digest:
            raise AttackError(
                f"trial {number} of {memory.model} is not the fault that inputs were crafted for",
                "craft them again with resq-export",
            )
        yield flips


def evaluate(
    runner: Runner,
    bundle: Bundle,
    name: str,
    *,
    confidence: float = 0.95,
    reporter: Reporter | None = None,
) -> JointAttack:
    """Replay a stored set under its faults. Raises AttackError, BundleError, FaultError."""
    return replay(runner, bundle, name, confidence=confidence, reporter=reporter)[0]


def replay(
    runner: Runner,
    bundle: Bundle,
    name: str,
    *,
    confidence: float = 0.95,
    reporter: Reporter | None = None,
) -> tuple[JointAttack, ByImage | None]:
    """What `evaluate` says, and how often each image stood; None for a single draw, which says nothing of others."""
    clean, aware, spec = stored(bundle, name)
    memory = _memory(spec)
    faults = list(draw(memory, runner.space))
    unaware = _unaware(bundle, spec, clean)
    found = measure(
        runner, clean, unaware, aware, faults, confidence=confidence, reporter=reporter, title=name
    )
    shares = {share: Figure(**asdict(getattr(found, share))) for share in ("clean", "aware")}
    known = Figure(**asdict(found.unaware)) if unaware is not None else None
    hits = [trial.aware for trial in found.trials]
    spread = drawn(np.array(hits) / len(clean))
    key, right = images_key(clean), found.right
    kept = ByImage.of(key, right, len(faults), spread, hits) if spread else None
    attack = JointAttack(
        name=name,
        attack=spec.attack,
        norm=spec.norm,
        eps=spec.eps,
        crafted_through=spec.crafted_through,
        fault=evidence.fault_label(memory.model),
        where={"where": list(memory.where)},
        trials=len(faults),
        images=len(clean),
        flips=found.flips,
        unreachable=found.unreachable,
        failed=found.failed,
        unaware=known,
        parameters=dict(spec.parameters),
        **shares,
    )
    return attack, kept


def measure(
    runner: Runner,
    sample: Sample,
    unaware: NDArray[np.float32] | None,
    aware: Iterable[NDArray[np.float32]],
    faults: Sequence[Flips],
    *,
    confidence: float = 0.95,
    reporter: Reporter | None = None,
    title: str = "attacks that know the faults",
) -> JointResult:
    """Run originals and both kinds of inputs with each trial's faults in memory; `unaware` None: originals instead.

    Raises EngineLost where the engine fails under faults and does not answer as before without them.
    """
    plain = sample.images if unaware is None else unaware
    engine = PlainEngine(runner, sample.images)
    golden = engine.golden()
    done = []
    flipped = lost = failed = 0
    with (reporter or Reporter()).task(title, len(faults), "trials") as task:
        for number, (flips, known) in enumerate(zip(faults, aware, strict=True)):
            reached, missing = reach(engine, flips)
            flipped, lost = flipped + reached.count, lost + missing
            answers = _answers(runner, reached, (sample.images, plain, known))
            if answers is None:
                failed += 1
                check_golden(engine, golden, number, "see what the device says of it")
                answers = [np.full_like(golden, np.nan)] * 3
            right, both, all_three = (top1(logits) == sample.labels for logits in answers)
            done.append((right, right & both, right & all_three))
            task.advance(1)
    if not done:
        raise AttackError("no faults to attack under", "at least 2 trials")
    hits = np.array(done)  # [trials, 3, images]
    clean, stood, known_too = (
        crossed.share(hits[:, i], confidence, sampled_rows=True) for i in range(3)
    )
    return JointResult(
        tuple(JointTrial(len(sample), *map(int, trial)) for trial in hits.sum(axis=2)),
        flipped,
        lost,
        failed,
        clean,
        stood,
        known_too,
        hits[:, 2].sum(axis=0),
    )


def _answers(
    runner: Runner, flips: Flips, batches: Iterable[NDArray[np.float32]]
) -> list[Logits] | None:
    """Logits with these bits flipped; None where the engine fails at it."""
    try:
        with runner.faults(flips):
            return [runner(images) for images in batches]
    except Exception as error:
        if not is_outcome(error):
            raise
        return None


def _memory(spec: Attack) -> FaultyMemory:
    if spec.faulty is None:
        raise AttackError(f"{spec.attack} was not crafted against faulty memory")
    return spec.faulty


def _unaware(bundle: Bundle, spec: Attack, clean: Sample) -> NDArray[np.float32] | None:
    """The same attack on the same images, crafted for golden memory; None where the bundle has none."""
    for name, other in attacks.plain(bundle).items():
        if (other.attack, other.norm, other.eps) == (spec.attack, spec.norm, spec.eps):
            _, moved, _ = attacks.stored(bundle, name)
            place = {int(index): row for row, index in enumerate(moved.indices)}
            rows = [place.get(int(index), -1) for index in clean.indices]
            if min(rows) >= 0:
                return moved.images[rows]
    return None
