"""An exported program that would run code when torch reads it is refused before torch reads it."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resq_deploy.errors import ModelError
from resq_deploy.export import pt2
from resq_deploy.export.load import load_model
from tests.helpers import SHAPE, save_exported


def rewritten(path: Path, change: Callable[[str, bytes], bytes], *extra: tuple[str, bytes]) -> Path:
    """An exported program with some of its files changed."""
    save_exported(path)
    assert pt2.danger(path) == ""
    evil = path.with_name("evil.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(evil, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, data in extra:
            new.writestr(f"{root}/{name}", data)
    return evil


def nothing(_: str, data: bytes) -> bytes:
    return data


def in_model(change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def apply(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        body = json.loads(data)
        change(body)
        return json.dumps(body).encode()

    return apply


def call(target: str) -> Callable[[str, bytes], bytes]:
    def change(body: Any) -> None:
        body["graph_module"]["graph"]["nodes"][0]["target"] = target

    return in_model(change)


def guard(text: str) -> Callable[[str, bytes], bytes]:
    return in_model(lambda body: body.update(guards_code=[text]))


def size(text: str) -> Callable[[str, bytes], bytes]:
    def change(body: Any) -> None:
        sizes = body["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = text

    return in_model(change)


def pickled_weights(name: str, data: bytes) -> bytes:
    return data.replace(b'"use_pickle": false', b'"use_pickle": true') if "config" in name else data


@pytest.mark.parametrize(
    ("change", "extra", "message"),
    [
        (nothing, [("data/constants/opaque_obj_0", b"x")], "pickled object"),
        (nothing, [("data/aotinductor/model/a.so", b"x")], "compiled library"),
        (nothing, [("data/sample_inputs/model.pt", b"x")], "two files of one name"),
        (nothing, [("data/extra.pt", pickle.dumps(print))], "pickled object"),
        (pickled_weights, [], "weights as pickled objects"),
        (call("torch.load"), [], "a call of torch.load"),
        (call("torch.hub.load"), [], "a call of torch.hub.load"),
        (guard("__import__('os').mkdir('ran')"), [], "a guard"),
        (size("__import__('os').system('true')"), [], "not arithmetic"),
        (size("Max('exec(1)', 2)"), [], "not arithmetic"),
    ],
)
def test_an_exported_program_that_would_run_code_is_refused(
    change: Callable[[str, bytes], bytes],
    extra: list[tuple[str, bytes]],
    message: str,
    tmp_path: Path,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of the second file of one name
        evil = rewritten(tmp_path / "m.pt2", change, *extra)
    assert message in pt2.danger(evil)
    with pytest.raises(ModelError, match="would run its author's code"):
        load_model(evil, input_shape=SHAPE)


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Max(1, 2*s0) - s1//4 + 3", True),
        ("L['x'].size()[0] >= 2", True),
        ("open(s0)", False),
        ("s0.__class__", False),
        ("Symbol('a-b')", False),
        ("(lambda: 1)()", False),
        ("[i for i in s0]", False),
        ("s0 +", False),
    ],
)
def test_arithmetic(text: str, fine: bool) -> None:
    assert pt2.is_arithmetic(text) is fine
