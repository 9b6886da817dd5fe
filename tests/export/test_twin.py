"""The twin against ONNX Runtime with optimizations off: forward, backward, learning, flips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from resq_deploy import saturation
from resq_deploy.errors import FaultError, ModelError
from resq_deploy.export import graph, qdq, rules
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.dialect import ONNXRUNTIME, Dialect
from resq_deploy.export.twin import Twin
from resq_deploy.faults import Fault, FaultSpace, flipped
from resq_deploy.memory import fault_space
from tests.export import nets
from tests.export.twins import I64, artifact, logits_of, model_of, pair, run_ort, whole

ARCHITECTURES = {
    "resnet8": {},
    "resnet18": {"width": 16},
    "vgg16": {},
    "efficientnet_b0": {},
    "swin_t": {},
}
WEIGHT = "layer1.conv1.weight"


@dataclass(frozen=True)
class Case:
    fp32: nn.Module
    model: onnx.ModelProto
    images: NDArray[np.float32]


def make(arch: str, args: Mapping[str, Any]) -> Case:
    module = whole(arch, args)
    fp32 = graph.to_onnx(module, (3, 32, 32), name=arch)
    images = np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32)
    return Case(
        module,
        qdq.quantize_graph(fp32, calibrate(fp32, rules.plan(fp32).activations, [images])),
        images,
    )


@pytest.fixture(scope="module")
def case() -> Case:
    return make("resnet8", {})


def quantized(model: onnx.ModelProto) -> list[str]:
    return [n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]


@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[pytest.mark.slow] if a == "swin_t" else []) for a in ARCHITECTURES],
)
def test_every_code_equals_onnx_runtime_but_for_one_step_on_rare_ties(arch: str) -> None:
    """Each Q is compared with what ONNX Runtime makes of the same codes, so that one tie does not spread."""
    case = make(arch, ARCHITECTURES[arch])
    twin = Twin(case.model)
    names = quantized(case.model)
    wanted = dict(zip(names, run_ort(case.model, {"input": case.images}, names), strict=True))
    steps = forced(twin, case.images, wanted)
    assert steps.keys() == wanted.keys()
    differ = np.concatenate([d.ravel() for d in steps.values()])
    assert differ.max() <= 1
    assert np.count_nonzero(differ) <= max(2, 1e-5 * differ.size)


def forced(
    twin: Twin, images: NDArray[np.float32], wanted: Mapping[str, NDArray[np.int8]]
) -> dict[str, NDArray[np.int64]]:
    """Difference in codes at each Q, where everything after it reads the wanted codes instead of the twin's."""
    fused = {node.outputs: name for name, node in twin._plan.fused.items()}
    values: dict[str, Tensor] = {twin._input: torch.from_numpy(images)}
    steps = {}
    with torch.no_grad():
        for step in twin._plan.steps:
            made = twin._compute(step, values)
            if (name := fused.get(step.node.outputs)) is not None:
                scale = twin.parameters_by_initializer[step.node.inputs[1]]
                code = torch.from_numpy(wanted[name].astype(np.float32))
                steps[name] = (made[0] / scale - code).round().abs().long().numpy()
                made = (code * scale,)
            values |= dict(zip(step.node.outputs, made, strict=True))
    return steps


def test_logits_and_codes_equal_onnx_runtime(case: Case) -> None:
    twin = Twin(case.model)
    names = quantized(case.model)
    wanted = run_ort(case.model, {"input": case.images}, names)
    with torch.no_grad():
        found = twin.tensors(torch.from_numpy(case.images), names)
    differ = sum(int((found[n].numpy() != w).sum()) for n, w in zip(names, wanted, strict=True))
    assert differ <= 1e-3 * sum(w.size for w in wanted)  # a tie spreads to what reads it
    logits = artifact(case.model, case.images)
    np.testing.assert_allclose(logits_of(twin, case.images), logits, atol=1e-3)


def test_reads_a_file_and_refuses_an_unknown_tensor(case: Case, tmp_path: Any) -> None:
    onnx.save(case.model, tmp_path / "model.onnx")
    twin = Twin(tmp_path / "model.onnx")
    assert np.array_equal(logits_of(twin, case.images), logits_of(Twin(case.model), case.images))
    with pytest.raises(ModelError, match="no tensor 'nothing'"):
        twin.tensors(torch.from_numpy(case.images), ["nothing"])


def test_gradient_follows_the_fp32_network(case: Case) -> None:
    gradients = []
    for network in (Twin(case.model), case.fp32):
        x = torch.from_numpy(case.images).requires_grad_()
        (gradient,) = torch.autograd.grad(network(x)[:, 3].sum(), x)
        gradients.append(gradient.flatten())
    cosine = float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))
    assert cosine > 0.9


def test_nothing_needs_a_gradient_until_it_is_learnable(case: Case) -> None:
    twin = Twin(case.model)
    assert not list(twin.parameters())
    assert not twin(torch.from_numpy(case.images)).requires_grad
    learned = twin.learnable([WEIGHT, "layer1.conv1.bias"])
    assert {id(p) for p in twin.parameters()} == {id(p) for p in learned.values()}


def test_shadows_learn_and_are_written_back(case: Case) -> None:
    twin = Twin(case.model)
    before = logits_of(twin, case.images)
    names = [WEIGHT, "layer1.conv1.bias", f"{WEIGHT}.scale"]
    learned = twin.learnable(names)
    assert np.array_equal(logits_of(twin, case.images), before)
    twin(torch.from_numpy(case.images))[:, 0].sum().backward()
    for name, parameter in learned.items():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        learned[WEIGHT].add_(1.4)
        learned["layer1.conv1.bias"].add_(0.125)
    model = twin.to_model()
    np.testing.assert_allclose(
        artifact(model, case.images), logits_of(twin, case.images), atol=1e-3
    )
    changed = numpy_helper.to_array(initializer(model, WEIGHT)).astype(int)
    old = numpy_helper.to_array(initializer(case.model, WEIGHT)).astype(int)
    assert np.array_equal(changed, np.minimum(old + 1, 127))
    twin.freeze()
    assert not list(twin.parameters())
    assert twin.to_model() == model
    assert not np.array_equal(logits_of(twin, case.images), before)


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    found: TensorProto = next(t for t in model.graph.initializer if t.name == name)
    return found


def test_an_untouched_twin_writes_the_same_graph(case: Case) -> None:
    assert Twin(case.model).to_model() == case.model


def test_a_shadow_out_of_range_can_come_back_but_not_go_further(case: Case) -> None:
    twin = Twin(case.model)
    shadow = twin.learnable([WEIGHT])[WEIGHT]
    with torch.no_grad():
        shadow.view(-1)[0], shadow.view(-1)[1] = 130.0, -130.0
    value = twin._value(WEIGHT).view(-1)
    assert value[:2].tolist() == [127, -127]
    for sign in (1.0, -1.0):
        (gradient,) = torch.autograd.grad((sign * twin._value(WEIGHT)).sum(), shadow)
        assert gradient.view(-1)[:3].tolist() == [max(sign, 0.0), min(sign, 0.0), sign]


def test_pairs_that_fit_go_on_to_fit() -> None:
    """Whatever an optimizer does to the shadows, and without moving any that fit."""
    dialect = Dialect("onnxruntime", overflow_fix=True)
    fp32, generator = nets.residual(), torch.Generator().manual_seed(0)
    ranges = calibrate(
        fp32, dialect.plan(fp32).activations, [nets.images(16)], unsigned=True, threads=1
    )
    model = qdq.quantize_graph(fp32, ranges, dialect=dialect)
    twin = Twin(model)
    names = [*saturation.layers(model)]
    shadows = twin.learnable(names)
    twin.settle()
    assert twin.to_model() == model
    with torch.no_grad():
        for shadow in shadows.values():
            shadow.add_(60 * torch.randn(shadow.shape, generator=generator))
    assert not saturation.could(twin.to_model())
    twin.settle()
    for name, shadow in shadows.items():
        assert np.array_equal(twin.codes(name).numpy(), shadow.detach().round().numpy())
    before = {name: shadow.detach().clone() for name, shadow in shadows.items()}
    twin.settle()
    assert all(torch.equal(shadows[name], old) for name, old in before.items())
    twin.freeze()
    assert not saturation.could(twin.to_model())
    free = Twin(qdq.quantize_graph(fp32, ranges, dialect=ONNXRUNTIME))
    (loose,) = free.learnable(["conv1.weight"]).values()
    with torch.no_grad():
        loose.fill_(127)
    free.settle()
    assert float(loose.detach().min()) == 127


def test_writing_a_live_tensor_changes_forward(case: Case) -> None:
    twin = Twin(case.model)
    before = logits_of(twin, case.images)
    live = twin.parameters_by_initializer["fc.bias"]
    live += 1.0
    np.testing.assert_allclose(logits_of(twin, case.images), before + 1, atol=1e-5)
    live -= 1.0
    codes = twin.parameters_by_initializer[WEIGHT]
    assert codes.dtype == torch.int8
    codes.view(-1)[:50] = 0
    assert not np.array_equal(logits_of(twin, case.images), before)


@pytest.mark.parametrize("kind", ["weights", "bias", "scales"])
def test_flips_equal_a_graph_with_flipped_bytes(case: Case, kind: str) -> None:
    space = fault_space(case.model).select([kind], bits=[3, 6])
    flips = space.flips(np.arange(0, space.size, max(1, space.size // 40)))
    twin = Twin(case.model)
    before = logits_of(twin, case.images)
    with twin.flipped(flips):
        inside = logits_of(twin, case.images)
    assert np.array_equal(logits_of(twin, case.images), before)
    faulty = onnx.ModelProto()
    faulty.CopyFrom(case.model)
    for tensor in faulty.graph.initializer:
        if tensor.name in flips:
            bytes_of = flipped(space.by_name[tensor.name], flips[tensor.name])
            tensor.CopyFrom(numpy_helper.from_array(bytes_of, tensor.name))
    np.testing.assert_allclose(inside, artifact(faulty, case.images), atol=1e-3)
    assert kind != "weights" or not np.array_equal(inside, before)


@given(bit=st.integers(0, 7), element=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_a_flipped_shadow_has_the_flipped_code_and_an_undisturbed_gradient(
    tiny: tuple[Twin, FaultSpace], bit: int, element: int
) -> None:
    twin, space = tiny
    flips = space.flips_of([Fault(WEIGHT, element, bit)])
    shadow = twin.learnable([WEIGHT])[WEIGHT]
    with twin.flipped(flips):
        value = twin._value(WEIGHT)
        (gradient,) = torch.autograd.grad(value.sum(), shadow)
    wanted = flipped(space.by_name[WEIGHT], flips[WEIGHT])
    assert np.array_equal(value.detach().numpy().astype(np.int8), wanted)
    assert bool((gradient == 1).all())


@pytest.fixture(scope="module")
def tiny(case: Case) -> tuple[Twin, FaultSpace]:
    return Twin(case.model), fault_space(case.model)


def test_flip_blocks_do_not_nest_and_know_their_tensors(case: Case) -> None:
    twin, space = Twin(case.model), fault_space(case.model)
    flips = space.flips(np.array([5]))
    with twin.flipped(flips), pytest.raises(FaultError, match="do not nest"), twin.flipped(flips):
        pass
    other = Twin(pair(0.1, 0))
    with pytest.raises(FaultError, match="no tensor"), other.flipped(flips):
        pass


@pytest.mark.parametrize(
    ("name", "message"), [("no.such", "no initializer"), ("shape", "cannot be learned")]
)
def test_only_codes_and_floats_are_learnable(name: str, message: str) -> None:
    reshape = helper.make_node("Reshape", ["x", "shape"], ["y"])
    constants = [numpy_helper.from_array(np.array([-1, 2], I64), "shape")]
    with pytest.raises(ModelError, match=message):
        Twin(model_of([reshape], constants, {"x": (4,)})).learnable([name])
