"""What training starts from: checkpoints of another network are refused, ImageNet weights fill what fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resq_deploy.errors import ModelError
from tests.hardening.test_harden import harden


def wrong_arch(tmp_path: Path) -> str:
    path = tmp_path / "other.pt"
    replace(harden(tmp_path, "o.pt", stages="none"), arch="resnet18").save(path)
    return str(path)


def wrong_width(tmp_path: Path) -> str:
    harden(tmp_path, "wide.pt", stages="none", arch_args={"width": 5})
    return str(tmp_path / "wide.pt")


def wrong_kind(tmp_path: Path) -> str:
    torch.save({"a": [1]}, tmp_path / "kind.pt")
    return str(tmp_path / "kind.pt")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong_arch, "a checkpoint of resnet18, not of resnet8"),
        (wrong_width, "misshapen conv1.weight"),
        (wrong_kind, "neither a checkpoint nor a state_dict"),
        (lambda _: "imagenet", "no ImageNet weights for resnet8"),
        (lambda p: str(p / "none.pt"), "does not exist"),
    ],
)
def test_another_networks_weights_are_refused(
    tmp_path: Path, make: Callable[[Path], str], message: str
) -> None:
    init = make(tmp_path)
    with pytest.raises(ModelError, match=message):
        harden(tmp_path, init=init)


def test_imagenet_weights_fill_the_layers_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    from resq_deploy import networks
    from resq_deploy.hardening import initial

    full = models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(initial, "_imagenet", lambda _arch: full)
    network = networks.build("resnet18", input_shape=(1, 32, 32), classes=10, args={})
    start = initial.start_from("imagenet", "resnet18", network, ((0.0,), (1.0,)))
    assert start.phases == ()
    own = network.state_dict()
    assert torch.equal(own["layer3.0.conv1.weight"], full["layer3.0.conv1.weight"])
    assert own["conv1.weight"].shape == (64, 1, 3, 3)
    assert own["fc.weight"].shape == (10, 512)
