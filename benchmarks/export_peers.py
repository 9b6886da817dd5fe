"""Peers of resq-export, each on the same FP32 graph and the same calibration images."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

Images = NDArray[np.float32]
Run = Callable[[Images], Any]
Key = TypeVar("Key")
METHODS = ("minmax", "entropy")


def ort_static(
    fp32: onnx.ModelProto,
    images: Images,
    method: str,
    batch: int = 64,
    *,
    unsigned: bool = False,
    reduced: bool = False,
) -> onnx.ModelProto:
    """onnxruntime.quantization.quantize_static: QDQ, S8 weights per channel, S8 (or `unsigned` U8) activations.

    `method`: minmax or entropy; `reduced`: with reduce_range, weights of 7 bits. Its own preprocessing (shape
    inference, graph optimization) comes first, as its documentation asks for.
    """
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    name = fp32.graph.input[0].name
    with tempfile.TemporaryDirectory() as folder:
        plain, ready, made = (str(Path(folder) / f"{n}.onnx") for n in ("plain", "ready", "made"))
        onnx.save(fp32, plain)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        q.quantize_static(
            ready,
            made,
            _reader(q.CalibrationDataReader, name, images, batch),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8 if unsigned else q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
            reduce_range=reduced,
            calibrate_method=getattr(
                q.CalibrationMethod, {"minmax": "MinMax"}.get(method, "Entropy")
            ),
        )
        return onnx.load(made)


def _reader(base: type, name: str, images: Images, batch: int) -> object:
    class Reader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.parts = iter([images[i : i + batch] for i in range(0, len(images), batch)])

        def get_next(self) -> dict[str, Images] | None:
            part = next(self.parts, None)
            return None if part is None else {name: part}

    return Reader()


def nncf_ptq(
    fp32: onnx.ModelProto, images: Images, *, overflow_fix: bool = False
) -> onnx.ModelProto:
    """nncf.quantize with its defaults, on every calibration image; `overflow_fix`: 7 bits in every layer."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    name = fp32.graph.input[0].name
    copy = onnx.ModelProto()
    copy.CopyFrom(fp32)
    dataset = nncf.Dataset([{name: image[None]} for image in images])
    more = {}
    if overflow_fix:
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            OverflowFix,
        )

        more["advanced_parameters"] = AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.ENABLE
        )
    made: onnx.ModelProto = nncf.quantize(copy, dataset, subset_size=len(images), **more)
    return made


def modelopt_ptq(fp32: onnx.ModelProto, images: Images) -> onnx.ModelProto:
    """modelopt.onnx.quantization.quantize with its defaults on the CPU, what stays float in float32 as in ours."""
    from modelopt.onnx.quantization import quantize

    name = fp32.graph.input[0].name
    with tempfile.TemporaryDirectory() as folder:
        plain, made = (str(Path(folder) / f"{n}.onnx") for n in ("plain", "made"))
        onnx.save(fp32, plain)
        quantize(
            plain,
            calibration_data={name: images},
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=made,
            log_level="CRITICAL",
        )
        return onnx.load(made)


def interleaved(runs: Mapping[Key, Run], images: Images, rounds: int) -> dict[Key, float]:
    """Median seconds of each for these images, all of them once a round; a first round warms up."""
    taken: dict[Key, list[float]] = {key: [] for key in runs}
    for turn in range(rounds + 1):
        for key, one in runs.items():
            start = time.perf_counter()
            one(images)
            taken[key] += [time.perf_counter() - start] * (turn > 0)
    return {key: float(np.median(seconds)) for key, seconds in taken.items()}


def openvino(path: Path, threads: int) -> Run:
    """The file in OpenVINO on this many threads: images -> outputs."""
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda images: request.infer([images])


def session(model: onnx.ModelProto, threads: int, *, exact: bool = False) -> Run:
    """The graph in stock ONNX Runtime on this many threads, `exact`: its option for products: images -> outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    made = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = made.get_inputs()[0].name
    return lambda images: made.run(None, {name: images})
