"""nn.Module -> FP32 ONNX: preprocessing inside, batch free, BatchNorm folded, checked, the same bytes every time."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from resq_deploy.errors import ModelError
from resq_deploy.export import fold, footprint, names
from resq_deploy.runtime.cpu import saturates
from resq_deploy.runtime.graph import has_zero_points

OPSETS = range(17, 22)
DEFAULT_OPSET = 20

_WRAPPED = "network"
PARITY = 1e-3  # of the largest logit: what ONNX Runtime and torch may differ by in float32
STEP = 0.1  # of it: what a code next to a rounding tie may move a quantized graph by
_ROUNDS = 3  # of folding and rewriting; one pass can open the way for another


class Preprocess(nn.Module):
    """(x - mean) / std per channel, of pixels in [0, 1]: float32 [B, C, H, W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, C, H, W] -> the same shape."""
        return (x - self.mean) / self.std


class Preprocessed(nn.Module):
    """Pixels in [0, 1] -> logits: a network behind its preprocessing.

    The preprocessing stays outside the first convolution: that pads with zeros of the normalized
    image, so folding it in would change the border.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        plain = not any(mean) and all(s == 1 for s in std)
        self.preprocess = nn.Identity() if plain else Preprocess(mean, std)
        self.network = network
        self.training = self.preprocess.training = False  # a torch.export program refuses eval()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, C, H, W] in [0, 1] -> float32 [B, classes]."""
        logits: Tensor = self.network(self.preprocess(x))
        return logits


def per_channel(
    values: Sequence[float] | None, default: float, shape: tuple[int, int, int]
) -> tuple[float, ...]:
    """Preprocessing of each channel; one number is for all. Raises ModelError."""
    given = (default,) if values is None else tuple(map(float, values))
    if not np.isfinite(given).all():
        raise ModelError(
            f"preprocessing {given} is not finite", "give plain numbers to --mean and --std"
        )
    if len(given) not in (1, shape[0]) or (default == 1.0 and min(given) <= 0):
        raise ModelError(
            f"preprocessing {given} for {shape[0]} channels",
            "give one number per channel to --mean and --std; std must be above 0",
        )
    return given * shape[0] if len(given) == 1 else given


def to_onnx(
    module: Preprocessed, shape: tuple[int, int, int], *, name: str, opset: int | None = None
) -> onnx.ModelProto:
    """The FP32 graph of a network: `input` float32 [batch, C, H, W] in [0, 1] -> `logits` [batch, classes].

    `opset`: 17 to 21. Raises ModelError where torch cannot export the network with a free batch, the
    result fails onnx.checker, or ONNX Runtime computes something else than torch.
    """
    wanted = checked_opset(opset)
    leaves = {n for n, m in module.network.named_modules() if not any(True for _ in m.children())}
    exported = _exported(module, shape, wanted)
    model = finished(exported, name=name, opset=wanted, prefix=f"{_WRAPPED}.", leaves=leaves)
    _compare(module, model, shape)
    return model


def finished(
    model: onnx.ModelProto,
    *,
    name: str,
    opset: int,
    prefix: str = "",
    leaves: Collection[str] = (),
) -> onnx.ModelProto:
    """A float graph as exports start from it: simplified, BatchNorm folded, with its lasting names, checked.

    `prefix`, `leaves`: see names.rename; without a prefix nodes keep the names they have. Raises ModelError.
    """
    own = {n.output[0]: n.name for n in model.graph.node if n.name}
    model = _simplified(model)
    _pools(model)
    fold.plain_products(model.graph)
    fold.drop_unused(model.graph)
    names.rename(model, prefix, leaves, own=None if prefix else own)
    names.forget_origin(model, name, opset)
    _name_batch(model.graph)
    check(model)
    return model


def checked_opset(opset: int | None) -> int:
    """The opset of a graph; None: the default. Raises ModelError for one that torch does not write."""
    wanted = DEFAULT_OPSET if opset is None else opset
    if wanted not in OPSETS:
        raise ModelError(f"opset {wanted}", f"choose one of {OPSETS[0]} to {OPSETS[-1]}")
    return wanted


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operators in a graph; 1 where it names none."""
    return max(
        (int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1
    )


def check(model: onnx.ModelProto) -> None:
    """onnx.checker with full checks, and that no two tensors have one name. Raises ModelError."""
    graph = model.graph
    held = Counter(t.name for t in (*graph.initializer, *graph.input))
    held.update(name for node in graph.node for name in node.output if name)
    for name, count in held.items():
        if count > 1:
            raise ModelError(
                f"the exported graph has {count} tensors named {name}", "rename the parameter"
            )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"the exported graph is not valid ONNX: {first}") from error


def noise(shape: Sequence[int], count: int = 3) -> NDArray[np.float32]:
    """Images of noise in [0, 1], float32 [count, C, H, W], the same every time."""
    return np.random.default_rng(0).random((count, *shape), dtype=np.float32)


def apart(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """Largest difference of two runs' logits, as a share of the largest expected one or of 1; inf for other shapes."""
    if expected.shape != found.shape:
        return float("inf")
    largest = max(1.0, float(np.abs(expected).max(initial=0.0)))
    return float(np.abs(found - expected).max(initial=0.0)) / largest


def run(
    model: onnx.ModelProto,
    images: NDArray[np.float32],
    batch: int | None = None,
    *,
    optimize: bool = True,
) -> NDArray[np.float32]:
    """Logits of images by ONNX Runtime on the CPU: float32 [N, C, H, W] in [0, 1] -> float32 [N, classes].

    `batch`: images at once; default: 256, or as many as a quarter of a GiB of activations allows. `optimize`: whether
    ONNX Runtime may fuse nodes; it never does in a graph whose zero points are left out, nor in a Q/DQ graph on a
    CPU whose byte products saturate: figures would be of that CPU, not of the file.
    """
    import onnxruntime as ort

    size = batch or footprint.run_batch(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what fails raises
    rounds = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if not (optimize and has_zero_points(model)) or (rounds and saturates()):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    starts = range(0, len(images), size)
    parts = [session.run([names.OUTPUT], {names.INPUT: images[s : s + size]})[0] for s in starts]
    logits: NDArray[np.float32] = np.concatenate(parts)
    return logits


def _exported(module: nn.Module, shape: tuple[int, int, int], opset: int) -> onnx.ModelProto:
    import onnx_ir as ir
    import onnxscript  # noqa: F401  torch says only that the network cannot be exported without it

    example = torch.linspace(0, 1, 2 * int(np.prod(shape))).reshape(2, *shape)
    batch = torch.export.Dim("batch", min=1, max=2**20)
    with quiet():
        try:
            program: Any = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[names.INPUT],
                output_names=[names.OUTPUT],
                dynamic_shapes=({0: batch},),
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # torch raises many kinds, none of them documented
            reason = _reason(error)
            raise ModelError(
                f"torch cannot export the network: {reason}",
                "its forward must take any batch size and not branch on the values of its input",
            ) from error
        model: onnx.ModelProto = ir.serde.serialize_model(program.model)
    return model


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx_ir as ir
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer, rewriter

    with quiet():
        for _ in range(_ROUNDS):
            fold.fold_constants(model)
            graph = ir.serde.deserialize_model(model)
            passes.InlinePass()(graph)
            optimizer.fold_constants_ir(graph)
            rewriter.rewrite(graph)
            passes.CommonSubexpressionEliminationPass()(graph)
            passes.OutputFixPass()(graph)
            model = ir.serde.serialize_model(graph)
        fold.fold_constants(model)
    return model


def _pools(model: onnx.ModelProto) -> None:
    """ReduceMean over height and width -> GlobalAveragePool, in place: the same mean, and engines know it as a pool."""
    constants, shapes = fold.initializers(model.graph), fold.shapes(model)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "ReduceMean" or len(shapes.get(node.input[0], ())) != 4:
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        axes = given.get("axes", [])
        if len(node.input) > 1 and node.input[1] in constants:
            axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        if {axis % 4 for axis in axes} != {2, 3}:
            continue
        node.op_type = "GlobalAveragePool"
        del node.attribute[:], node.input[1:]
        if not given.get("keepdims", 1):
            mean, node.output[0] = node.output[0], f"{node.output[0]}_pooled"
            flat = helper.make_node("Flatten", [node.output[0]], [mean], name=f"{node.name}_flat")
            flat.metadata_props.extend(node.metadata_props)
            nodes.append(flat)
    fold.replace(model.graph.node, nodes)


def _name_batch(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = names.BATCH


def _compare(module: nn.Module, model: onnx.ModelProto, shape: tuple[int, int, int]) -> None:
    images = noise(shape)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    error = apart(expected, run(model, images))
    if not error <= PARITY:
        raise ModelError(
            f"the ONNX graph differs from the torch network by {error:.3g}",
            "check that the network is in eval mode and draws no random numbers",
        )


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))[
        :200
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """torch's warnings and logs are not for our users; what fails raises."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
