"""What the export benchmark measures of one network, in parts that are kept one by one. Part of export.py."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from export_material import SPEED_BATCH, Images, Material, Setup, ours
from numpy.typing import NDArray
from scipy import stats

BERS = (1e-3, 3e-3, 1e-2)
EPS = 8 / 255

Trials = dict[tuple[str, float], list[float]]


@dataclass(frozen=True)
class Graphs:
    """One network's graphs, ours made when first asked for."""

    m: Material
    setup: Setup

    @cached_property
    def plain(self) -> onnx.ModelProto:
        """INT8 without stage III."""
        return ours(self.m, self.setup, None)

    @cached_property
    def adjusted(self) -> dict[float, onnx.ModelProto]:
        """INT8 with stage III, by design BER."""
        return {ber: ours(self.m, self.setup, ber) for ber in self.setup.design}

    @cached_property
    def others(self) -> dict[str, onnx.ModelProto]:
        """What other quantizers make of it."""
        import export_peers as peers

        m = self.m
        made = {
            f"quantize_static {way}": peers.ort_static(m.fp32, m.calibration, way)
            for way in peers.METHODS
        }
        return {**made, "nncf": peers.nncf_ptq(m.fp32, m.calibration)}

    @property
    def first(self) -> onnx.ModelProto:
        """That of the first design BER."""
        return self.adjusted[self.setup.design[0]]

    @property
    def digest(self) -> str:
        """Which graphs those are, so that parts measured on different days can be held against each other."""
        return digest(self.adjusted.values())

    @property
    def source(self) -> str:
        """Which network it is."""
        return digest([self.m.fp32])


def digest(models: Iterable[onnx.ModelProto]) -> str:
    """12 hex digits of the sha256 of graphs."""
    sha = hashlib.sha256()
    for model in models:
        sha.update(model.SerializeToString(deterministic=True))
    return sha.hexdigest()[:12]


def accuracies(graphs: Graphs) -> dict[str, Any]:
    """Accuracy and agreement of all, fault-free; whether TensorRT-RTX builds ours."""
    from resq_deploy.metrics import accuracy, agreement

    m, setup = graphs.m, graphs.setup
    exact = run(m.fp32, m.test, setup)
    models = graphs.others
    others = {name: run(model, m.test, setup) for name, model in models.items()}
    mine = {
        "plain": deployed(graphs.plain, m.test, setup),
        "int8": deployed(graphs.first, m.test, setup),
    }
    scores = {name: accuracy(logits, m.labels) for name, logits in (others | mine).items()}
    agrees = {name: agreement(exact, logits) for name, logits in (others | mine).items()}
    static = {k: v for k, v in scores.items() if k.startswith("quantize")}
    best = max(static, key=lambda k: static[k])
    rivals = {"fp32": exact, "quantize_static": others[best], "nncf": others["nncf"]}
    return {
        "fp32": accuracy(exact, m.labels),
        "int8": scores["int8"],
        "int8_plain": scores["plain"],
        "agreement": agrees["int8"],
        "agreements": agrees,
        "quantize_static": static[best],
        "quantize_static_by_method": static,
        "nncf": scores["nncf"],
        "ahead_of": {k: ahead(mine["int8"], v, m.labels) for k, v in rivals.items()},
        "tensorrt_rtx": builds(graphs.first),
    }


def under_flips(graphs: Graphs) -> dict[str, Any]:
    """Accuracy under bit flips of ours, with and without stage III."""
    from resq_deploy.metrics import accuracy

    m, setup = graphs.m, graphs.setup
    here = m.test[: setup.faulty]
    exact = accuracy(run(m.fp32, here, setup), m.labels[: setup.faulty])
    chosen = f"design {setup.design[0]:g}"
    adjusted = {f"design {ber:g}": model for ber, model in graphs.adjusted.items()}
    trials = flipped({"plain": graphs.plain} | adjusted, m, setup)
    flips = {graph: interval(shares) for graph, shares in trials.items()}
    return {
        "fp32_of_flipped": exact,
        "int8_at_ber": {f"{b:g}": [flips["plain", b][0], flips[chosen, b][0]] for b in BERS},
        "flips": [[name, ber, *value] for (name, ber), value in flips.items()],
        "gains": gains(trials),
        "recovered": recovered(trials, exact),
    }


def under_attack(graphs: Graphs) -> dict[str, Any]:
    """Accuracy under white-box PGD-20 at 8/255, each graph attacked through itself; ours above FP32's."""
    from resq_deploy.bundle import Sample
    from resq_deploy.export.craft import craft
    from resq_deploy.export.twin import Twin
    from resq_deploy.metrics import accuracy

    m, setup = graphs.m, graphs.setup
    count = setup.attacked
    sample = Sample(m.test[:count], m.labels[:count], np.arange(count))
    models = {"fp32": m.fp32, "plain": graphs.plain, "int8": graphs.first}
    answers = {}
    for name, model in models.items():
        if name == "int8" and model == models["plain"]:
            answers[name] = answers["plain"]
            continue
        hard = craft(Twin(model), sample, "pgd", EPS, steps=20, seed=setup.seed)
        answers[name] = (run if name == "fp32" else deployed)(model, hard, setup)
    right = {name: accuracy(logits, sample.labels) for name, logits in answers.items()}
    return {
        "pgd_fp32": right["fp32"],
        "pgd_int8_plain": right["plain"],
        "pgd_int8": right["int8"],
        "pgd_ahead_of_fp32": {
            name: ahead(answers[name], answers["fp32"], sample.labels) for name in ("plain", "int8")
        },
    }


def peers_under_flips(graphs: Graphs) -> dict[str, Any]:
    """Accuracy under bit flips of other quantizers' files, as `resq-export FILE.onnx` takes them in."""
    from resq_deploy.export.qdq_file import canonical
    from resq_deploy.metrics import accuracy

    m, setup = graphs.m, graphs.setup
    scores = {name: accuracy(run(g, m.test, setup), m.labels) for name, g in graphs.others.items()}
    best = max((name for name in scores if name != "nncf"), key=lambda name: scores[name])
    chosen = {"quantize_static": graphs.others[best], "nncf": graphs.others["nncf"]}
    trials = flipped({name: canonical(model) for name, model in chosen.items()}, m, setup)
    return {
        "peer_flips": [[name, ber, *interval(shares)] for (name, ber), shares in trials.items()]
    }


def modelopt(graphs: Graphs) -> dict[str, Any]:
    """ModelOpt's file: accuracy, agreement with FP32, accuracy under flips."""
    from importlib.metadata import version

    import export_peers as peers

    from resq_deploy.export.qdq_file import canonical
    from resq_deploy.metrics import accuracy, agreement

    m, setup = graphs.m, graphs.setup
    made = peers.modelopt_ptq(m.fp32, m.calibration)
    exact, logits = (run(model, m.test, setup) for model in (m.fp32, made))
    trials = flipped({"modelopt": canonical(made)}, m, setup)
    return {
        "modelopt_version": version("nvidia-modelopt"),
        "modelopt": accuracy(logits, m.labels),
        "modelopt_agreement": agreement(exact, logits),
        "modelopt_ahead_of_fp32": ahead(logits, exact, m.labels),
        "modelopt_flips": [
            [name, ber, *interval(shares)] for (name, ber), shares in trials.items()
        ],
    }


def run(model: onnx.ModelProto, images: Images, setup: Setup) -> NDArray[np.float32]:
    """Logits by stock ONNX Runtime."""
    import export_peers as peers

    session = peers.session(model, setup.threads)
    parts = [session(images[i : i + SPEED_BATCH])[0] for i in range(0, len(images), SPEED_BATCH)]
    logits: NDArray[np.float32] = np.concatenate(parts)
    return logits


def deployed(model: onnx.ModelProto, images: Images, setup: Setup) -> NDArray[np.float32]:
    """Logits by the runner that resq-validate uses."""
    from resq_deploy.runtime.ort import OrtRunner

    with OrtRunner(model, threads=setup.threads) as runner:
        return runner(images)


def ahead(
    logits: NDArray[np.float32], rival: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[float, float, float]:
    """What accuracy is above a rival's, image by image: mean, low and high of the 95% interval."""
    from resq_deploy.metrics import top1

    right, other = (top1(x) == labels for x in (logits, rival))
    return interval((right.astype(np.float64) - other).tolist())


def flipped(models: dict[str, onnx.ModelProto], m: Material, setup: Setup) -> Trials:
    """(graph, BER) -> accuracy of each trial; flips by the same seeds for every graph."""
    from resq_deploy.fault_models import parse, trial_rng
    from resq_deploy.memory import fault_space
    from resq_deploy.metrics import accuracy
    from resq_deploy.runtime.ort import OrtRunner

    images, labels = m.test[: setup.faulty], m.labels[: setup.faulty]
    found: Trials = {}
    for name, model in models.items():
        if name != "plain" and model == models.get("plain"):
            found |= {(name, ber): found["plain", ber] for ber in BERS}
            continue
        space = fault_space(model).select(kinds=("weights",))
        with OrtRunner(model, threads=setup.threads) as runner:
            for ber in BERS:
                fault = parse(f"ber:{ber:g}")
                shares = []
                for trial in range(setup.trials_at(ber)):
                    with runner.faults(fault.sample(space, trial_rng(setup.seed, trial))):
                        shares.append(accuracy(runner(images), labels))
                found[name, ber] = shares
    return found


def gains(trials: Trials) -> list[list[Any]]:
    """[graph, BER, mean, low, high]: accuracy above that of plain INT8, trial by trial, 95%."""
    return [
        [name, ber, *interval(np.subtract(shares, trials["plain", ber]).tolist())]
        for (name, ber), shares in trials.items()
        if name != "plain"
    ]


def recovered(trials: Trials, fp32: float) -> list[list[Any]]:
    """[graph, BER, share, low, high]: of what plain INT8 loses, what a graph takes back; trial by trial, 95%."""
    lost = {ber: fp32 - float(np.mean(trials["plain", ber])) for _, ber in trials}
    return [
        [name, ber, *(round(v / lost[ber], 3) for v in gained)]
        for name, ber, *gained in gains(trials)
        if lost[ber] > 0
    ]


def interval(shares: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high of the 95% interval."""
    mean, error = float(np.mean(shares)), float(stats.sem(shares))
    half = error * float(stats.t.ppf(0.975, len(shares) - 1))
    return mean, mean - half, mean + half


def builds(model: onnx.ModelProto) -> str:
    """TensorRT-RTX's version if it builds the file, else its reason."""
    from resq_deploy.errors import ResqError
    from resq_deploy.export.engine import build_engine

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, f"{folder}/model.onnx")
        try:
            return build_engine(f"{folder}/model.onnx", f"{folder}/model.plan", sm=("86",)).version
        except ResqError as error:
            return f"failed: {error}"
