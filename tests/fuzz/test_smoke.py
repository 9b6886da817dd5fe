"""A small part of the fuzzing, in the normal tests: the same targets, a few hundred mutated inputs each."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resq_deploy.errors import ResqError
from tests.fuzz.__main__ import NAMES
from tests.fuzz.mutate import mutate_json
from tests.fuzz.targets import Escape, Guard, Target, targets


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def all_targets(folder: Path) -> dict[str, Target]:
    return targets(folder)


@pytest.fixture(scope="module")
def guard(folder: Path) -> Guard:
    return Guard(folder)


def test_every_target_is_run(all_targets: dict[str, Target]) -> None:
    assert tuple(all_targets) == NAMES


@pytest.mark.parametrize("name", [n for n in NAMES if n != "signature"])
def test_seeds_are_read(all_targets: dict[str, Target], name: str) -> None:
    for seed in all_targets[name].seeds:
        all_targets[name].run(seed)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_only_resq_errors_come_out(
    all_targets: dict[str, Target], guard: Guard, name: str, data: st.DataObject
) -> None:
    target = all_targets[name]
    content = bytearray(data.draw(st.sampled_from(target.seeds)))
    if data.draw(st.booleans()):
        content = bytearray(
            mutate_json(bytes(content), data.draw(st.integers(0, 2**32))) or content
        )
    for _ in range(data.draw(st.integers(0, 5))):
        place = data.draw(st.integers(0, len(content)))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    message = "read"
    try:
        with guard:
            target.run(bytes(content))
    except ResqError as error:
        message = error.message
    assert 0 < len(message) < 20_000


def test_the_guard_sees_a_write_outside(guard: Guard, folder: Path, tmp_path: Path) -> None:
    with guard:
        (folder / "inside").write_text("x")
        with pytest.raises(Escape):
            (tmp_path / "outside").write_text("x")
        with pytest.raises(Escape):
            (tmp_path / "folder").mkdir()
    (tmp_path / "folder").mkdir()
