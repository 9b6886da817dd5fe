"""MODEL.onnx -> the same graph, taking pixels: whoever wrote the file, and however it likes its images.

    source = read(path, load(path), input_shape=(3, 32, 32), mean=(0.5,), std=(0.25,))
    source.model        float32 [batch, 3, 32, 32] in [0, 1] -> logits [batch, classes]
    source.quantized    whether the file has Q/DQ already

What is changed, and nothing else: the input becomes `input` in NCHW with its normalization in front, the output
`logits`; a batch that the file fixes becomes free; a Softmax at the end is left out, since the answer is the same and
attacks need logits. The result is held against the file in ONNX Runtime before anybody uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import inliner

from resq_deploy.errors import IntegrityError, ModelError, ResqError
from resq_deploy.export import fold, graph, onnx_ends
from resq_deploy.onnx_file import read_onnx

Shape = tuple[int, int, int]

OLDEST = 13  # opset; from here on operators mean what they mean today, and Q/DQ have channels
_DQ, _Q = "DequantizeLinear", "QuantizeLinear"
_FUSED = frozenset(
    {
        *("QLinearConv", "QLinearMatMul", "QLinearAdd", "QGemm", "ConvInteger", "MatMulInteger"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits", "QAttention"),
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A graph that takes pixels, of `shape` (C, H, W). `mean`, `std`: the normalization that was put in front of it.

    `cut`: whether a Softmax was left out.
    """

    model: onnx.ModelProto
    shape: Shape
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    quantized: bool
    cut: bool


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether a graph computes with codes. Raises ModelError for one whose integers are not written as Q/DQ."""
    kinds = {node.op_type for node in model.graph.node}
    if "DynamicQuantizeLinear" in kinds:
        raise ModelError(
            "the graph chooses its activation scales while it runs (DynamicQuantizeLinear)",
            "quantize it statically, with calibration images",
        )
    if fused := sorted(kinds & _FUSED):
        raise ModelError(
            f"the graph is quantized in a form without Q/DQ ({fused[0]})",
            "give it as it was before a runtime optimized it, or write it as Q/DQ: in ONNX Runtime,"
            " quantize_static with quant_format=QuantFormat.QDQ",
        )
    return bool(kinds & {_Q, _DQ})


def is_open(model: onnx.ModelProto) -> bool:
    """Whether a graph leaves open how large its images are."""
    inputs = fold.inputs(model.graph)
    dims = inputs[0].type.tensor_type.shape.dim if inputs else []
    return any(not d.dim_value for d in dims[1:])


def read(
    file: Path,
    model: onnx.ModelProto,
    *,
    input_shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Source:
    """A file's graph `model`, taking pixels. `input_shape` (C, H, W): where the file leaves it open.

    `mean`, `std`: what the file wants pixels normalized by, per channel or one for all; default: nothing.
    Raises ModelError for a graph that has not one float32 input of images and one output of logits, has operators that
    ONNX Runtime does not run, branches or loops, or a batch that cannot be freed.
    """
    quantized = is_quantized(model)
    channels_last, shape = onnx_ends.layout(file, _images(file, model), input_shape)
    means, stds = graph.per_channel(mean, 0.0, shape), graph.per_channel(std, 1.0, shape)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if made.functions:
        made = inliner.inline_local_functions(made)
    _check_opset(file, made)
    _check_flow(file, made)
    cut = onnx_ends.without_softmax(made.graph)
    onnx_ends.free_batch(made.graph)
    onnx_ends.in_front(made.graph, channels_last, shape, means, stds)
    classes = _try_out(file, model, made, shape, (means, stds), channels_last, cut)
    return Source(made, shape, classes, means, stds, quantized, cut)


def load(file: Path) -> onnx.ModelProto:
    """The graph in a file, with tensors that it keeps in files beside it. Raises ModelError."""
    try:
        return read_onnx(file, beside=True)
    except IntegrityError as error:
        raise ModelError(error.message, error.hint) from error


def to_fp32(source: Source, *, name: str, opset: int | None = None) -> onnx.ModelProto:
    """The FP32 graph as exports start from it, as graph.to_onnx makes it of a torch network.

    `opset`: 17 to 21; default: the file's, or 17 where it is older. Raises ModelError.
    """
    own = graph.opset_of(source.model)
    wanted = graph.checked_opset(opset if opset is not None else max(own, graph.OPSETS[0]))
    for node in source.model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ModelError(
                f"the operator {node.op_type} is of {node.domain}, not of ONNX",
                "give the graph as it was before a runtime optimized it",
            )
    for tensor in source.model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            raise ModelError(f"parameters are in {kind} ({tensor.name})", "save it in float32")
    model = source.model if own == wanted else _converted(source.model, wanted)
    try:
        model = graph.finished(model, name=name, opset=wanted)
    except ResqError:
        raise
    except Exception as error:  # whatever the simplifier raises of a graph that runs all the same
        raise ModelError(
            f"the graph cannot be simplified: {_first(error)}", "check it with onnx.checker"
        ) from error
    images = graph.noise(source.shape)
    apart = graph.apart(graph.run(source.model, images), graph.run(model, images))
    if not apart <= graph.PARITY:
        raise ModelError(f"the simplified graph differs from the file by {apart:.3g}")
    return model


def _images(file: Path, model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The input, of images, beside the one output."""
    inputs, outputs = fold.inputs(model.graph), model.graph.output
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"{file} has {len(inputs)} inputs and {len(outputs)} outputs",
            "it must have one input of images and one output of logits",
        )
    kind = inputs[0].type.tensor_type.elem_type
    if kind != onnx.TensorProto.FLOAT:
        found = onnx.TensorProto.DataType.Name(kind)
        raise ModelError(
            f"{file} takes images in {found}", "it must take float32: save it without that cast"
        )
    return inputs[0]


def _check_opset(file: Path, model: onnx.ModelProto) -> None:
    if graph.opset_of(model) < OLDEST:
        raise ModelError(
            f"{file} is of opset {graph.opset_of(model)}", f"save it with opset {OLDEST} or later"
        )


def _check_flow(file: Path, model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ModelError(
                f"{file} has branches or loops ({node.op_type})",
                "save it for images of one size, or simplify it first, for example with onnxsim",
            )


def _try_out(
    file: Path,
    original: onnx.ModelProto,
    made: onnx.ModelProto,
    shape: Shape,
    normal: tuple[tuple[float, ...], tuple[float, ...]],
    channels_last: bool,
    cut: bool,
) -> int:
    """Run what was made on two images, then on three, and hold it against the file; how many logits come out."""
    images = graph.noise(shape)
    mean, std = (np.array(v, np.float32).reshape(1, -1, 1, 1) for v in normal)
    given = (images - mean) / std
    quantized = is_quantized(original)
    expected = _run_file(
        file, original, given.transpose(onnx_ends.TO_NHWC) if channels_last else given
    )
    try:
        graph.run(made, images[:2], optimize=not quantized)
        logits = graph.run(made, images, optimize=not quantized)
    except Exception as error:  # whatever ONNX Runtime raises
        raise ModelError(
            f"{file} does not run on batches of any size: {_first(error)}",
            "save it with a free batch: dynamic_axes or dynamic_shapes in torch.onnx.export",
        ) from error
    if logits.ndim != 2 or len(logits) != len(images):
        raise ModelError(
            f"{file} makes {logits.shape} of {len(images)} images",
            "it must give logits, [batch, classes]",
        )
    if logits.dtype != np.float32:
        raise ModelError(
            f"{file} makes logits in {logits.dtype}",
            "it must give float32: save it with its last DequantizeLinear, or with that cast",
        )
    if not np.isfinite(logits).all():
        raise ModelError(f"{file} makes logits that are not finite", "check the file")
    apart = graph.apart(expected, _softmax(logits) if cut else logits)
    if not apart <= (graph.STEP if quantized else graph.PARITY):
        raise ModelError(
            f"{file} with a free batch differs from itself by {apart:.3g}",
            "save it with a free batch: dynamic_axes or dynamic_shapes in torch.onnx.export",
        )
    return int(logits.shape[1])


def _run_file(file: Path, model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[Any]:
    """Outputs of the file as it is, in batches of the size that it fixes."""
    (value,) = fold.inputs(model.graph)
    fixed = value.type.tensor_type.shape.dim[0].dim_value or len(images)
    rows = np.concatenate([images, np.repeat(images[-1:], -len(images) % fixed, axis=0)])
    try:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        if is_quantized(model):
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
        session = ort.InferenceSession(content, options, providers=providers)
        parts = [
            session.run(None, {value.name: np.ascontiguousarray(rows[i : i + fixed])})[0]
            for i in range(0, len(rows), fixed)
        ]
        return np.concatenate(parts)[: len(images)]
    except Exception as error:  # whatever ONNX Runtime raises
        raise ModelError(
            f"ONNX Runtime does not run {file}: {_first(error)}",
            "check --input-shape, and that the file needs no operators of its own",
        ) from error


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return found


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as error:  # it raises RuntimeError, and more
        raise ModelError(
            f"the graph cannot be brought to opset {opset}: {_first(error)}",
            f"save it with opset {opset}",
        ) from error
