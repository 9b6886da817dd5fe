"""What only a GPU can show. One command:  python -m pytest tests/gpu -rs -s

Where there is no NVIDIA GPU, or the plan cannot be built for it, every test is skipped and says why. Write what was
seen, with date and GPU, in docs/gpu.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError
from resq_deploy.export.engine_options import EngineOptions
from resq_deploy.export.on_device import add_engines
from resq_deploy.faults import Flips
from resq_deploy.runtime.cuda import CudaDevice
from resq_deploy.runtime.runner import Runner, open_runner
from resq_deploy.runtime.trtlib import library

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

IMAGES = 256


@pytest.fixture(scope="module", params=["tensorrt-rtx", "tensorrt"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend whose library is here, on a machine with a GPU."""
    name = str(request.param)
    try:
        library(name)
        device = CudaDevice(name)
    except BackendError as error:
        pytest.skip(str(error))
    print(f"\n{name} on {device.name}")
    device.close()
    return name


@pytest.fixture(scope="module")
def bundle(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network trained on digits; its plan is added on this machine, for the GPU that it has."""
    from resq_deploy import export_model, harden_model

    checkpoint = tmp_path_factory.mktemp(backend) / "model.pt"
    harden_model("resnet8", "digits", output=checkpoint, stages="none", seed=0)
    export_model(checkpoint, attacks=())
    try:
        return with_plan(checkpoint.with_suffix(".resq"), backend)
    except BackendError as error:
        pytest.skip(str(error))


def with_plan(path: Path, backend: str, output: Path | None = None, **options: Any) -> Bundle:
    """As `resq-export BUNDLE --target` does it; TensorRT-RTX wants to be told for which GPU."""
    device = CudaDevice(backend)
    sm = (device.sm,) if backend == "tensorrt-rtx" else ()
    device.close()
    return add_engines(
        path,
        output,
        targets=(backend,),
        sm=sm,
        batch=(1, 64, 256),
        options=EngineOptions(**options),
        force=True,
    )


@pytest.fixture(scope="module")
def refittable(bundle: Bundle, backend: str) -> Bundle:
    """The same with a plan that can be refitted, where the library builds one."""
    try:
        other = bundle.path.with_name("refit.resq")
        return with_plan(bundle.path, backend, other, refit=True)
    except BackendError as error:
        print(f"no plan that can be refitted: {error}")
        return bundle


@pytest.fixture
def images(bundle: Bundle) -> Any:
    return bundle.eval_sample().images[:IMAGES]


@pytest.fixture
def runner(bundle: Bundle, backend: str) -> Iterator[Runner]:
    with open_runner(bundle, backend) as opened:
        print(json.dumps(opened.info))
        yield opened


def some_flips(runner: Runner, count: int, seed: int = 0) -> Flips:
    weights = runner.space.select(kinds=["weights"])
    draws = np.random.default_rng(seed).choice(weights.size, count, replace=False)
    return weights.flips(np.sort(draws))


def test_golden_parity_with_onnx_runtime(bundle: Bundle, runner: Runner, images: Any) -> None:
    with open_runner(bundle, "ort") as ort:
        expected = ort(images)
    logits = runner(images)
    agreement = float(np.mean(logits.argmax(1) == expected.argmax(1)))
    print(
        f"top-1 agreement {agreement:.4f}, largest difference {np.abs(logits - expected).max():.4g}"
    )
    assert agreement >= 0.995


def test_bytes_flip_wherever_they_are(backend: str) -> None:
    """The two kernels, on addresses of every alignment."""
    device = CudaDevice(backend)
    golden = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)
    address = device.allocate(golden.size)
    device.upload(address, golden)
    offsets = np.random.default_rng(1).permutation(golden.size)[:1777]
    masks = np.random.default_rng(2).integers(1, 256, offsets.size).astype(np.uint8)
    device.flip(offsets + address, masks)
    faulty = golden.copy()
    faulty[offsets] ^= masks
    assert device.download(address, golden.size) == faulty.tobytes()
    assert np.array_equal(device.peek(offsets + address), faulty[offsets])
    device.close()


def test_the_ways_of_injection_agree(refittable: Bundle, backend: str, images: Any) -> None:
    answers: dict[str, Any] = {}
    for way in ("live", "plan", "refit"):
        try:
            with open_runner(refittable, backend, injection=way) as opened:
                flips = some_flips(opened, 200)
                lost = opened.unreachable(flips)
                print(f"{way}: {lost} of {flips.count} bits out of reach, {opened.info}")
                if lost:
                    continue
                golden = opened(images)
                with opened.faults(flips):
                    answers[way] = opened(images)
                assert np.array_equal(opened(images), golden)
                assert not np.array_equal(answers[way], golden)
        except BackendError as error:
            print(f"{way}: {error}")
    assert "plan" in answers
    for way, logits in answers.items():
        assert np.array_equal(logits, answers["plan"]), way


def test_faulty_parity_with_onnx_runtime(bundle: Bundle, runner: Runner, images: Any) -> None:
    flips = some_flips(runner, 500, seed=1)
    with open_runner(bundle, "ort") as ort, ort.faults(flips):
        expected = ort(images)
    with runner.faults(flips):
        logits = runner(images)
    agreement = float(np.mean(logits.argmax(1) == expected.argmax(1)))
    print(f"with 500 flips: top-1 agreement {agreement:.4f}")
    assert agreement >= 0.98


def test_live_flips_per_second(bundle: Bundle, backend: str) -> None:
    with open_runner(bundle, backend, injection="live") as opened:
        flips = some_flips(opened, 1000)
        if opened.unreachable(flips):
            pytest.skip(f"the weights are not found in GPU memory: {opened.info}")
        rounds, start = 100, time.perf_counter()
        for _ in range(rounds):
            with opened.faults(flips):
                pass
        seconds = time.perf_counter() - start
    print(
        f"{rounds * flips.count / seconds:,.0f} bits flipped and restored per second, checks included"
    )


def test_an_altered_plan_loads_or_is_refused_in_one_line(bundle: Bundle, backend: str) -> None:
    """NVIDIA says that a plan's validity is not tamper detection: a flipped weight must load, a cut plan must not."""
    with open_runner(bundle, backend, injection="plan") as opened:
        plan = Path(bundle.file(f"engines/{backend}.plan")).read_bytes()
        loader = opened.loader  # type: ignore[attr-defined]
        with pytest.raises(BackendError) as caught:
            loader.load(plan[:-1])
    assert "\n" not in str(caught.value)
