"""Which range of each tensor is best for the network: candidates judged by what they do to its logits.

A local error is not what a range is for. Where a few channels carry large values that all classes
share, a range that is best for the tensor can drown what tells classes apart. So the candidates of all
tensors are tried in the graph itself: its activations are rounded as INT8 would, with scales and zero points as
inputs of one session, and what counts is

    KL(softmax(f(x)) || softmax(g(x; scales)))

on some calibration images: the first ones, and those in which some tensor is largest of all. A range that is good for
most images may ruin the few that run out of it, and on heavy tails those few are most of the mean; so they are drawn
on purpose, and weighed as what they are, one image each (stratified sampling).

The start is the best single method for all tensors, and where that is already as good as it matters, it stays. Else it
is for each tensor the one that gradients say costs least (fisher.py), if that is better. Then, tensor by tensor,
another candidate is taken where it lowers the divergence. Those that cost most come first; where there are no
gradients, those with the widest choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from resq_deploy.console import Reporter
from resq_deploy.export.grid import Grid

Images = NDArray[np.float32]
Weights = NDArray[np.float64]
Prices = Mapping[str, Mapping[str, float]]  # tensor -> method -> nats

GOOD_ENOUGH = 5e-4  # nats: below, not one image in a thousand changes its top-1
TRIES = 8  # runs of the sample after these starts: more only fit it
_EACH = 2  # of them for one tensor, where prices say which are worth it
_BETTER = 0.98  # of the divergence: what another candidate must reach
_ALIKE = 1.03  # candidates whose scales are nearer than this are one


def search(
    fp32: onnx.ModelProto,
    candidates: Mapping[str, Mapping[str, Grid]],
    images: Images,
    *,
    weights: Weights | None = None,
    price: Callable[[], Prices] | None = None,
    chunk: int = 64,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> dict[str, str]:
    """Method by tensor. `candidates`: tensor -> method -> grid, the same methods for each.

    `images`: float32 [B, C, H, W]; every try runs them once, `chunk` at a time; `weights`: what each of them
    stands for, float64 [B], 1 in sum (all alike by default). `price`: what each candidate is
    expected to cost, asked for where the start is not good enough.
    """
    if not candidates:
        return {}
    methods = list(next(iter(candidates.values())))
    rounded = {name: candidates[name][methods[0]].unsigned for name in candidates}
    trial = _Trial(fp32, rounded, images, chunk, threads, weights)
    say, uniform = reporter or Reporter(), dict[str, float]()
    with say.task("one method for all ranges", len(methods), "methods") as task:
        for method in methods:
            uniform[method] = trial.divergence({t: candidates[t][method] for t in candidates})
            task.advance(1)
    best = min(methods, key=lambda m: uniform[m])
    chosen, least = dict.fromkeys(candidates, best), uniform[best]
    prices = price() if price is not None and least > GOOD_ENOUGH else {}
    if prices:
        cheapest = {t: min(methods, key=prices[t].__getitem__) for t in candidates}
        found = trial.divergence({t: candidates[t][m] for t, m in cheapest.items()})
        if found < least:
            chosen, least = cheapest, found
    if least <= GOOD_ENOUGH:
        return chosen
    order = sorted(
        candidates,
        key=lambda t: -(prices[t][chosen[t]] if prices else _spread(candidates[t])),
    )
    planned = list[tuple[str, str]]()
    for name in order:
        others = _others(candidates[name], chosen[name])
        if prices:
            others = sorted(others, key=prices[name].__getitem__)[:_EACH]
        planned += [(name, method) for method in others]
    planned = planned[:TRIES]
    with say.task("choosing ranges", len(planned), "tries") as task:
        for done, (name, method) in enumerate(planned):
            if least <= GOOD_ENOUGH:
                task.advance(len(planned) - done)
                break
            grids = {t: candidates[t][chosen[t]] for t in candidates}
            found = trial.divergence(grids | {name: candidates[name][method]})
            if found < least * _BETTER:
                chosen[name], least = method, found
            task.note(f"KL {least:.5f}")
            task.advance(1)
    return chosen


def _spread(grids: Mapping[str, Grid]) -> float:
    scales = [grid.scale for grid in grids.values()]
    return max(scales) / min(scales)


def _others(grids: Mapping[str, Grid], chosen: str) -> list[str]:
    """Methods whose scale differs from the chosen one, and from each other."""
    taken, found = [grids[chosen].scale], []
    for method, grid in grids.items():
        scale = grid.scale
        if all(max(scale, t) > _ALIKE * min(scale, t) for t in taken):
            taken.append(scale)
            found.append(method)
    return found


class Judges:
    """Of the images that pass by: the first `count`, and for each tensor the one in which it is largest."""

    def __init__(self, count: int) -> None:
        self.seen = 0
        self._count = count
        self._first: list[Images] = []
        self._extreme: dict[str, tuple[float, int, Images]] = {}

    def see(self, images: Images, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Some images, float32 [B, C, H, W], and their activations, [B, ...]."""
        self._first += [np.array(x, np.float32) for x in images[: max(self._count - self.seen, 0)]]
        for name, value in values.items():
            if len(value) != len(images):
                continue
            flat = value.reshape(len(value), -1)
            peaks = np.maximum(flat.max(axis=1), -flat.min(axis=1))
            most = int(peaks.argmax())
            if name not in self._extreme or peaks[most] > self._extreme[name][0]:
                image = np.array(images[most], np.float32)
                self._extreme[name] = (float(peaks[most]), self.seen + most, image)
        self.seen += len(images)

    def drawn(self) -> tuple[list[Images], list[float]]:
        """The images, and what share of all that were seen each stands for."""
        extreme = {index: image for _, index, image in self._extreme.values()}
        usual = [i for i in range(len(self._first)) if i not in extreme]
        each = (self.seen - len(extreme)) / max(len(usual), 1)
        images = [*(self._first[i] for i in usual), *extreme.values()]
        shares = [each] * len(usual) + [1.0] * len(extreme)
        return images, [share / sum(shares) for share in shares]


def drawn(judges: Sequence[Judges]) -> tuple[Images, Weights]:
    """Images and weights of several groups, each of which counts as much as the others; 1 in sum."""
    groups = [judge.drawn() for judge in judges if judge.seen]
    images = np.stack([image for found, _ in groups for image in found])
    weights = np.array([share / len(groups) for _, shares in groups for share in shares])
    return images, weights


def even(images: Images) -> Weights:
    """Weights of images that all count alike."""
    return np.full(len(images), 1 / max(len(images), 1))


class _Trial:
    """The FP32 graph with rounded activations in one session, and FP32's own log-probabilities."""

    def __init__(
        self,
        fp32: onnx.ModelProto,
        tensors: Mapping[str, bool],
        images: Images,
        chunk: int,
        threads: int | None,
        weights: Weights | None = None,
    ) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # it would keep the largest chunk of each session
        if threads is not None:
            options.intra_op_num_threads = threads
        plain, rounded = (
            ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            for model in (fp32, rounded_graph(fp32, tensors))
        )
        self._session = rounded
        self._output = fp32.graph.output[0].name
        self._input = plain.get_inputs()[0].name
        self._weights = even(images) if weights is None else weights
        self._parts = [images[i : i + chunk] for i in range(0, len(images), chunk)]
        self._reference = log_softmax(self._run(plain, {}))

    def divergence(self, grids: Mapping[str, Grid]) -> float:
        """Mean KL from FP32 in nats; infinite where a logit is not finite."""
        logits = self._run(self._session, grid_inputs(grids))
        if not np.isfinite(logits).all():
            return float("inf")
        p, q = self._reference, log_softmax(logits)
        return float(self._weights @ (np.exp(p) * (p - q)).sum(axis=1))

    def _run(self, session: Any, given: Mapping[str, Any]) -> NDArray[np.float32]:
        runs = (session.run([self._output], {self._input: x, **given})[0] for x in self._parts)
        return np.concatenate(list(runs))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows of log-probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    made: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return made


def grid_inputs(grids: Mapping[str, Grid]) -> dict[str, NDArray[Any]]:
    """What a rounded graph is given for these grids, by tensor: scales and zero points."""
    given: dict[str, NDArray[Any]] = {}
    for name, grid in grids.items():
        scale, zero = _names(name)
        given[scale] = np.asarray(grid.scale, np.float32)
        given[zero] = np.asarray(grid.zero_point, grid.dtype)
    return given


def _names(tensor: str) -> list[str]:
    return [f"{tensor}.trial_scale", f"{tensor}.trial_zero_point"]


def rounded_graph(fp32: onnx.ModelProto, tensors: Mapping[str, bool]) -> onnx.ModelProto:
    """A copy of the graph that reads `tensors` through Q/DQ only, whose grids are inputs (grid_inputs).

    `tensors`: name -> whether its codes are unsigned.
    """
    model = onnx.ModelProto()
    model.CopyFrom(fp32)
    graph = model.graph
    wanted = set(tensors)
    nodes: list[onnx.NodeProto] = []
    for value in fp32.graph.input:
        nodes += _pair(value.name) if value.name in wanted else []
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in wanted:
                node.input[position] = f"{name}.trial"
        nodes.append(node)
        for name in node.output:
            nodes += _pair(name) if name in wanted else []
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    for name, unsigned in tensors.items():
        codes = TensorProto.UINT8 if unsigned else TensorProto.INT8
        for given, kind in zip(_names(name), (TensorProto.FLOAT, codes), strict=True):
            graph.input.append(helper.make_tensor_value_info(given, kind, []))
    return model


def _pair(name: str) -> list[onnx.NodeProto]:
    constants = _names(name)
    return [
        helper.make_node("QuantizeLinear", [name, *constants], [f"{name}.trial_code"]),
        helper.make_node("DequantizeLinear", [f"{name}.trial_code", *constants], [f"{name}.trial"]),
    ]
