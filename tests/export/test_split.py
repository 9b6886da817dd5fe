"""Channel splitting: the same function, flips that move it less, spent where it saves most; and what prices it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from resq_deploy.export import graph, qdq, rules
from resq_deploy.export.adjust import adjust
from resq_deploy.export.calibrate import Range, calibrate
from resq_deploy.export.design import Design
from resq_deploy.export.distill import draw
from resq_deploy.export.fisher import flip_divergence
from resq_deploy.export.split import Cost, Split, allocate, split
from resq_deploy.export.stage import logits_of
from resq_deploy.export.twin import Twin
from resq_deploy.export.work import work_per_image
from resq_deploy.fault_models import parse, trial_rng
from resq_deploy.memory import fault_space
from resq_deploy.runtime.graph import Graph
from resq_deploy.runtime.lower import lower_graph
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.segments import tensor_types
from resq_deploy.runtime.suffix import SuffixEngine
from tests.export import nets

IMAGES = nets.images(48)
NETS = {"residual": nets.residual, "chain": nets.chain}


def everything_split(fp32: onnx.ModelProto) -> Split:
    weights = [w.name for w in rules.plan(fp32).weights]
    return split(fp32, dict.fromkeys(weights, 1.0), budget=100)


def quantized(fp32: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Range]]:
    ranges = calibrate(fp32, rules.plan(fp32).activations, [IMAGES], threads=1)
    return qdq.quantize_graph(fp32, ranges), ranges


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays(name: str) -> None:
    fp32 = NETS[name]()
    done = everything_split(fp32)
    graph.check(done.model)
    assert set(done.copies.values()) == {16}
    before, after = (logits_of(m, [IMAGES], 1) for m in (fp32, done.model))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_the_graph_given_is_not_touched() -> None:
    fp32 = nets.residual()
    before = fp32.SerializeToString(deterministic=True)
    everything_split(fp32)
    assert fp32.SerializeToString(deterministic=True) == before


def test_matrix_products_are_split_along_their_inputs() -> None:
    rng = np.random.default_rng(0)
    b = nets.Builder()
    flat = b.op("Flatten", "flat", "input")
    b.tensors.append(
        numpy_helper.from_array(rng.standard_normal((144, 20)).astype(np.float32), "m")
    )
    b.nodes.append(helper.make_node("MatMul", [flat, "m"], ["hidden"], name="product"))
    b.gemm("fc", "hidden", 20, nets.CLASSES)
    b.nodes[-1].attribute[0].i = 0  # no transB
    weight = next(t for t in b.tensors if t.name == "fc.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).T.copy(), weight.name))
    fp32 = b.model()
    done = split(fp32, {"m": 1.0, "fc.weight": 1.0}, budget=100)
    assert nets.arrays(done.model)["m"].shape == (16 * 144, 20)
    assert nets.arrays(done.model)["fc.weight"].shape == (16 * 20, nets.CLASSES)
    before, after = (logits_of(m, [IMAGES], 1) for m in (fp32, done.model))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_what_cannot_be_split_is_left_alone() -> None:
    done = everything_split(nets.chain())
    assert "deep.weight" not in done.copies  # depthwise
    fp32 = nets.residual()
    for node in fp32.graph.node:
        if node.name == "conv2":  # conv1 and conv2 now read one weight
            node.input[1] = "conv1.weight"
    assert "conv1.weight" not in split(fp32, {"conv1.weight": 1.0, "fc.weight": 1.0}, 100).copies


def test_layers_that_read_one_tensor_share_its_copies() -> None:
    done = split(nets.residual(), {"conv1.weight": 1.0, "skip.weight": 1.0}, budget=100)
    assert done.sources == {"relu.out.x16": "relu.out"}
    assert [n.op_type for n in done.model.graph.node].count("Concat") == 1


def test_what_is_pooled_before_copies_stays_int8() -> None:
    fp32 = nets.chain()
    done = everything_split(fp32)
    before, after = (
        {n for n, _ in rules.plan(m).reads} | {f.node for f in rules.plan(m).float_ops}
        for m in (fp32, done.model)
    )
    assert after - before == set(done.sources)  # the copies themselves are of INT8 codes
    assert before <= after
    floats = [{f.node for f in rules.plan(m).float_ops} for m in (fp32, done.model)]
    assert floats[0] == floats[1]


@pytest.mark.parametrize("name", NETS)
def test_what_is_copied_are_bytes(name: str) -> None:
    fp32 = everything_split(NETS[name]()).model
    copies = {n.name for n in fp32.graph.node if n.op_type == "Concat"}
    int8, ranges = quantized(fp32)
    scales = qdq.shared_grids(rules.plan(fp32), ranges)
    assert all(scales[n.input[0]] == scales[n.name] for n in fp32.graph.node if n.name in copies)
    lowered = lower_graph(Graph.of(int8))
    kinds = tensor_types(lowered)
    found = [n for n in lowered.nodes if n.op_type == "Concat" and len(set(n.input)) == 1]
    quantizers = [n for n in lowered.nodes if n.op_type == "QuantizeLinear"]
    assert len(found) == len(copies)
    assert all(kinds[n.output[0]] == onnx.TensorProto.UINT8 for n in found)
    assert not {n.input[0] for n in quantizers} & {n.output[0] for n in found}
    with OrtRunner(int8, threads=1) as fast, OrtRunner(int8, threads=1, exact=True) as slow:
        assert np.abs(fast(IMAGES) - slow(IMAGES)).max() < 0.05 * np.abs(slow(IMAGES)).max()


def test_copies_cut_the_noise_of_flips_to_their_share() -> None:
    """E[(y - y')^2] at the output of one layer, by flips in it alone, falls by the number of copies."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 8, 3, 3)).astype(np.float32)}
    noise = []
    for copies in (1, 4):
        scale = np.abs(weights["w"]).max(axis=(1, 2, 3)) / 127 / copies
        parts = np.concatenate([weights["w"] / copies] * copies, axis=1)
        codes = np.rint(parts / scale[:, None, None, None]).astype(np.int8)
        x = np.tile(rng.standard_normal((8, 3, 3)), (copies, 1, 1))
        errors = []
        for _ in range(4000):
            flips = (rng.random((8, codes.size)) < 1e-2).astype(np.uint8)
            masks = np.packbits(flips, axis=0)[0].view(np.int8).reshape(codes.shape)
            moved = ((codes ^ masks).astype(float) - codes) * scale[:, None, None, None]
            errors.append((moved * x).sum(axis=(1, 2, 3)))
        noise.append(np.square(errors).mean())
    assert noise[0] / noise[1] == pytest.approx(4, rel=0.25)


def test_copies_go_where_they_save_most_for_their_work() -> None:
    divergence = {"stem": 0.8, "big": 0.9, "head": 0.01}
    costs = {"stem": Cost(1.0, 0.0), "big": Cost(900.0, 100.0), "head": Cost(0.1, 0.0)}
    assert allocate(divergence, costs, 15, 1.71) == {"stem": 16}
    assert allocate(divergence, costs, 6, 1.71) == {"stem": 4}
    assert allocate(divergence, costs, 0, 1.71) == {}
    assert allocate(divergence, costs, 1e6, 1.71) == {"stem": 16, "big": 16}
    small = allocate({"head": 0.05}, {"head": Cost(0.1, 0.2)}, 15, 1.0)
    assert small == {"head": 4}  # the next doubling would save less than a hundredth of the whole


def test_the_work_that_is_added_stays_within_the_budget() -> None:
    fp32 = nets.residual()
    prices = {"stem.weight": 1.0, "conv1.weight": 0.5, "skip.weight": 0.2, "fc.weight": 0.1}
    for budget in (0.01, 0.1, 0.5):
        done = split(fp32, prices, budget)
        assert 0 < done.work <= budget
        added = work_per_image(done.model) / work_per_image(fp32) - 1
        assert done.work == pytest.approx(added, rel=1e-6)


def test_the_price_of_a_layer_is_what_small_changes_of_its_codes_cost() -> None:
    """Against measured divergence, for flips of the four low bits: a quarter of a thousandth of all flips' power."""
    int8, _ = quantized(nets.residual())
    ber, share = 0.05, sum(4**b for b in range(4)) / sum(4**b for b in range(8))
    priced = flip_divergence(int8, nets.images(200, seed=3), ber)
    twin, images = Twin(int8).eval(), nets.images(200, seed=3)

    def answers() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = twin(torch.from_numpy(images))
            return logits.log_softmax(1)

    golden = answers()
    for name in ("stem.weight", "conv2.weight", "fc.weight"):
        space = fault_space(int8).select(kinds=("weights",), layers=(name,), bits=range(4))
        found = []
        for trial in range(60):
            with twin.flipped(draw(space, ber, np.random.default_rng(trial))):
                found.append(float((golden.exp() * (golden - answers())).sum(1).mean()))
        assert np.mean(found) == pytest.approx(priced[name] * share, rel=0.6)


def test_faults_in_split_layers_run_as_in_all_others() -> None:
    int8, _ = quantized(everything_split(nets.residual()).model)
    with OrtRunner(int8, threads=1) as runner:
        engine = SuffixEngine(runner, IMAGES)
        space = runner.space.select(kinds=("weights",))
        for seed in range(6):
            flips = parse("bits:3").sample(space, trial_rng(seed, 0))
            with runner.faults(flips):
                want = runner(IMAGES)
            assert engine.run(flips).tobytes() == want.tobytes()


@pytest.mark.parametrize("redundancy", [0.0, 0.5])
def test_stage_three_splits_as_much_as_it_is_allowed(
    redundancy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resq_deploy.export import stage

    monkeypatch.setattr(stage, "_STEPS", (2, 2))
    monkeypatch.setattr(stage, "_MORE", 1)
    monkeypatch.setattr(stage, "worthwhile", lambda *_: True)
    fp32 = nets.residual()
    int8, ranges = quantized(fp32)
    made = adjust(int8, fp32, IMAGES, ranges=ranges, design=Design(1e-2, redundancy), threads=1)
    step = next(s for s in made.record.steps if s["step"] == "split")
    assert bool(step["copies"]) == (redundancy > 0)
    assert step["work"] <= redundancy
    assert set(step["divergence"]) == {w.name for w in rules.plan(fp32).weights}
    assert all(nats > 0 for nats in step["divergence"].values())
    assert set(made.ranges) == set(rules.plan(made.fp32).activations)
    before, after = (logits_of(m, [IMAGES], 1) for m in (fp32, made.fp32))
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


def test_a_plan_of_a_split_network_holds_every_copy(tmp_path: Path) -> None:
    from tests.export.engines import located

    int8, _ = quantized(everything_split(nets.residual()).model)
    onnx.save(int8, tmp_path / "m.onnx")
    codes = {k: v for k, v in nets.arrays(int8).items() if v.dtype == np.int8 and v.ndim > 1}
    _, found = located(tmp_path / "m.onnx", codes)
    assert found.coverage == 1.0
