"""Activation ranges for static INT8: what each tensor of the FP32 graph carries on calibration images.

One pass over the images fills a streaming histogram per tensor (histogram.py), so memory does not
grow with the number of images. Clean and adversarial images are kept apart: a range serves both,
and is judged by the worse of the two errors, so that an attacked activation is not clipped into
something worse than the attacker made it.

Methods: `minmax`, `percentile` (99.99), `entropy` (KL) and `mse`; `auto` tries them all, and two
tighter percentiles, in the graph, and keeps for each tensor what moves the logits least (ranges.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.console import Reporter
from resq_deploy.errors import DataError, ModelError
from resq_deploy.export import grid as grids
from resq_deploy.export import histogram as methods
from resq_deploy.export import ranges
from resq_deploy.export.fisher import rounding_divergence
from resq_deploy.export.grid import Grid
from resq_deploy.export.heap import give_back
from resq_deploy.export.histogram import Histogram

Images = NDArray[np.float32]
Method = Literal["auto", "minmax", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

_CHOOSE: dict[str, Callable[[Histogram], float]] = {
    "mse": methods.mse,
    "entropy": methods.entropy,
    "percentile": methods.percentile,
    "minmax": methods.minmax,
}
_TRIED = _CHOOSE | {
    "percentile-99.9": partial(methods.percentile, percent=99.9),
    "percentile-99": partial(methods.percentile, percent=99.0),
}
_JUDGES = 48  # images that candidates are tried on beside the extreme ones; as many adversarial
_CHUNK_BYTES = 48 * 2**20  # of activations that one run of the graph may hand back


@dataclass(frozen=True, slots=True)
class Range:
    """Range of one activation tensor, and the codes over it (grid.py).

    `low`, `high`: the extremes seen, cut at the threshold; `method` chose the threshold; `sqnr_db`
    is what quantization with it costs on calibration images, the worse of clean and adversarial.
    """

    low: float
    high: float
    grid: Grid
    method: str
    sqnr_db: float

    @property
    def scale(self) -> float:
        """A step from code to code."""
        return self.grid.scale


def calibrate(
    fp32: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Images],
    method: Method = "auto",
    *,
    adversarial: Iterable[Images] = (),
    unsigned: bool = False,
    threads: int | None = None,
    reporter: Reporter | None = None,
    count: int | None = None,
) -> dict[str, Range]:
    """Ranges of `tensors` of an FP32 graph over calibration images.

    `batches`, `adversarial`: float32 [B, C, H, W] in [0, 1], any B, each read once. `unsigned`: U8 codes
    with zero points, not symmetric ones. `threads`: of ONNX Runtime; `count`: images in `batches`, for progress. The
    same images give the same ranges whatever the batch sizes, up to the last place of the runtime's own arithmetic.
    Raises DataError for no images or values that are not finite, ModelError for a tensor that the
    graph does not have.
    """
    if method not in METHODS:
        raise DataError(f"unknown calibration method {method!r}", f"one of: {', '.join(METHODS)}")
    say = reporter or Reporter()
    probe = Probe(fp32, tensors, threads)
    judges = ranges.Judges(_JUDGES), ranges.Judges(_JUDGES)
    clean = observe(probe, batches, say, "calibrating", judges[0], count)
    if not judges[0].seen:
        raise DataError("calibration got no images", "give at least one batch")
    title = "calibrating on adversarial images"
    attacked = observe(probe, adversarial, say, title, judges[1])
    chosen: dict[str, str] = dict.fromkeys(probe.tensors, method)
    if method == "auto" and probe.classifies:
        candidates = {
            name: {
                m: choose(clean[name], attacked[name], m, unsigned=unsigned).grid for m in _TRIED
            }
            for name in probe.tensors
        }
        chosen = _searched(fp32, probe, candidates, judges, threads, say)
    return {
        name: choose(clean[name], attacked[name], chosen[name], unsigned=unsigned)
        for name in probe.tensors
    }


def _searched(
    fp32: onnx.ModelProto,
    probe: Probe,
    candidates: Mapping[str, Mapping[str, Grid]],
    judges: Sequence[ranges.Judges],
    threads: int | None,
    reporter: Reporter,
) -> dict[str, str]:
    """The method of each tensor that moves the logits least."""
    images, weights = ranges.drawn(judges)
    give_back()
    return ranges.search(
        fp32,
        candidates,
        images,
        weights=weights,
        price=lambda: rounding_divergence(fp32, candidates, images, weights, reporter=reporter),
        chunk=probe.chunk,
        threads=threads,
        reporter=reporter,
    )


def observe(
    probe: Probe,
    batches: Iterable[Images],
    reporter: Reporter,
    title: str,
    judges: ranges.Judges | None = None,
    count: int | None = None,
) -> dict[str, Histogram]:
    """Histograms of every tensor of the probe over all batches; `judges` are drawn from them; `count`: of images."""
    if count is None and isinstance(batches, Sequence):
        count = sum(map(len, batches))
    found = {name: Histogram() for name in probe.tensors}
    with reporter.task(title, count, "images") as task:
        for images in batches:
            start = 0
            for size, values in probe.run(images):
                if judges is not None:
                    judges.see(images[start : start + size], values)
                start += size
                for name, value in values.items():
                    _add(found[name], name, value)
                task.advance(size)
    return found


def choose(
    clean: Histogram, attacked: Histogram, method: str = "auto", *, unsigned: bool = False
) -> Range:
    """The range of one tensor from its histograms over clean and over adversarial images (which may be empty).

    `auto` is here the method with the least squared error of the tensor itself; `unsigned`: as in grid.over.
    """
    both = clean.merged(attacked) if attacked.total else clean
    seen = [h for h in (clean, attacked) if h.total]

    def span(threshold: float) -> tuple[float, float]:
        # The threshold is a bin edge or a peak; a tensor of one sign may stop short of it.
        return max(both.low, -threshold), min(both.high, threshold)

    def step(threshold: float) -> float:
        return grids.over(*span(threshold), unsigned=True).scale

    way = step if unsigned else methods.symmetric
    tried = _TRIED | {"mse": partial(methods.mse, step=way)}
    names = tuple(_CHOOSE) if method == "auto" else (method,)
    rated = []
    for name in names:
        threshold = tried[name](both)
        rated.append((max(_relative(h, threshold, way) for h in seen), name, threshold))
    error, name, threshold = min(rated, key=lambda r: r[0])
    low, high = span(threshold)
    return Range(low, high, grids.over(low, high, unsigned=unsigned), name, _decibel(error))


def _relative(histogram: Histogram, threshold: float, step: methods.Step) -> float:
    if histogram.energy == 0:
        return 0.0
    return methods.noise(histogram, threshold, step) * histogram.total / histogram.energy


def _decibel(ratio: float) -> float:
    return float(min(200.0, -10 * np.log10(max(ratio, 1e-20))))


def _add(histogram: Histogram, name: str, value: NDArray[np.float32]) -> None:
    if not np.isfinite(value).all():
        raise DataError(
            f"activation {name!r} is not finite on a calibration image",
            "check the images, the preprocessing and the checkpoint",
        )
    histogram.add(value)


class Probe:
    """The FP32 graph in ONNX Runtime with `tensors` as extra outputs, run in chunks of bounded memory.

    `classifies`: its output is [B, classes] for any B; `chunk`: images in the last run.
    Raises ModelError for a tensor that is neither the graph's input nor computed by one of its nodes.
    """

    def __init__(self, fp32: onnx.ModelProto, tensors: Sequence[str], threads: int | None) -> None:
        self.tensors = tuple(dict.fromkeys(tensors))
        self._input = _network_input(fp32.graph)
        inside = {name for node in fp32.graph.node for name in node.output}
        missing = [t for t in self.tensors if t not in inside and t != self._input.name]
        if missing:
            raise ModelError(f"the graph computes no tensor {missing[0]!r}")
        self._outputs = [t for t in self.tensors if t in inside]
        self._session = _session(with_outputs(fp32, self._outputs), threads)
        give_back()  # the copies of the graph that the session was made of
        batch = self._input.type.tensor_type.shape.dim[0]
        self._fixed = batch.dim_value if batch.HasField("dim_value") else 0
        self.chunk = self._fixed or 1
        rank = len(fp32.graph.output[0].type.tensor_type.shape.dim)
        self.classifies = not self._fixed and rank == 2

    def run(self, images: Images) -> Iterator[tuple[int, Mapping[str, NDArray[np.float32]]]]:
        """(images in the chunk, values by tensor), chunk by chunk."""
        if images.ndim != 4:
            raise DataError(f"calibration images of shape {images.shape}, [B, C, H, W] expected")
        start = 0
        while start < len(images):
            part = np.ascontiguousarray(images[start : start + self.chunk], dtype=np.float32)
            start += len(part)
            yield len(part), self._values(part)

    def _values(self, images: Images) -> dict[str, NDArray[np.float32]]:
        size = len(images)
        if self._fixed > size:
            pad = np.repeat(images[-1:], self._fixed - size, axis=0)
            images = np.concatenate([images, pad])
        feed = {self._input.name: images}
        values = self._session.run(self._outputs, feed) if self._outputs else []
        found = dict(zip(self._outputs, values, strict=True))
        if self._input.name in self.tensors:
            found[self._input.name] = images
        if not self._fixed:
            each = sum(v.nbytes for v in found.values()) // size
            self.chunk = int(min(max(_CHUNK_BYTES // max(each, 1), 1), 256))
        return {name: _head(value, size, len(images)) for name, value in found.items()}


def _head(value: NDArray[np.float32], size: int, padded: int) -> NDArray[np.float32]:
    """Without the rows that padded a short batch."""
    return value[:size] if padded != size and value.ndim and len(value) == padded else value


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of the model with float tensors inside it as outputs too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    for name in tensors:
        if name not in present:
            copy.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    return copy


def _network_input(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise ModelError(f"the graph has {len(inputs)} inputs", "one batch of images is expected")
    found: onnx.ValueInfoProto = inputs[0]
    return found


def _session(model: onnx.ModelProto, threads: int | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it would keep the largest chunk twice
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
