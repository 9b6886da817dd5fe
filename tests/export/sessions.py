"""Networks by ONNX Runtime's rules, and sessions as an application makes them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from resq_deploy.export import qdq
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.dialect import ONNXRUNTIME, Dialect
from resq_deploy.runtime import stock
from tests.helpers import SHAPE, ZOO, exported


class Capped(nn.Module):
    """ReLU6 and inverted bottlenecks, as in MobileNetV2; thin layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 24, 1)
        nn.init.normal_(self.wide.weight, 0, 10)  # some reach the cap
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.narrow = nn.Conv2d(24, 8, 1)
        self.fc = nn.Linear(8, 3)
        self.cap = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logits."""
        x = self.cap(self.stem(x))
        x = x + self.narrow(self.cap(self.depthwise(self.cap(self.wide(x)))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Gates(nn.Module):
    """SiLU, hard swish, LeakyRelu and squeeze-excitation between convolutions, as in EfficientNet and MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.b = nn.Conv2d(16, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 3)
        self.silu, self.hard, self.leaky = nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logits."""
        x = self.hard(self.a(self.silu(self.stem(x))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        logits: Tensor = self.fc(self.leaky(self.b(x * gate)).mean((2, 3)))
        return logits


KINDS = (*ZOO, Capped, Gates)


def pixels(count: int = 32) -> NDArray[np.float32]:
    """Images in [0, 1]."""
    return np.random.default_rng(3).random((count, *SHAPE), dtype=np.float32)


@cache
def _quantized(kind: Any, dialect: Dialect) -> onnx.ModelProto:
    fp32 = dialect.prepared(exported(kind)[1])
    where = dialect.plan(fp32)
    ranges = calibrate(fp32, where.activations, [pixels()], "minmax", unsigned=dialect.unsigned)
    return qdq.finish(qdq.quantize_graph(fp32, ranges, dialect=dialect, where=where), dialect)


def quantized(kind: type[nn.Module], dialect: Dialect = ONNXRUNTIME) -> onnx.ModelProto:
    """A network of KINDS as INT8, made once; do not change it."""
    hashable: Any = kind
    model: onnx.ModelProto = _quantized(hashable, dialect)
    return model


def session(model: onnx.ModelProto, file: Path) -> tuple[ort.InferenceSession, Counter[str]]:
    """As an application makes it, byte products exact, and the operators that it then runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(file)
    options.add_session_config_entry(stock.PRECISE, "1")
    made = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return made, Counter(node.op_type for node in onnx.load(file).graph.node)


def arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Name -> initializer."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
