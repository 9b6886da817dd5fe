"""Networks of one's own: what a factory is given, where it is found, and what a file may not name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from resq_deploy.errors import ModelError
from resq_deploy.export.load import load_model
from resq_deploy.networks import Shape, build
from tests.test_checkpoint import made

HERE = __name__
SHAPE = (1, 8, 8)


def plain() -> nn.Module:
    return nn.Linear(64, 3)


def counted(num_classes: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Linear(width, num_classes))


def shaped(input_shape: Shape, *, classes: int = 1000, **others: Any) -> nn.Module:
    assert not others
    return nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], classes)


def anything(**options: Any) -> nn.Module:
    return nn.Linear(64, 3)


def command(line: str) -> nn.Module:
    raise AssertionError("it was called")


def broken(num_classes: int) -> nn.Module:
    raise KeyError("weights")


class Net(nn.Module):
    """A class without the keywords of the data."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 3)


def of(name: str, **args: Any) -> nn.Module:
    return build(f"{HERE}:{name}", input_shape=SHAPE, classes=3, args=args)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("plain", {}),
        ("counted", {}),
        ("counted", {"width": 7}),
        ("counted", {"num_classes": 3}),
        ("counted", {"classes": 3}),
        ("shaped", {}),
        ("shaped", {"num_classes": 3, "input_shape": [1, 8, 8]}),
        ("Net", {}),
        ("Net", {"width": 9}),
    ],
)
def test_a_factory_gets_what_it_names(name: str, args: dict[str, Any]) -> None:
    last = [m for m in of(name, **args).modules() if isinstance(m, nn.Linear)][-1]
    assert last.out_features == 3


@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "torchvision:vgg11", f"{HERE}:counted"])
def test_the_number_of_classes_may_be_repeated(arch: str) -> None:
    shape = (1, 32, 32)
    network = build(arch, input_shape=shape, classes=3, args={"num_classes": 3})
    assert list(network.state_dict().values())[-1].shape == (3,)
    with pytest.raises(ModelError, match=r"num_classes=10, where data or weights have 3 \(leave"):
        build(arch, input_shape=shape, classes=3, args={"num_classes": 10})


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("command", {"line": "rm"}, "takes neither num_classes nor classes"),
        ("anything", {"line": "rm"}, "name one of them among its parameters"),
        ("Path", {}, "takes neither"),
        ("counted", {"depth": 3}, r"depth=3, num_classes=3: TypeError: .*\(call "),
        ("Net", {"num_classes": 3}, "num_classes=3: TypeError"),
        ("broken", {}, "KeyError: 'weights'"),
        ("count", {}, "has no 'count' .*close names: .*counted"),
    ],
)
def test_what_cannot_be_called_is_refused(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        of(name, **args)


@pytest.mark.parametrize("arch", ["subprocess:run", "os:system", "torch.hub:load", "os:abort"])
def test_a_file_cannot_name_a_command(arch: str, tmp_path: Path) -> None:
    args = {"args": ["touch", str(tmp_path / "x")], "command": f"touch {tmp_path / 'x'}"}
    for given in (args, {}):
        with pytest.raises(ModelError, match=r"takes neither|missing .* required"):
            made(arch=arch, arch_args=given).network()
    assert not (tmp_path / "x").exists()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory from which Python does not import by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def write(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(f"from torch import nn\n{text}\n")


def at(arch: str, **options: Any) -> nn.Module:
    return build(arch, input_shape=SHAPE, classes=3, args={}, **options)


def test_the_working_directory_is_looked_into_where_a_person_asks(folder: Path) -> None:
    write(folder, "mynets_a", "def make(num_classes): return nn.Linear(64, num_classes)")
    with pytest.raises(ModelError, match=r"a file names it: .*--arch mynets_a:make.*PYTHONPATH="):
        at("mynets_a:make", asked=False)
    with pytest.raises(ModelError, match="a file names it"):
        made(arch="mynets_a:make").network()
    assert isinstance(at("mynets_a:make"), nn.Linear)


def test_a_file_s_factory_is_found_there_once_a_person_names_it_too(folder: Path) -> None:
    write(folder, "mynets_g", "class Net(nn.Sequential):\n  def __init__(self, num_classes):\n"
          "    super().__init__(nn.Flatten(), nn.Linear(64, num_classes))")  # fmt: skip
    kept = made(
        arch="mynets_g:Net",
        arch_args={},
        input_shape=SHAPE,
        state_dict=at("mynets_g:Net").state_dict(),
    )
    kept.save(folder / "m.pt")
    sys.path.remove(str(folder))
    del sys.modules["mynets_g"]
    with pytest.raises(ModelError, match="a file names it"):
        load_model(folder / "m.pt")
    assert load_model(folder / "m.pt", arch="mynets_g:Net").arch == "mynets_g:Net"


@pytest.mark.parametrize(
    ("arch", "text", "message"),
    [
        ("mynets_b:make", None, r"No module named 'mynets_b' \(it is neither installed nor in /"),
        ("mynets_c:make", "import no_such_thing", r"\(install no_such_thing, which mynets_c impor"),
        ("mynets_d:make", "1 / 0", r"ZeroDivisionError: .*\(python -c 'import mynets_d' shows"),
        ("mynets_e:make", "def", r"SyntaxError: .* shows where"),
        ("mynets_f.py:make", "", r"is no module \(write pkg.module:factory, with dots"),
        ("nets/mynets:make", None, "is no module"),
        (":make", None, "is no module"),
    ],
)
def test_what_cannot_be_imported_says_why(
    folder: Path, arch: str, text: str | None, message: str
) -> None:
    if text is not None:
        write(folder, arch.partition(":")[0].removesuffix(".py"), text)
    with pytest.raises(ModelError, match=message):
        at(arch)
