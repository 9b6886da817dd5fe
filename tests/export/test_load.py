"""Every form of MODEL.pt becomes the same network, and nobody's pickle runs."""

from __future__ import annotations

import pickle
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resq_deploy.errors import ModelError, ResqError
from resq_deploy.export.load import LoadedModel, load_model
from resq_deploy.export.pipeline import export_model
from tests.helpers import CLASSES, SHAPE, Bomb, checkpoint, save_exported

ARCH: dict[str, Any] = {"arch": "resnet8", "arch_args": {"width": 16}}
PLAIN: dict[str, Any] = {"input_shape": SHAPE, "mean": (0.3,), "std": (0.25,)}


def expected(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = checkpoint().network()((x - 0.3) / 0.25)
    return logits


def computes_the_same(loaded: LoadedModel) -> bool:
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert loaded.module is not None
    with torch.no_grad():
        return torch.allclose(loaded.module(x), expected(x), atol=1e-5)


def test_a_checkpoint_needs_no_flag(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt")
    assert (loaded.form, loaded.arch, loaded.input_shape) == ("checkpoint", "resnet8", SHAPE)
    assert (loaded.classes, loaded.mean, loaded.std) == (CLASSES, (0.3,), (0.25,))
    assert loaded.trained["stages"] == "none"
    assert loaded.metrics == {"clean": 0.5}
    assert loaded.module is not None
    assert not loaded.module.training
    assert computes_the_same(loaded)


def save_state(path: Path) -> None:
    torch.save(checkpoint().state_dict, path)


def save_nested(path: Path) -> None:
    state = {f"module.{key}": value for key, value in checkpoint().state_dict.items()}
    torch.save({"epoch": 3, "model": state}, path)


def save_old(path: Path) -> None:
    torch.save(checkpoint().state_dict, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_state, save_nested, save_old])
def test_a_state_dict(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", **ARCH, **PLAIN)
    assert loaded.form == "state dict"
    assert loaded.classes == ("0", "1", "2")  # as many as the last layer has outputs
    assert computes_the_same(loaded)


def save_scripted(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(checkpoint().network()), path)


def save_traced(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace: Any = torch.jit.trace
        torch.jit.save(trace(checkpoint().network(), torch.rand(2, *SHAPE)), path)


@pytest.mark.parametrize(
    ("save", "form"),
    [(save_scripted, "TorchScript"), (save_traced, "TorchScript"), (save_exported, "exported")],
)
def test_programs_become_the_same_graph(
    save: Callable[[Path], None], form: str, tmp_path: Path
) -> None:
    save(tmp_path / "m.bin")
    loaded = load_model(tmp_path / "m.bin", **PLAIN)
    assert loaded.form == form
    assert computes_the_same(loaded)
    model = loaded.to_onnx()
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"conv1.weight", "conv1.bias", "layer3.downsample.0.weight", "fc.bias"} <= names


def test_a_trusted_pickle(tmp_path: Path) -> None:
    torch.save(checkpoint().network(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="pickled object") as caught:
        load_model(tmp_path / "m.pt", **PLAIN)
    assert "--trust-pickle" in caught.value.hint
    loaded = load_model(tmp_path / "m.pt", **PLAIN, trust_pickle=True)
    assert loaded.form == "pickle"
    assert computes_the_same(loaded)


@pytest.mark.parametrize("protocol", [2, 4, "zip", "old"])
def test_code_in_a_pickle_does_not_run(protocol: int | str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "m.pt"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(Bomb(marker), protocol))
    else:
        torch.save(Bomb(marker), path, _use_new_zipfile_serialization=protocol == "zip")
    with pytest.raises(ModelError, match="would run its author's code"):
        load_model(path, **PLAIN)
    assert not marker.exists()


# How many classes


def save_reordered(path: Path) -> None:
    """A state dict whose classifier comes first."""
    state = checkpoint().state_dict
    first = {k: v for k, v in state.items() if k.startswith("fc.")}
    torch.save({**first, **state}, path)


def test_the_data_say_how_many_classes_there_are(tmp_path: Path) -> None:
    save_reordered(tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", **ARCH, **PLAIN, default_classes=lambda shape: 3)
    assert computes_the_same(loaded)
    with pytest.raises(ModelError, match=r"misshapen fc\.weight"):
        load_model(tmp_path / "m.pt", **ARCH, **PLAIN)


def test_data_of_other_classes_do_not_hide_what_the_weights_say(tmp_path: Path) -> None:
    save_state(tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", **ARCH, **PLAIN, default_classes=lambda shape: 7)
    assert len(loaded.classes) == 3


# Refusals


@pytest.mark.parametrize(
    "options",
    [{"arch": "resnet18"}, {"arch_args": {"width": 99}}, {"arch_args": {"depth": 1}}],
)
def test_a_checkpoint_of_another_network_than_the_one_named(
    options: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint().save(tmp_path / "m.pt")
    with pytest.raises(ModelError, match="a checkpoint of resnet8, width=16, not of res") as caught:
        load_model(tmp_path / "m.pt", **options)
    assert "leave out --arch" in caught.value.hint
    assert load_model(tmp_path / "m.pt", **ARCH).arch == "resnet8"


def test_arguments_of_a_network_that_is_not_built(tmp_path: Path) -> None:
    save_exported(tmp_path / "m.pt2")
    with pytest.raises(ModelError, match=r"a network already \(exported\)"):
        load_model(tmp_path / "m.pt2", **PLAIN, arch_args={"width": 99})


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_preprocessing_is_finite(name: str, value: float, tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "m.pt")
    given: dict[str, Any] = {name: (value,)}
    with pytest.raises(ModelError, match="is not finite"):
        load_model(tmp_path / "m.pt", **given)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def truncated(tmp: Path) -> Path:
    checkpoint().save(tmp / "whole.pt")
    data = (tmp / "whole.pt").read_bytes()
    return write(tmp / "m.pt", data[: len(data) // 2])


def truncated_script(tmp: Path) -> Path:
    save_traced(tmp / "whole.pt")
    data = (tmp / "whole.pt").read_bytes()
    return write(tmp / "m.pt", data[: len(data) // 3])


def hollow_zip(tmp: Path) -> Path:
    with zipfile.ZipFile(tmp / "m.pt", "w") as archive:
        archive.writestr("m/constants.pkl", b"")
        archive.writestr("m/data.pkl", b"\x80")
    return tmp / "m.pt"


def hollow_pt2(tmp: Path) -> Path:
    with zipfile.ZipFile(tmp / "m.pt", "w") as archive:
        archive.writestr("m/archive_version", b"0")
        archive.writestr("m/models/model.json", b"{")
    return tmp / "m.pt"


def other_object(tmp: Path) -> Path:
    torch.save([1, 2, 3], tmp / "m.pt")
    return tmp / "m.pt"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp: tmp / "none.pt", "does not exist"),
        (lambda tmp: tmp, "is not a file"),
        (lambda tmp: write(tmp / "m.pt", b""), "truncated, or not a model"),
        (lambda tmp: write(tmp / "m.pt", b"hello, this is text"), "truncated, or not a model"),
        (lambda tmp: write(tmp / "m.pt", bytes(range(256)) * 9), "truncated, or not a model"),
        (lambda tmp: write(tmp / "m.pt", b"\x80\x02}q\x00"), "truncated, or not a model"),
        (truncated, "truncated, or not a model"),
        (truncated_script, "truncated, or not a model"),
        (hollow_zip, "truncated, or not a model"),
        (hollow_pt2, "truncated, or not a model"),
        (other_object, "holds no network and no weights, but a list"),
    ],
)
def test_what_is_no_model(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_model(make(tmp_path), **PLAIN)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_a_network_in_memory_is_told_what_to_do() -> None:
    with pytest.raises(ModelError, match="a Flatten in memory is no model file"):
        export_model(nn.Flatten())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shape": SHAPE}, r"holds weights only \(conv1.weight, bn1.weight"),
        ({"input_shape": SHAPE, "arch": "resnet18"}, "not those of resnet18: missing .*misshapen"),
        ({"input_shape": SHAPE, "arch": "nothing"}, "unknown network 'nothing'"),
        ({"arch": "resnet8"}, "does not say what images it takes"),
        ({**ARCH, "input_shape": (3, 16, 16)}, "misshapen conv1.weight"),
        ({**ARCH, "input_shape": SHAPE, "mean": (0.1, 0.2)}, "preprocessing"),
        ({**ARCH, "input_shape": SHAPE, "std": (0.0,)}, "preprocessing"),
        ({**ARCH, "input_shape": SHAPE, "classes": ("a", "b")}, "misshapen fc.weight"),
    ],
)
def test_a_state_dict_that_does_not_fit(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_state(tmp_path / "m.pt")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path / "m.pt", **options)
    assert caught.value.hint


def test_a_wrong_input_shape_is_found_by_running_it(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "c.pt")
    with pytest.raises(ModelError, match="1 channels, not 3"):
        load_model(tmp_path / "c.pt", input_shape=(3, 16, 16))
    save_exported(tmp_path / "m.pt2")
    with pytest.raises(ModelError, match="does not run on 2 images of 1x8x16") as caught:
        load_model(tmp_path / "m.pt2", input_shape=(1, 8, 16))
    assert "--input-shape" in caught.value.hint


def test_an_exported_program_of_one_batch_size_is_refused_with_the_cure(tmp_path: Path) -> None:
    save_exported(tmp_path / "m.pt2", fixed=True)
    with pytest.raises(ModelError, match="does not run on 3 images of 1x16x16") as caught:
        load_model(tmp_path / "m.pt2", input_shape=SHAPE)
    assert "dynamic batch" in caught.value.hint


class Sick(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.full((3, 3), torch.nan), "not finite"),
        (torch.zeros(2), r"makes \(2,\) of three images"),
        ("text", "makes str of three images"),
    ],
)
def test_outputs_that_are_no_logits(output: Any, message: str, tmp_path: Path) -> None:
    torch.save(Sick(output), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m.pt", input_shape=SHAPE, trust_pickle=True)


def test_a_class_of_the_script_that_saved_it_is_in_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = types.ModuleType("__main__")
    script.Net = type("Net", (nn.Identity,), {"__module__": "__main__"})  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "__main__", script)
        torch.save(script.Net(), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="'Net' on") as caught:
        load_model(tmp_path / "net.pt", input_shape=SHAPE, trust_pickle=True)
    assert "state_dict" in caught.value.hint


def test_random_bytes_after_a_magic_never_do_more_than_refuse(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for magic in (b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"\x93NUMPY"):
        for _ in range(10):
            write(tmp_path / "m.pt", magic + rng.bytes(200))
            with pytest.raises(ResqError):
                load_model(tmp_path / "m.pt", **PLAIN)
