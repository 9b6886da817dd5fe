"""Plans that TensorRT-RTX really builds, and INT8 graphs of whole networks to build them from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from resq_deploy.export.engine import build_engine
from resq_deploy.runtime.plan import PlanMap, locate
from tests.runtime.plans import Int8

SM = ("86",)


def located(path: Path, tensors: dict[str, Int8], **options: Any) -> tuple[bytes, PlanMap]:
    """A plan of an ONNX file, and its map after reading every located weight back."""
    out = path.with_suffix(".plan")
    build_engine(path, out, sm=SM, **options)
    plan = out.read_bytes()
    found = locate(plan, tensors)
    for name, value in tensors.items():
        there, mask = found.read(plan, name)
        assert np.array_equal(there[mask], value[mask])
    return plan, found


def int8_network(arch: str, path: Path) -> Path:
    """A network of the exporter's own, with random weights, as INT8 ONNX."""
    from resq_deploy.export import graph, qdq, rules
    from resq_deploy.export.grid import Grid
    from tests.export.nets import Fixed
    from tests.export.twins import whole

    fp32 = graph.to_onnx(whole(arch, {}), (3, 32, 32), name=arch)
    plan = rules.plan(fp32)
    onnx.save(
        qdq.quantize_graph(fp32, dict.fromkeys(plan.activations, Fixed(Grid(0.05))), where=plan),
        path,
    )
    return path
