"""Attacks on the artifact: stored adversarial inputs replayed, black boxes run afresh, the worst case over both.

    attacked = evaluate(runner, bundle, ["pgd", "square"], eps=8 / 255)
    attacked[0].robust                      # bool [N]: right before the attack, and under it
    worst_case(attacked)                    # per image, over all attacks
    sanity.check(runner, bundle, attacked)  # what makes one doubt the figures, in sentences

An image counts as robust where the artifact is right about the original and about the adversarial input: both lie in
the ball that the attacker may choose from. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from resq_deploy.budget import (
    BLACK_BOX,
    Budget,
    Norm,
    check_budget,
    format_eps,
    parse_attack,
)
from resq_deploy.bundle import INT8, Bundle, Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import AttackError
from resq_deploy.manifest import Attack
from resq_deploy.metrics import top1
from resq_deploy.report.model import AttackResult, Figure
from resq_deploy.runtime import blackbox
from resq_deploy.runtime.runner import Runner
from resq_deploy.statistics import wilson

DEFAULT_EPS = 8 / 255
WORST = "worst"


@dataclass(frozen=True, slots=True, eq=False)
class Attacked:
    """Adversarial inputs of one attack, and what the artifact made of them.

    `images`: float32 [N, C, H, W], of the originals `clean`; `right`, `right_attacked`: bool [N], top-1 is the label.
    """

    name: str
    spec: Attack
    clean: Sample
    images: NDArray[np.float32]
    right: NDArray[np.bool_]
    right_attacked: NDArray[np.bool_]
    warnings: tuple[str, ...] = ()

    @property
    def robust(self) -> NDArray[np.bool_]:
        """Right before the attack and under it, bool [N]."""
        return self.right & self.right_attacked

    @property
    def sample(self) -> Sample:
        """The adversarial inputs as a sample, for a fault campaign on them."""
        return Sample(self.images, self.clean.labels, self.clean.indices)

    @property
    def figure_name(self) -> str:
        """How figures name it: `robust@pgd,eps=8/255`."""
        return figure_name(self.name, self.spec.eps, self.spec.norm)

    @property
    def label(self) -> str:
        """How campaigns on it are named: `pgd,eps=8/255`."""
        return self.figure_name.removeprefix("robust@")


def figure_name(name: str, eps: float, norm: str = "linf") -> str:
    """The figure of an attack in requirements and reports: `robust@pgd,eps=8/255`, with `norm=l2` where it is that."""
    return f"robust@{name},eps={format_eps(eps)}" + ("" if norm == "linf" else f",norm={norm}")


def plain(bundle: Bundle) -> dict[str, Attack]:
    """Stored attacks that were crafted against golden memory; the others are faulty.py's."""
    return {name: a for name, a in bundle.manifest.attacks.items() if a.faulty is None}


def check_names(bundle: Bundle, names: Iterable[str]) -> None:
    """Raise AttackError unless each is a stored attack of this bundle or a black box; before any long work."""
    known = plain(bundle)
    for name in names:
        if name in known:
            continue
        if name in bundle.manifest.attacks:
            raise AttackError(
                f"{name} was crafted against faulty memory", "--joint runs it under its faults"
            )
        if parse_attack(name) not in BLACK_BOX:
            stored = ", ".join(known) or "none"
            raise AttackError(
                f"{name} needs gradients, and is not stored in {bundle.path}",
                f"stored: {stored}; craft it with resq-export, or choose {' or '.join(BLACK_BOX)}",
            )


def labels(
    bundle: Bundle, names: Sequence[str] | None = None, eps: float | None = None
) -> tuple[str, ...]:
    """Labels of the attacks that `evaluate` will run, and of their worst case. Raises AttackError for unknown ones."""
    known = plain(bundle)
    wanted = list(known) if names is None else list(names)
    check_names(bundle, wanted)
    own = eps or default_eps(bundle)
    budgets = [(known[n].eps, known[n].norm) if n in known else (own, "linf") for n in wanted]
    made = [figure_name(n, *budget) for n, budget in zip(wanted, budgets, strict=True)]
    if has_worst(norm for _, norm in budgets):
        made.append(figure_name(WORST, max(size for size, _ in budgets), budgets[0][1]))
    return tuple(label.removeprefix("robust@") for label in made)


def has_worst(norms: Iterable[str]) -> bool:
    """Whether a worst case over attacks makes sense: several of them, in one norm."""
    each = list(norms)
    return len(each) > 1 and len(set(each)) == 1


def evaluate(
    runner: Runner,
    bundle: Bundle,
    names: Sequence[str] | None = None,
    *,
    sample: Sample | None = None,
    eps: float | None = None,
    norm: Norm = "linf",
    queries: int | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> list[Attacked]:
    """Run attacks through the artifact: stored ones are replayed, black boxes run on `sample`.

    `names`: None for all that the bundle stores. `sample`: None for the images of the stored attacks, else the
    held-out sample. `eps`, `norm`: of black boxes; eps None: that of the first stored attack in this norm, else 8/255.
    Raises AttackError, BundleError.
    """
    known = plain(bundle)
    wanted = list(known) if names is None else list(names)
    check_names(bundle, wanted)
    done = [replay(runner, bundle, name) for name in wanted if name in known]
    fresh = [parse_attack(name) for name in wanted if name not in known]
    if fresh:
        images = sample or (done[0].clean if done else bundle.eval_sample())
        budget = Budget(norm, default_eps(bundle, norm) if eps is None else eps)
        done += [
            black_box(
                runner,
                images,
                name,
                budget,
                queries=queries,
                seed=seed,
                reporter=reporter,
                model_sha256=bundle.manifest.files[INT8].sha256,
            )
            for name in fresh
        ]
    return done


def inputs(
    runner: Runner,
    bundle: Bundle,
    label: str,
    names: Sequence[str] | None = None,
    *,
    eps: float | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> tuple[Sample, ...]:
    """The inputs of one attack of a validation by its label (`pgd,eps=8/255`): as stored, or found as `evaluate` does.

    Of the worst case: those of all attacks. Raises AttackError where these `names` bring no attack of this label.
    """
    for name, spec in plain(bundle).items():
        if figure_name(name, spec.eps, spec.norm) == f"robust@{label}":
            return (stored(bundle, name)[1],)
    done = evaluate(runner, bundle, names, eps=eps, seed=seed, reporter=reporter)
    worst = label.startswith(f"{WORST},")
    found = tuple(a.sample for a in done if worst or a.label == label)
    if not found:
        raise AttackError(f"no attack of this validation is {label!r}")
    return found


def default_eps(bundle: Bundle, norm: Norm = "linf") -> float:
    """The budget of black boxes where none is given: that of the first stored attack in this norm, else 8/255."""
    stored = (a.eps for a in plain(bundle).values() if a.norm == norm)
    return next(stored, DEFAULT_EPS)


def stored(bundle: Bundle, name: str) -> tuple[Sample, Sample, Attack]:
    """Originals, adversarial inputs and what made them; checked.

    Raises AttackError where they were made for another model.int8.onnx, belong to no image of the held-out
    sample, or exceed their budget; BundleError where the bundle has no such attack.
    """
    moved, spec = bundle.attack_sample(name)
    if spec.model_sha256 != bundle.manifest.files[INT8].sha256:
        raise AttackError(
            f"the attack {name!r} in {bundle.path} was made for another model",
            "craft it again with resq-export, which stores it with the model it fits",
        )
    clean = _originals(bundle, name, moved)
    try:
        check_budget(clean.images, moved.images, spec.eps, spec.norm)
    except AttackError as error:
        raise AttackError(f"{bundle.path}, attack {name!r}: {error.message}", error.hint) from error
    return clean, moved, spec


def _originals(bundle: Bundle, name: str, moved: Sample) -> Sample:
    whole = bundle.eval_sample()
    place = {int(index): row for row, index in enumerate(whole.indices)}
    rows = [place.get(int(index), -1) for index in moved.indices]
    if min(rows) < 0 or not np.array_equal(whole.labels[rows], moved.labels):
        raise AttackError(
            f"the attack {name!r} in {bundle.path} is not on images of its held-out sample",
            "craft it again with resq-export",
        )
    return Sample(whole.images[rows], whole.labels[rows], whole.indices[rows])


def replay(runner: Runner, bundle: Bundle, name: str) -> Attacked:
    """Run a stored attack through the artifact. Raises as `stored` does."""
    clean, moved, spec = stored(bundle, name)
    return judge(runner, name, spec, clean, moved.images)


def black_box(
    runner: Runner,
    sample: Sample,
    name: str,
    budget: Budget,
    *,
    queries: int | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
    model_sha256: str = "0" * 64,
) -> Attacked:
    """Attack the artifact itself with `square` or `hopskipjump`; see blackbox.attack."""
    counted = blackbox.Counted(runner)
    images = blackbox.attack(
        counted, sample, name, budget, queries=queries, seed=seed, reporter=reporter
    )
    parameters = {
        "queries": blackbox.QUERIES.get(name) if queries is None else queries,
        "seed": seed,
        "queries_spent": counted.images,
    }
    spec = Attack(
        attack=name,
        norm=budget.norm,
        eps=budget.eps,
        parameters=parameters,
        crafted_through="artifact",
        model_sha256=model_sha256,
        samples=len(sample),
    )
    check_budget(sample.images, images, budget.eps, budget.norm)
    return judge(runner, name, spec, sample, images)


def judge(
    runner: Runner, name: str, spec: Attack, clean: Sample, images: NDArray[np.float32]
) -> Attacked:
    """What the artifact makes of originals and adversarial inputs."""
    right = top1(runner(clean.images)) == clean.labels
    attacked = top1(runner(images)) == clean.labels
    return Attacked(name, spec, clean, images, right, attacked)


def worst_case(results: Sequence[Attacked]) -> Attacked:
    """Per image the strongest of several attacks: it stands only if it stands against each (AutoAttack's ensemble).

    All on the same images, in the same norm; the budget is the largest. Raises AttackError otherwise.
    """
    if not results:
        raise AttackError("no attacks to take the worst case of")
    first = results[0]
    same = all(
        np.array_equal(r.clean.indices, first.clean.indices)
        and np.array_equal(r.clean.images, first.clean.images)
        and r.spec.norm == first.spec.norm
        for r in results
    )
    if not same:
        raise AttackError("these attacks are not on the same images in the same norm")
    images, standing = first.images.copy(), first.right_attacked.copy()
    for other in results[1:]:
        falls = standing & ~other.right_attacked
        images[falls] = other.images[falls]
        standing &= other.right_attacked
    spec = first.spec.model_copy(
        update={
            "attack": WORST,
            "eps": max(r.spec.eps for r in results),
            "parameters": {"over": [r.name for r in results]},
            "transfer": {},
        }
    )
    return replace(
        first, name=WORST, spec=spec, images=images, right_attacked=standing, warnings=()
    )


def result(attacked: Attacked, confidence: float = 0.95) -> AttackResult:
    """An attack as the report has it; success is among the images that were right before."""
    before, after = int(attacked.right.sum()), int(attacked.robust.sum())
    count = len(attacked.clean)
    success = share(before - after, before, confidence)
    return AttackResult(
        name=attacked.name,
        attack=attacked.spec.attack,
        norm=attacked.spec.norm,
        eps=attacked.spec.eps,
        crafted_through=attacked.spec.crafted_through,
        robust=share(after, count, confidence),
        success=success,
        parameters=dict(attacked.spec.parameters),
        warnings=attacked.warnings,
    )


def share(hits: int, count: int, confidence: float = 0.95) -> Figure:
    """A share of images with Wilson's interval; of none, the whole of [0, 1]."""
    if count == 0:
        return Figure(mean=0.0, low=0.0, high=1.0, confidence=confidence, method="none", n=0)
    found = wilson(hits, count, confidence)
    return Figure(
        mean=found.mean,
        low=found.low,
        high=found.high,
        confidence=found.confidence,
        method=found.method,
        n=found.n,
    )
