"""Which codes can saturate in 16 bits, and codes that cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import saturation
from resq_deploy.quantization import dequantize, quantize
from resq_deploy.saturation import Pairs, could, kept, neighbours, of_layer, of_window

PRECISE = "session.x64quantprecision"
# channels in and out, kernel, groups
WINDOWS = [(1, 16, 3, 1), (3, 16, 3, 1), (3, 8, 7, 1), (5, 16, 1, 1), (7, 8, 3, 1), (6, 16, 5, 1)]
GROUPS = [(16, 16, 3, 16), (16, 32, 3, 16), (12, 12, 3, 4), (20, 20, 3, 4)]


def conv(weight: NDArray[np.int8], groups: int = 1) -> onnx.ModelProto:
    """U8 images -> Q/DQ convolution -> U8, with steps at which most sums are seen."""
    outputs, inputs, size = weight.shape[:3]
    step = np.float32(inputs * size * size / 64)
    held = {
        "w": weight,
        "ws": np.full(outputs, 1 / 127, np.float32),
        "wz": np.zeros(outputs, np.int8),
        "xs": np.float32(1 / 255),
        "xz": np.uint8(0),
        "ys": step,
        "yz": np.uint8(128),
    }
    shape = ["n", inputs * groups, 6, 6]
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
                helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
                helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
                helper.make_node(
                    "Conv", ["xd", "wd"], ["c"], name="conv", group=groups, pads=[size // 2] * 4
                ),
                helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["yq"]),
                helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
            ],
            "conv",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def run(model: onnx.ModelProto, images: NDArray[np.float32], *, exact: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry(PRECISE, "1")
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": images})[0]


@pytest.mark.parametrize(("inputs", "outputs", "size", "groups"), [*WINDOWS, *GROUPS])
def test_sessions_add_up_exactly_what_fits(
    inputs: int, outputs: int, size: int, groups: int
) -> None:
    """One sign a channel and images near 255: without room every pair would saturate."""
    rng = np.random.default_rng(size)
    sign = rng.choice([-1, 1], (outputs, 1, 1, 1))
    shape = (outputs, inputs // groups, size, size)
    most = (rng.integers(100, 128, shape) * sign).astype(np.int8)
    images = rng.choice([1, 0.97], (2, inputs, 6, 6)).astype(np.float32)
    model = conv(most, groups)
    alone = inputs == outputs == groups
    assert could(model) != alone
    found = saturation.layers(model)
    fit = found["w"][0].fit(most) if found else most
    made = conv(fit, groups)
    assert not could(made)
    exact = run(made, images, exact=True)
    assert np.array_equal(run(made, images, exact=False), exact)
    assert np.ptp(exact) > 0


def test_the_nearest_codes_that_fit() -> None:
    """Against all pairs of codes: none that fits is nearer."""
    pairs = Pairs(0, (neighbours(np.arange(2)),))
    a, b = np.meshgrid(*[np.arange(-127, 128)] * 2, indexing="ij")
    worst = 255 * np.stack(
        [np.maximum(a, 0) + np.maximum(b, 0), np.minimum(a, 0) + np.minimum(b, 0)]
    )
    fits = (worst[0] <= 2**15 - 1) & (worst[1] >= -(2**15))
    every = np.stack([a, b], axis=-1).reshape(-1, 2).astype(np.int8)
    made = pairs.fit(every)
    assert fits[made[:, 0].astype(int) + 127, made[:, 1].astype(int) + 127].all()
    assert np.array_equal(made[fits.reshape(-1)], every[fits.reshape(-1)])
    chosen = np.random.default_rng(0).choice(np.flatnonzero(~fits.reshape(-1)), 50, replace=False)
    good = np.stack([a[fits], b[fits]], axis=-1)
    for i in chosen:
        away = np.square(good - every[i].astype(int)).sum(axis=1).min()
        assert np.square(made[i].astype(int) - every[i].astype(int)).sum() == away


@pytest.mark.parametrize(("channels", "places"), [(1, 9), (3, 9), (4, 9), (5, 1), (7, 4)])
def test_every_weight_of_every_order_has_room(channels: int, places: int) -> None:
    rng = np.random.default_rng(channels)
    pairs = Pairs(0, of_window(channels, places))
    codes = rng.integers(-127, 128, (30, channels, places)).astype(np.int8)
    assert not pairs.fits(codes)
    fit = pairs.fit(codes)
    assert pairs.fits(fit)
    assert (np.abs(fit) <= np.abs(codes.astype(int))).all()
    assert (fit * codes.astype(int) >= 0).all()
    rows = pairs.rows(fit).astype(np.int32)
    low, high = saturation.bounds_of_rows(rows, pairs.partners)
    assert ((low <= rows) & (rows <= high)).all()
    for ends in (low, high):
        for i in rng.choice(rows.shape[1], 5):
            moved = rows.copy()
            moved[:, i] = ends[:, i]
            assert pairs.fits(moved.reshape(fit.shape))
            moved[:, i] += np.sign(ends[:, i])
            free = np.abs(ends[:, i]) == 127
            assert (pairs.unfit(moved.reshape(fit.shape)) | free).all()
    loose = codes.astype(np.float32) + rng.random(codes.shape, np.float32) - 0.5
    settled = pairs.nearest(loose)
    assert np.array_equal(pairs.nearest(settled), settled)
    assert pairs.fits(np.rint(settled).astype(np.int32))
    middle = (fit.astype(np.float32) + np.rint(settled)) / 2
    assert pairs.fits(np.rint(middle).astype(np.int32))  # as distill.between rounds


def test_scales_grow_by_no_more_than_pays() -> None:
    rng = np.random.default_rng(0)
    pairs = Pairs(0, of_window(16, 9))
    weight = rng.normal(size=(32, 16, 9)).astype(np.float32)
    full = saturation.weight_scales(weight, 0, None)
    wide = saturation.weight_scales(weight, 0, pairs)
    assert (wide >= full).all()
    assert (wide <= 2 * full).all()
    assert (wide / full).mean() < 1.5

    def error(scales: NDArray[np.float32]) -> float:
        codes = pairs.fit(quantize(weight, scales))
        return float(np.square(weight - dequantize(codes, scales)).sum())

    assert error(wide) <= min(error(full), error(2 * full))
    sparse = np.zeros((2, 16, 9), np.float32)
    sparse[:, ::2] = rng.normal(size=(2, 8, 9))  # nothing beside anything
    assert np.array_equal(
        saturation.weight_scales(sparse, 0, pairs), saturation.weight_scales(sparse, 0, None)
    )


@pytest.mark.parametrize(
    ("op", "turned", "dims", "axis"),
    [
        ("MatMul", 0, (6, 4), 1),
        ("MatMul", 0, (2, 5, 4), 2),
        ("Gemm", 0, (6, 4), 1),
        ("Gemm", 1, (4, 6), 0),
    ],
)
def test_rows_of_matrices(op: str, turned: int, dims: tuple[int, ...], axis: int) -> None:
    node = helper.make_node(op, ["x", "w"], ["y"])
    if op == "Gemm":
        node.attribute.append(helper.make_attribute("transB", turned))
    pairs = of_layer(node, dims)
    assert pairs is not None
    assert pairs.axis == axis
    (partner,) = pairs.partners
    inputs = dims[1] if turned else dims[-2]
    for start in range(0, len(partner), inputs):
        for i in range(inputs // 2 * 2):
            assert partner[start + i] == start + (i ^ 1)
        assert inputs % 2 == 0 or partner[start + inputs - 1] == len(partner)


def test_what_is_added_up_in_32_bits_has_no_pairs() -> None:
    depthwise = helper.make_node("Conv", ["x", "w"], ["y"], group=8)
    assert of_layer(depthwise, (8, 1, 3, 3)) is None
    assert of_layer(depthwise, (16, 1, 3, 3)) is not None


@pytest.mark.parametrize(
    ("nodes", "dims", "can"),
    [
        ([("ConvTranspose", ["x", "wd"], "y")], (4, 4, 3, 3), True),
        ([("Transpose", ["wd"], "t"), ("MatMul", ["x", "t"], "y")], (6, 4), True),
        ([("Transpose", ["wd"], "t"), ("Gather", ["wd", "i"], "y")], (6, 4), False),
        (
            [("Gather", ["wd", "i"], "g"), ("Reshape", ["g", "i"], "r"), ("Gemm", ["x", "r"], "y")],
            (6, 4),
            True,
        ),
        (
            [("Gather", ["wd", "i"], "g"), ("Add", ["g", "x"], "r"), ("Gemm", ["x", "r"], "y")],
            (6, 4),
            False,
        ),
        ([("Squeeze", ["wd", "i"], "t"), ("Conv", ["x", "t"], "y")], (1, 6, 4, 1, 1), True),
        ([("MatMul", ["x", "wd"], "y"), ("Gemm", ["x", "wd"], "z")], (6, 6), True),
        ([("MatMul", ["x", "wd"], "y")], (6,), True),
        ([("Gather", ["wd", "i"], "y")], (6, 4), False),
        ([("Add", ["x", "wd"], "y")], (6,), False),
        ([], (6, 4), False),
    ],
)
@pytest.mark.parametrize("largest", [64, 120])
def test_what_is_not_known_to_fit_could_saturate(
    nodes: list[tuple[str, list[str], str]], dims: tuple[int, ...], can: bool, largest: int
) -> None:
    held = {"w": np.full(dims, largest, np.int8), "s": np.float32(1), "z": np.int8(0)}
    made = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wd"])]
    made += [helper.make_node(op, inputs, [output]) for op, inputs, output in nodes]
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()]
    graph = helper.make_graph(made, "g", [], [], tensors)
    model = helper.make_model(graph)
    assert could(model) == (can and largest > 64)
    assert kept(model) == {} or largest == 64


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("moves", [(), ("Transpose",), ("Split", "Reshape", "Transpose")])
@pytest.mark.parametrize(("op", "place"), [("MatMul", 0), ("MatMul", 1), ("Einsum", 0)])
def test_products_of_two_activations(
    signed: bool, moves: tuple[str, ...], op: str, place: int
) -> None:
    zero = np.zeros((), np.int8 if signed else np.uint8)
    nodes, read = [helper.make_node("DequantizeLinear", ["a", "s", "z"], ["ad"])], "ad"
    for n, move in enumerate(moves):
        nodes.append(helper.make_node(move, [read], [f"m{n}"]))
        read = f"m{n}"
    nodes.append(helper.make_node(op, [read, "x"] if place == 0 else ["x", read], ["y"]))
    tensors = [
        numpy_helper.from_array(np.asarray(v), n) for n, v in (("s", np.float32(1)), ("z", zero))
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [], tensors))
    assert could(model) == (signed and (op, place) != ("MatMul", 0))


def test_a_file_keeps_what_it_has() -> None:
    free = np.full((4, 4, 3, 3), 100, np.int8)
    assert kept(conv(free)) == {}
    assert set(kept(conv(np.full((4, 4, 3, 3), 64, np.int8)))) == {"w"}
    mixed = free.copy()
    mixed[:, ::2] = -100
    assert set(kept(conv(mixed))) == {"w"}  # 8 bits, and no pair of one sign
