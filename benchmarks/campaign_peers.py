"""The other sides of benchmarks/campaign.py: stock ONNX Runtime, OpenVINO, PyTorchFI; and how sides take turns."""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

THREADS = 2
BATCHES = (16, 32, 128)
Images = NDArray[np.float32]
Side = Callable[[], int]  # does some work; how many images that was


def network(name: str, images: Images, seed: int = 0) -> Any:
    """A network with random weights and batch statistics of the images, in eval mode."""
    import torch

    from resq_deploy.networks import build

    torch.manual_seed(seed)
    net = build(name, input_shape=(3, 32, 32), classes=10, args={})
    net.train()
    with torch.no_grad():
        for part in np.split(images[:128], 2):
            net((torch.from_numpy(part) - 0.5) / 0.25)
    return net.eval()


def stock_s8(fp32: Path, out: Path, images: Images) -> None:
    """ONNX Runtime's own quantizer: S8S8, QDQ, per channel, symmetric."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter(np.split(images[:64], 4))

        def get_next(self) -> dict[str, Images] | None:
            part = next(self.parts, None)
            return None if part is None else {"input": part}

    quantize_static(
        fp32, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )  # fmt: skip


def stock_ort(path: Path, images: Images) -> dict[str, Side]:
    """Stock ONNX Runtime, default options but for the number of threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def side(batch: int) -> Side:
        return lambda: len(session.run(None, {name: images[:batch]})[0])

    return {f"batch {b}": side(b) for b in BATCHES}


def openvino(path: Path, images: Images) -> dict[str, Side]:
    """OpenVINO, one stream with two threads, and two streams."""
    import openvino as ov

    core = ov.Core()
    sides: dict[str, Side] = {}
    for streams in (1, THREADS):
        options = {"INFERENCE_NUM_THREADS": THREADS, "NUM_STREAMS": streams}
        compiled = core.compile_model(core.read_model(path), "CPU", options)
        for batch in BATCHES:
            sides[f"{streams} streams, batch {batch}"] = _queue(
                ov.AsyncInferQueue(compiled, streams), images[:batch], streams
            )
    return sides


def products(fp32: Path) -> Side:
    """No network at all: as many u8 x s8 products and sums as its layers need, in one large MatMulInteger.

    What ONNX Runtime's integer kernel gives where nothing has to be gathered, rounded or written back.
    """
    from resq_deploy.export import fold, rules
    from resq_deploy.export.work import multiplications

    model, size = onnx.load(fp32), 1024
    shapes, arrays = fold.shapes(model), fold.initializers(model.graph)
    layers = (n for n in model.graph.node if n.op_type in rules.WEIGHTED and n.input[1] in arrays)
    images = 8
    work = images * sum(multiplications(n, arrays[n.input[1]], shapes) for n in layers)
    rows = round(work / size**2)
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.integers(-127, 128, (size, size)).astype(np.int8), "b")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])], "products",
        [info("a", onnx.TensorProto.UINT8, [rows, size])],
        [info("c", onnx.TensorProto.INT32, [rows, size])], [weights],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17)]
    built = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(
        built.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    left = rng.integers(0, 256, (rows, size)).astype(np.uint8)

    def side() -> int:
        session.run(None, {"a": left})
        return images

    return side


def _queue(queue: Any, part: Images, streams: int) -> Side:
    def side() -> int:
        for _ in range(streams):
            queue.start_async({0: part})
        queue.wait_all()
        return streams * len(part)

    return side


def in_turns(sides: Mapping[str, Side], rounds: int, least: float = 0.25) -> dict[str, float]:
    """Images/s of each side: median over rounds in which all sides take their turn."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for _ in range(rounds):
        for name, side in sides.items():
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < least:
                done += side()
            rates[name].append(done / (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in rates.items()}


def best(sides: dict[str, Side], rounds: int = 3) -> tuple[str, Side]:
    """The fastest setting of one contestant."""
    rates = in_turns(sides, rounds)
    name = max(rates, key=lambda n: rates[n])
    return name, sides[name]


def trained(folder: Any) -> tuple[Any, Callable[[Images], Images]]:
    """The torch network of a bundle with its weights, and the preprocessing; checked against its FP32 graph.

    Batch norms were folded into the convolutions at export: here they pass what they are given.
    """
    import torch

    from resq_deploy.networks import build

    manifest, graph = folder.manifest, onnx.load(folder.fp32)
    values = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    given = manifest.input
    net = build(manifest.arch, input_shape=given.shape, classes=len(manifest.classes), args={})
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.fill_(1 - module.eps)
            elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                weight, bias = (
                    torch.tensor(values[f"{name}.{part}"]) for part in ("weight", "bias")
                )
                module.weight, module.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (given.mean, given.std))
    net.eval()

    def prepared(images: Images) -> Images:
        return (images - mean) / std

    images = folder.eval_sample().images[:8]
    session = ort.InferenceSession(str(folder.fp32), providers=["CPUExecutionProvider"])
    want = session.run(None, {given.name: images})[0]
    with torch.inference_mode():
        got = net(torch.from_numpy(prepared(images))).numpy()
    if not np.allclose(got, want, atol=1e-3 * np.abs(want).max()):
        raise SystemExit("the torch network is not that of the bundle")
    return net, prepared


def pytorchfi(net: Any, batch: Images, count: int) -> tuple[str, float]:
    """Seconds of a trial in torch, one weight changed for all images of a batch: who did it, and the median."""
    import torch

    torch.set_num_threads(THREADS)
    images = torch.from_numpy(batch)
    rng = np.random.default_rng(3)
    name, corrupt = _pytorchfi(net, batch)
    spent = []
    with torch.inference_mode():
        net(images[:32])
        for _ in range(count):
            began = time.perf_counter()
            corrupt(rng)(images)
            spent.append(time.perf_counter() - began)
    return name, statistics.median(spent)


def _pytorchfi(net: Any, batch: Images) -> tuple[str, Callable[[np.random.Generator], Any]]:
    """A function that gives a copy of the network with one weight changed."""
    import torch

    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]

    def by_hand(rng: np.random.Generator) -> Any:
        clone = copy.deepcopy(net)
        layers = [m for m in clone.modules() if isinstance(m, torch.nn.Conv2d)]
        weight = layers[rng.integers(len(layers))].weight.data.view(-1)
        weight[int(rng.integers(weight.numel()))] = 1.0
        return clone

    try:
        fault_injection = importlib.import_module("pytorchfi.core").fault_injection
    except ImportError:
        return "its way, by hand (the package is not installed)", by_hand
    kinds = [torch.nn.Conv2d]
    shape = list(batch.shape[1:])
    tool = fault_injection(net, len(batch), input_shape=shape, layer_types=kinds, use_cuda=False)

    def by_tool(rng: np.random.Generator) -> Any:
        layer = int(rng.integers(len(convs)))
        where = [[int(rng.integers(n))] for n in convs[layer].weight.shape]
        keys = ("k", "dim1", "dim2", "dim3")
        return tool.declare_weight_fi(
            layer_num=[layer], **dict(zip(keys, where, strict=True)), value=[1.0]
        )

    return "pytorchfi", by_tool
