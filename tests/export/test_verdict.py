"""What stage III keeps of what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resq_deploy.export.guard import Scores
from resq_deploy.export.verdict import balance, gains, objections, worthwhile


def scores(
    clean: float = 1.0,
    faulty: float = 0.8,
    attacked: float = 0.5,
    differ: float = 0.01,
    bits: int = 8,
) -> Scores:
    ones = np.ones(400)
    return Scores(
        clean=clean * ones,
        agreement=0.995,
        disagreement=differ,
        faulty=faulty * np.ones((2, 400)),
        worth=faulty + np.array([[-0.1, 0.1, -0.1, 0.1]] * 2),
        bits=bits,
        trials=faulty * np.ones(8),
        divergence=0.1,
        attacked=attacked * ones,
    )


CASES: list[tuple[Scores, str]] = [
    (scores(faulty=0.85), ""),
    (scores(clean=0.998), ""),
    (scores(clean=0.99), "clean"),
    (scores(faulty=0.79), "faulty"),
    (scores(attacked=0.49), "attacked"),
    (scores(differ=0.0295), ""),
    (scores(differ=0.0305), "agreement"),
    (scores(faulty=0.82, differ=0.055), ""),
    (scores(faulty=0.82, differ=0.065), "agreement"),
]


@pytest.mark.parametrize(("candidate", "lost"), CASES)
def test_what_counts_as_a_loss(candidate: Scores, lost: str) -> None:
    found = objections(candidate, [scores()])
    assert {text.split()[0] for text in found} == ({lost} if lost else set())


def test_where_99_percent_are_out_of_reach_the_best_so_far_is_held() -> None:
    kept = [scores(differ=0.06), scores(differ=0.04), scores(differ=0.0415)]
    assert not objections(scores(differ=0.0415), kept)
    assert objections(scores(differ=0.0425), kept) == ["agreement on mixtures 0.9600 -> 0.9575"]
    assert not objections(scores(differ=0.0425), kept[:1])


def test_agreement_is_bought_by_what_a_step_adds_itself() -> None:
    plain, before = scores(faulty=0.8), scores(faulty=0.82)
    after = scores(faulty=0.82, differ=0.05)
    assert not objections(after, [plain])
    assert objections(after, [plain, before])


def test_one_image_of_few_is_not_yet_a_loss() -> None:
    before, after = np.ones(50), np.ones(50)
    after[0] = 0.0
    first, second = replace(scores(), attacked=before), replace(scores(), attacked=after)
    assert not objections(second, [first])
    after[:6] = 0.0
    assert objections(second, [first])


def test_other_flips_are_another_chance() -> None:
    """Where a layer was split, its flips are others, and a trial's luck is no loss and no gain: 0.08 at a time here."""
    plain, worse, better = scores(), scores(faulty=0.7), scores(faulty=0.87)
    assert objections(worse, [plain])
    assert not objections(replace(worse, bits=16), [plain])
    assert objections(scores(faulty=0.59, bits=16), [plain])
    split = scores(faulty=0.82, bits=16)
    assert objections(
        replace(worse, bits=16), [plain, split]
    )  # it met the same flips as the split graph
    assert gains(better, plain)
    assert not gains(replace(better, bits=16), plain)
    assert gains(scores(faulty=0.94, bits=16), plain)


def test_a_trial_meets_the_flips_of_a_lower_rate_again_at_a_higher_one() -> None:
    """So what a trial is worth at one rate says what it is worth at the next, and more rates are not more draws."""
    plain, better = scores(), scores(faulty=0.92, bits=16)
    assert not gains(better, plain)
    apart = np.array([[-0.1, 0.1, -0.1, 0.1], [0.1, -0.1, 0.1, -0.1]])
    assert gains(*(replace(s, worth=s.worth.mean() + apart) for s in (better, plain)))


def test_a_gain_must_be_clear_and_a_quarter_of_the_loss() -> None:
    plain = scores(faulty=0.992)  # loses 0.8 points
    assert worthwhile(scores(faulty=0.9945), plain)
    assert not worthwhile(scores(faulty=0.9935), plain)
    assert not worthwhile(plain, plain)


def test_of_a_large_loss_less_than_a_quarter_will_do() -> None:
    plain = scores(faulty=0.8)  # loses 20 points
    assert worthwhile(scores(faulty=0.8031), plain)
    assert not worthwhile(scores(faulty=0.8029), plain)
    luck = plain.faulty.copy()
    luck[:, :40] += 0.7  # one image in ten gains much
    assert worthwhile(replace(plain, faulty=luck), plain)
    luck[:, 40:75] -= 0.6
    assert not worthwhile(replace(plain, faulty=luck), plain)


def test_what_loses_next_to_nothing_is_left_as_it_is() -> None:
    assert not worthwhile(scores(faulty=1.0), scores(faulty=0.9975))
    assert worthwhile(scores(faulty=1.0), scores(faulty=0.9965))


def test_a_step_that_only_moves_answers_about_gains_nothing() -> None:
    rng = np.random.default_rng(0)
    before = scores(faulty=0.9)
    moved = replace(before, faulty=before.faulty + 0.05 * rng.standard_normal(before.faulty.shape))
    assert not gains(moved, before)
    assert not gains(before, before)
    assert gains(replace(before, faulty=before.faulty + 0.01), before)


def test_a_point_of_agreement_weighs_as_much_as_one_at_the_design_ber() -> None:
    better, agreeing = scores(faulty=0.81, differ=0.04), scores(faulty=0.80, differ=0.01)
    assert balance(better) == pytest.approx(balance(agreeing))
    later = replace(agreeing, worth=agreeing.worth + np.array([[0.0], [0.1]]))
    assert balance(later) == balance(agreeing)
