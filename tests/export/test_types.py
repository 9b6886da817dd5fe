"""A network that was saved in another type than float32 becomes float32, or is refused with that as the cure."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resq_deploy.errors import ModelError
from resq_deploy.export.load import load_model
from tests.export.test_load import PLAIN, expected
from tests.helpers import SHAPE, checkpoint


def typed(dtype: torch.dtype) -> nn.Module:
    return checkpoint().network().to(dtype)


def save_typed(form: str, dtype: torch.dtype, path: Path) -> None:
    network, x = typed(dtype), torch.rand(2, *SHAPE, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "pickle":
            torch.save(network, path)
        elif form == "exported":
            free = ({0: torch.export.Dim("batch")},)
            with path.open("wb") as file:
                torch.export.save(torch.export.export(network, (x,), dynamic_shapes=free), file)
        elif form == "traced":
            trace: Any = torch.jit.trace
            torch.jit.save(trace(network, x), path)
        else:
            torch.jit.save(torch.jit.script(network), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("form", ["pickle", "traced", "scripted"])
def test_a_network_of_another_type_becomes_float32(
    form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_typed(form, dtype, tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", **PLAIN, trust_pickle=True)
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert loaded.module is not None
    with torch.no_grad():
        found = loaded.module(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_an_exported_program_of_another_type_is_refused_with_the_cure(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    save_typed("exported", dtype, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=f"parameters in {str(dtype)[6:]}") as caught:
        load_model(tmp_path / "m.pt", **PLAIN)
    assert "float32" in caught.value.hint


class Halving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(256, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(x.flatten(1).half())
        return logits


def test_a_type_inside_the_network_is_named_as_the_cause(tmp_path: Path) -> None:
    torch.save(Halving().half(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match="does not run on 2 images") as caught:
        load_model(tmp_path / "m.pt", input_shape=SHAPE, trust_pickle=True)
    assert "float32" in caught.value.hint
