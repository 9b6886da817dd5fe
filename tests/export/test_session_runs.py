"""Graphs by ONNX Runtime's rules where they are run: twin, runner, faults, ordinary sessions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from resq_deploy.export import graph
from resq_deploy.export.twin import Twin
from resq_deploy.fault_models import parse, trial_rng
from resq_deploy.metrics import agreement, sqnr_db
from resq_deploy.runtime import cpu
from resq_deploy.runtime.graph import Graph
from resq_deploy.runtime.lower import lower_graph
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.suffix import SuffixEngine
from tests.export.sessions import KINDS, Capped, Gates, pixels, quantized, session
from tests.helpers import SHAPE, Residual
from tests.qdq import same_under_faults


@pytest.mark.parametrize("kind", KINDS)
def test_twin_runner_and_file_agree(kind: type[nn.Module]) -> None:
    model, x = quantized(kind), pixels(64)
    expected = graph.run(model, x, optimize=False)
    with torch.no_grad():
        twin = Twin(model)(torch.from_numpy(x)).numpy()
    with OrtRunner(model, threads=1) as runner:
        found = runner(x)
    assert agreement(expected, twin) == 1
    assert agreement(expected, found) == 1
    assert sqnr_db(expected, found) > 25


@pytest.mark.parametrize("kind", [Residual, Capped, Gates])
def test_faults_do_in_the_fast_way_what_they_do_in_the_file(kind: type[nn.Module]) -> None:
    model, x = quantized(kind), pixels(8)
    with OrtRunner(model, threads=1) as fast, OrtRunner(model, threads=1, exact=True) as exact:
        assert fast.unnoticed(x) == []
        for memory in ("weights", "bias", "scales", "zero-points"):
            same_under_faults(fast, exact, x, memory, 8, 0.03)


@pytest.mark.parametrize("word", ["seu", "ber:1e-3", "mbu:4"])
@pytest.mark.parametrize("kind", [Residual, Capped, Gates])
def test_trials_give_the_bits_of_full_runs(kind: type[nn.Module], word: str) -> None:
    """Suffixes, single channels and blocks of trials, behind byte kernels of every sort."""
    with OrtRunner(quantized(kind), threads=1) as runner:
        engine = SuffixEngine(runner, pixels(11))
        space, work = runner.space, parse(word)
        flips = [work.sample(space, trial_rng(seed, 0)) for seed in range(40)]
        wanted = []
        for some in flips:
            with runner.faults(some):
                wanted.append(runner(engine.images))
        for some, want in zip(flips, wanted, strict=True):
            assert engine.run(some).tobytes() == want.tobytes()
        for found, want in zip(engine.run_many(flips), wanted, strict=True):
            assert isinstance(found, np.ndarray)
            assert found.tobytes() == want.tobytes()


def test_the_runner_has_byte_kernels_too() -> None:
    found = Counter(node.op_type for node in lower_graph(Graph.of(quantized(Gates))).nodes)
    assert (found["QLinearSigmoid"], found["QLinearMul"], found["QLinearLeakyRelu"]) == (2, 3, 1)
    assert not found["Sigmoid"] + found["Mul"] + found["LeakyRelu"]


def test_saturating_products_show_beside_what_was_validated(tmp_path: Path) -> None:
    """The reason for agreement@stock: without its option a session on such a CPU answers from other sums."""
    model, x = onnx.ModelProto(), np.ones((16, *SHAPE), np.float32)
    model.CopyFrom(quantized(Residual))
    for tensor in model.graph.initializer:
        codes = numpy_helper.to_array(tensor)
        if codes.dtype == np.int8 and codes.ndim == 4 and codes.shape[1] > 1:
            tensor.CopyFrom(numpy_helper.from_array(np.full_like(codes, 127), tensor.name))
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected, (answer,) = graph.run(model, x, optimize=False), plain.run(None, {"input": x})
    exact = session(model, tmp_path / "o.onnx")[0].run(None, {"input": x})[0]
    assert graph.apart(expected, exact) < 0.1
    assert (graph.apart(expected, answer) > 0.1) == cpu.saturates()
