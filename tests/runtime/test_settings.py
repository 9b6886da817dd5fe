from __future__ import annotations

from pathlib import Path

import pytest

from resq_deploy.errors import CampaignError, DataError, FaultError, ResqError
from resq_deploy.runtime import settings as s
from resq_deploy.runtime.places import report_folder


@pytest.mark.parametrize(
    ("text", "bits"),
    [("7", (7,)), ("0-6", tuple(range(7))), ("0-3,7", (0, 1, 2, 3, 7)), ("7,7", (7,))],
)
def test_bits(text: str, bits: tuple[int, ...]) -> None:
    assert s.parse_bits(text) == bits


@pytest.mark.parametrize("text", ["", "x", "6-0", "-1", "0-99", "1,,2"])
def test_no_bits(text: str) -> None:
    with pytest.raises(FaultError):
        s.parse_bits(text)


def test_trials() -> None:
    assert s.parse_trials("auto") is None
    assert s.parse_trials("30") == 30


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5"])
def test_no_trials(text: str) -> None:
    with pytest.raises(CampaignError):
        s.parse_trials(text)


def test_rates() -> None:
    assert s.parse_rates("1e-5, 1e-4") == (1e-5, 1e-4)
    assert s.parse_rates("") == ()


@pytest.mark.parametrize("text", ["0", "1", "2", "-1e-3", "nan", "often"])
def test_no_rates(text: str) -> None:
    with pytest.raises(FaultError, match="between 0 and 1"):
        s.parse_rates(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"confidence": 1.0},
        {"margin": 0.0},
        {"margin": 0.7},
        {"trials": 0},
        {"samples": 0},
        {"where": ("registers",)},
    ],
)
def test_wrong_settings_are_refused_at_once(wrong: dict[str, object]) -> None:
    with pytest.raises(ResqError):
        s.Settings(**wrong)  # type: ignore[arg-type]


def test_single_faults_run_before_rising_rates() -> None:
    models = s.Settings(ber=(1e-3, 1e-5), faults=("mbu:4", "seu")).models
    assert models == ("mbu:4", "seu", "ber:1e-05", "ber:0.001")


def test_a_report_lies_beside_its_bundle() -> None:
    assert report_folder(Path("a/model.resq")) == Path("a/model.report")
    assert report_folder(Path("a/net-0.1")) == Path("a/net-0.1.report")


@pytest.mark.parametrize("there", [".", "", "x/.."])
def test_a_report_lies_beside_the_folder_one_is_in(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.resq/x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model.resq")
    assert report_folder(Path(there)) == tmp_path / "model.report"


@pytest.mark.parametrize(
    ("text", "levels"), [("3", (3,)), ("1-5", (1, 2, 3, 4, 5)), ("5,1-2", (1, 2, 5))]
)
def test_severities(text: str, levels: tuple[int, ...]) -> None:
    assert s.parse_severities(text) == levels


@pytest.mark.parametrize("text", ["", "0", "6", "1-6", "5-1", "x"])
def test_severities_that_are_none(text: str) -> None:
    with pytest.raises(DataError, match="severities"):
        s.parse_severities(text)


def test_options_that_do_nothing_are_told() -> None:
    assert s.Settings().idle(["pgd"]) == []
    assert s.Settings(corruptions=("fog",), severities=(3,), corruption_samples=9).idle([]) == []
    said = s.Settings(severities=(3,), corruption_samples=9, eps=0.1, joint=True).idle([])
    assert [text.split()[0] for text in said] == [
        "--eps",
        "--joint",
        "--severities",
        "--corruption-samples",
    ]
