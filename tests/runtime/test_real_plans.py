"""Plans that TensorRT-RTX built, in the runner: only the GPU is a stand-in, which computes with the weights it finds.

The bytes are the library's own, so this shows that map, flips in the plan and flips in memory land on the addresses
of the INT8 graph. Whether a GPU keeps its weights so is for tests/gpu to show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from resq_deploy.bundle import Bundle
from resq_deploy.export.on_device import add_engines
from resq_deploy.fault_lists import read_fault_list, write_fault_list
from resq_deploy.fault_models import parse
from resq_deploy.faults import Flips
from resq_deploy.runtime.plan import PlanMap
from resq_deploy.runtime.runner import open_runner
from tests.bundles import write_bundle
from tests.runtime import fake_trt
from tests.runtime.fake_trt import FakeTensorRT, device_of, reference
from tests.runtime.trt_bundles import with_flips

RTX: dict[str, Any] = {"targets": ("tensorrt-rtx",), "sm": ("86",), "batch": (1, 4, 8)}


class PlanEngine(fake_trt._Engine):
    """Keeps the whole plan in one block, and reads its weights there by the map of the bundle."""

    def __init__(self, runtime: Any, plan: bytes) -> None:
        self.runtime, self.library, self.plan_size = runtime, runtime.library, len(plan)
        self.plan_map: PlanMap = runtime.library.plan_map
        self.refittable = False
        self.values = {
            t.name: onnx.numpy_helper.to_array(t) for t in self.library.model.graph.initializer
        }
        self.held = [self.take(4096), self.take(len(plan))]
        self.device.upload(self.held[1], np.frombuffer(plan, np.uint8))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, *self._shape) for batch in self.library.batch]

    @property
    def _shape(self) -> tuple[int, ...]:
        dims = self.library.model.graph.input[0].type.tensor_type.shape.dim
        return tuple(d.dim_value for d in dims)[1:]

    def weights(self) -> dict[str, NDArray[Any]]:
        plan = self.device.download(self.held[1], self.plan_size)
        found = self.plan_map
        return self.values | {name: found.read(plan, name)[0] for name in found.tensors}


class Library(FakeTensorRT):
    """Deserializes the plans of one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(onnx.load(bundle.int8), {})
        self.plan_map = PlanMap.load(bundle.file("engines/tensorrt-rtx.weights.json"))
        self.batch = (1, 4, 8)

    def Runtime(self, logger: Any) -> Any:
        class Runtime(fake_trt._Runtime):
            def deserialize_cuda_engine(self, plan: bytes) -> PlanEngine:
                return PlanEngine(self, bytes(plan))

        return Runtime(self, logger)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("real") / "m.resq"
    write_bundle(path)
    return add_engines(path, **RTX)


@pytest.mark.parametrize("way", ["live", "plan"])
def test_a_fault_list_of_onnx_runtime_gives_the_same_answers_on_a_plan(
    bundle: Bundle, way: str, tmp_path: Path
) -> None:
    images = bundle.eval_sample().images
    with open_runner(bundle, "ort") as ort:
        space = ort.space.select(kinds=["weights"])
        drawn = [parse("ber:1e-2").trial(space, 7, trial).flips for trial in range(3)]
        write_fault_list(tmp_path / "faults.jsonl", (flips.faults() for flips in drawn))
        expected = [ort(images)]
        for flips in drawn:
            with ort.faults(flips):
                expected.append(ort(images))
    listed = read_fault_list(tmp_path / "faults.jsonl")
    library = Library(bundle)
    with open_runner(
        bundle,
        "tensorrt-rtx",
        engine="tensorrt-rtx",
        injection=way,
        device=device_of,
        module=library,
    ) as runner:
        assert runner.info["coverage"] == 1.0
        answers = [runner(images)]
        for trial in range(3):
            with runner.faults(listed.trial(space, 0, trial).flips):
                answers.append(runner(images))
        assert np.array_equal(runner(images), answers[0])
    exact = [with_flips(flips, library.model) for flips in (Flips({}), *drawn)]
    assert library.crashes == []
    assert not np.allclose(answers[1], answers[0], atol=0.2)
    for there, here, model in zip(answers, expected, exact, strict=True):
        assert np.array_equal(there, reference(model, images))
        np.testing.assert_allclose(there, here, atol=0.05)  # its fused kernels round once less
