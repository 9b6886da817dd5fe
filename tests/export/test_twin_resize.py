"""Resize and GridSample of the twin against ONNX Runtime: every mode, every way to find a position, up and down."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.export.twin import Twin
from tests.export.twins import I64, artifact, logits_of, model_of

X = np.random.default_rng(3).normal(size=(2, 3, 7, 10)).astype(np.float32)
SCALES: dict[str, Any] = {
    "twice": {"scales": (1, 1, 2, 2)},
    "odd": {"scales": (1, 1, 2.6, 1.3)},
    "smaller": {"scales": (1, 1, 0.6, 0.45)},
    "sizes": {"sizes": (2, 3, 9, 4)},
    "one": {"sizes": (2, 3, 1, 1)},
}
POSITIONS = (
    "half_pixel",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
)


def resize(
    scales: tuple[float, ...] = (), sizes: tuple[int, ...] = (), **attributes: Any
) -> onnx.ModelProto:
    constants = [numpy_helper.from_array(np.array(scales, np.float32), "scales")]
    names = ["x", "", "scales"]
    if sizes:
        constants = [numpy_helper.from_array(np.array(sizes, I64), "sizes")]
        names = ["x", "", "", "sizes"]
    node = helper.make_node("Resize", names, ["y"], **attributes)
    return model_of([node], constants, {"x": X.shape})


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "linear"},
        {"mode": "cubic", "cubic_coeff_a": -0.5},
        {"mode": "cubic", "exclude_outside": 1},
        *(
            {"mode": "nearest", "nearest_mode": how}
            for how in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        ),
    ],
    ids=lambda a: "-".join(map(str, a.values())),
)
def test_resize_equals_onnx_runtime(attributes: dict[str, Any], scale: str, positions: str) -> None:
    model = resize(**SCALES[scale], **attributes, coordinate_transformation_mode=positions)
    found, wanted = logits_of(Twin(model), X), artifact(model, X)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=5e-6)


@pytest.mark.parametrize("scale", ["smaller", "sizes", "twice"])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("exclude", [0, 1])
def test_antialiased_resize_equals_onnx_runtime(exclude: int, mode: str, scale: str) -> None:
    model = resize(**SCALES[scale], mode=mode, antialias=1, exclude_outside=exclude)
    np.testing.assert_allclose(logits_of(Twin(model), X), artifact(model, X), atol=5e-6)


def test_axes_name_what_is_resized() -> None:
    model = resize(sizes=(9, 5), axes=[2, -1], mode="linear")
    np.testing.assert_allclose(logits_of(Twin(model), X), artifact(model, X), atol=5e-6)


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["linear", "nearest", "cubic"])
def test_grid_sample_equals_onnx_runtime(mode: str, padding: str, corners: int) -> None:
    where = np.random.default_rng(4).uniform(-1.3, 1.3, (2, 5, 6, 2)).astype(np.float32)
    node = helper.make_node(
        "GridSample", ["x", "g"], ["y"], mode=mode, padding_mode=padding, align_corners=corners
    )
    model = model_of([node], [numpy_helper.from_array(where, "g")], {"x": X.shape})
    np.testing.assert_allclose(logits_of(Twin(model), X), artifact(model, X), atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_the_gradient_gives_back_what_each_pixel_gave(mode: str) -> None:
    """The sum over an image whose pixels all count the same on the whole: each output pixel's weights sum to 1."""
    x = torch.from_numpy(X).requires_grad_()
    out = Twin(resize(scales=(1, 1, 2, 2), mode=mode))(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert float(gradient.sum()) == pytest.approx(4 * X.size, rel=1e-5)
    assert bool((gradient > 0).all())


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"coordinate_transformation_mode": "tf_crop_and_resize"}, "tf_crop_and_resize"),
        ({"coordinate_transformation_mode": "half_pixel_symmetric"}, "half_pixel_symmetric"),
        ({"keep_aspect_ratio_policy": "not_larger"}, "not_larger"),
    ],
)
def test_what_it_does_not_know_is_named(attributes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=f"does not support Resize with .*{named}"):
        Twin(resize(sizes=(2, 3, 9, 9), **attributes))(torch.from_numpy(X))
