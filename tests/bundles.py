"""A small bundle that runs: random weights, random images, labels that the network itself gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from resq_deploy.bundle import INT8, Bundle, BundleWriter, sha256_of
from resq_deploy.fault_models import parse
from resq_deploy.faults import FaultSpace
from resq_deploy.memory import fault_space
from resq_deploy.runtime.plan import locate
from tests.runtime.graphs import NETS, images, quantize
from tests.runtime.plans import fake_plan, packed

ZERO = "0" * 64


def write_bundle(
    path: Path, net: str = "resnet", *, count: int = 12, force: bool = False, faulty: bool = False
) -> Bundle:
    """A bundle of one of `graphs.NETS`, with a stored attack and an engine that no GPU ever built.

    `faulty`: with inputs of the same attack "against" two draws of faults, too.
    """
    float_model = NETS[net](0)
    sample = images(float_model, count)
    model = quantize(float_model, sample)
    space = fault_space(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: Any = session.run(None, {"input": sample})[0]
    labels: NDArray[np.int64] = logits.argmax(axis=1)
    codes = {m.name: m.value for m in space.memories if m.kind == "weights"}
    with BundleWriter(path, force=force) as writer:
        (writer.dir / INT8).write_bytes(model.SerializeToString())
        (writer.dir / "model.fp32.onnx").write_bytes(float_model.SerializeToString())
        writer.save_npz("eval.npz", x=sample, y=labels)
        writer.save_npz("attacks/noise.npz", x=1 - sample, y=labels, index=np.arange(count))
        stored = {"noise": _attack(count, sha256_of(writer.dir / INT8))}
        if faulty:
            each = {"y": np.tile(labels, 2), "index": np.tile(np.arange(count), 2)}
            moved = np.concatenate([1 - sample, sample])
            writer.save_npz("attacks/noise@ber=1e-2.npz", x=moved, **each)
            stored["noise@ber=1e-2"] = stored["noise"] | {
                "samples": 2 * count,
                "faulty": faulty_memory(space),
            }
        (writer.dir / "engines").mkdir()
        plan = fake_plan([packed(c, "acdb" if c.ndim == 4 else "ab") for c in codes.values()])
        (writer.dir / "engines" / "host.plan").write_bytes(plan)
        found = locate(plan, codes)
        found.save(writer.dir / "engines" / "host.weights.json")
        return writer.finish(
            _manifest(net, sample, codes, {m.name: m.layer for m in space.memories})
            | {"engines": {"host": _engine(found.coverage)}}
            | {"attacks": stored}
            | {"classes": [f"class {i}" for i in range(logits.shape[1])]}
        )


def faulty_memory(space: FaultSpace) -> dict[str, Any]:
    """Two trials at a bit error rate of 1e-2."""
    model, part = parse("ber:0.01"), space.select(("weights",))
    digests = [model.trial(part, 0, i).flips.digest()[:16] for i in range(2)]
    return {"model": "ber:0.01", "seed": 0, "trials": 2, "flips": digests}


def _manifest(
    net: str, sample: NDArray[np.float32], codes: dict[str, Any], layers: dict[str, str]
) -> dict[str, Any]:
    weights = {
        name: {
            "layer": layers[name],
            "op": "Conv" if c.ndim == 4 else "Gemm",
            "shape": c.shape,
            "axis": 0,
            "scale": [0.01] * len(c),
            "sqnr_db": 40.0,
        }
        for name, c in codes.items()
    }
    channels = sample.shape[1]
    return {
        "name": net,
        "arch": f"test:{net}",
        "input": {
            "name": "input",
            "shape": sample.shape[1:],
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        },
        "quantization": {
            "weights": weights,
            "activations": {"input": {"scale": 0.01, "low": 0.0, "high": 1.0, "method": "max"}},
            "float_ops": [{"node": "softmax", "op": "Softmax", "reason": "for the test"}],
        },
        "adjustment": {"applied": True, "design_ber": 1e-3, "steps": [{"step": "none"}]},
        "metrics": {
            "samples": len(sample),
            "fp32_accuracy": 1,
            "int8_accuracy": 1,
            "agreement": 1,
            "sqnr_db": {},
        },
        "provenance": {
            "versions": {},
            "command": ["test"],
            "seed": 0,
            "model_sha256": ZERO,
            "calibration": {},
        },
    }


def _attack(samples: int, model_sha256: str) -> dict[str, Any]:
    return {
        "attack": "noise",
        "norm": "linf",
        "eps": 1.0,
        "crafted_through": "external",
        "model_sha256": model_sha256,
        "samples": samples,
    }


def _engine(coverage: float) -> dict[str, Any]:
    return {"backend": "tensorrt-rtx", "version": "0", "built_for": {}, "coverage": coverage}
