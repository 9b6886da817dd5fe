"""Small files as ONNX Runtime's quantizer writes them, in the ways that differ in what their weights and biases are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization as q

from resq_deploy.export.qdq_file import canonical

U8 = {"activation_type": q.QuantType.QUInt8}
WAYS: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "per channel": {"per_channel": True},
    "U8S8": {"per_channel": True, **U8},
    "float biases": {"per_channel": True, "extra_options": {"QuantizeBias": False}},
}


class _Reader(q.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, images: NDArray[np.float32]) -> None:
        self.rest = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self.rest, None)


def static(
    fp32: onnx.ModelProto, images: NDArray[np.float32], folder: Path, way: str = "per channel"
) -> onnx.ModelProto:
    """The canonical graph of what quantize_static makes of a network."""
    onnx.save(fp32, folder / "fp32.onnx")
    reader = _Reader(fp32.graph.input[0].name, images)
    q.quantize_static(str(folder / "fp32.onnx"), str(folder / "int8.onnx"), reader, **WAYS[way])
    return canonical(onnx.load(folder / "int8.onnx"))
