"""The TensorRT runner against a stand-in for library and GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from resq_deploy.errors import BackendError
from resq_deploy.fault_models import parse
from resq_deploy.faults import Flips
from resq_deploy.runtime import session
from resq_deploy.runtime.runner import BACKENDS, open_runner
from resq_deploy.runtime.trials import Job, PlainEngine, run_trial
from resq_deploy.runtime.trt import TrtRtxRunner
from tests.runtime.fake_trt import device_of, reference
from tests.runtime.host_device import HostDevice
from tests.runtime.trt_bundles import (
    IMAGES,
    MODEL,
    WAYS,
    library,
    runner,
    some_flips,
    with_flips,
    write_bundle,
)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_batches_of_any_size_fit_the_profile(tmp_path: Path, count: int) -> None:
    with runner(tmp_path) as r:
        logits = r(IMAGES[:count])
    assert logits.shape == (count, 10)
    np.testing.assert_allclose(logits, reference(MODEL, IMAGES[:count]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_faults_land_on_the_addresses_of_the_int8_graph(tmp_path: Path, way: str) -> None:
    with runner(tmp_path, way) as r:
        flips = some_flips(r.space)
        before = r(IMAGES)
        memory = r.loader.device.content()  # type: ignore[attr-defined]
        with r.faults(flips):
            faulty = r(IMAGES)
        assert np.array_equal(faulty, reference(with_flips(flips), IMAGES))
        assert not np.array_equal(faulty, before)
        assert np.array_equal(r(IMAGES), before)
        assert r.loader.device.content() == memory  # type: ignore[attr-defined]
        assert r.info["injection"] == way
        assert r.info["coverage"] == 1.0


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_golden_again_when_the_block_fails(tmp_path: Path, way: str) -> None:
    with runner(tmp_path, way) as r:
        before = r(IMAGES)
        with pytest.raises(ZeroDivisionError), r.faults(some_flips(r.space)):
            raise ZeroDivisionError
        assert np.array_equal(r(IMAGES), before)


@pytest.mark.parametrize("way", WAYS)
def test_no_flips_change_nothing(tmp_path: Path, way: str) -> None:
    with runner(tmp_path, way) as r, r.faults(Flips({})):
        assert np.array_equal(r(IMAGES), reference(MODEL, IMAGES))


def test_auto_is_live_where_gpu_memory_holds_the_weights(tmp_path: Path) -> None:
    with runner(tmp_path) as r:
        assert r.info["injection"] == "live"


@pytest.mark.parametrize("trait", ["own_memory", "twice"])
def test_auto_is_the_plan_where_the_weights_in_memory_are_not_certain(
    tmp_path: Path, trait: str
) -> None:
    with runner(tmp_path, fake=library(**{trait: True})) as r:
        assert r.info["injection"] == "plan"
        flips = some_flips(r.space)
        with r.faults(flips):
            assert np.array_equal(r(IMAGES), reference(with_flips(flips), IMAGES))


def test_live_says_what_it_cannot_reach(tmp_path: Path) -> None:
    with runner(tmp_path, "live", library(own_memory=True)) as r:
        flips = some_flips(r.space)
        assert r.info["coverage"] == 0.0
        assert r.unreachable(flips) == 300
        with pytest.raises(BackendError, match="cannot reach 300 of the 300 bits"), r.faults(flips):
            pass


def test_a_weight_that_the_map_lacks_is_unreachable_in_the_plan(tmp_path: Path) -> None:
    with runner(tmp_path, "plan", drop="conv2") as r:
        flips = some_flips(r.space)
        lost = int(np.bitwise_count(flips["conv2"].masks).sum())
        assert r.unreachable(flips) == lost > 0
        assert r.info["coverage"] == pytest.approx((432 + 1440) / (432 + 1440 + 2304))


def test_trials_count_what_a_plan_does_not_reach(tmp_path: Path) -> None:
    with runner(tmp_path, "plan", drop="conv2") as r:
        space = r.space.select(kinds=["weights"])
        labels = np.zeros(len(IMAGES), np.int64)
        job, golden = Job(parse("ber:1e-2"), space, 0, labels), r(IMAGES)
        rows = [run_trial(PlainEngine(r, IMAGES), golden, job, trial) for trial in range(3)]
    for trial, row in enumerate(rows):
        flips = parse("ber:1e-2").trial(space, 0, trial).flips
        assert row.unreachable == int(np.bitwise_count(flips["conv2"].masks).sum()) > 0
        assert row.flips + row.unreachable == flips.count


def test_coverage_does_not_count_what_a_map_lacks_of_a_tensor(tmp_path: Path) -> None:
    r = runner(tmp_path, "plan")
    tensors = dict(r.plan_map.tensors)
    tensors["conv2"] = tensors["conv2"].model_copy(update={"holes": ((0, 304),)})
    r.plan_map = r.plan_map.model_copy(update={"tensors": tensors})
    assert r.info["coverage"] == r.plan_map.coverage == pytest.approx(1 - 304 / 4176)
    r.close()


def test_an_engine_that_writes_to_its_weights_is_noticed(tmp_path: Path) -> None:
    with runner(tmp_path, "live") as r:
        flips = some_flips(r.space, 1)

        def trial() -> None:
            with r.faults(flips):
                for block in r.loader.device.blocks.values():  # type: ignore[attr-defined]
                    block ^= 0x10

        with pytest.raises(BackendError, match="not golden again"):
            trial()


def test_an_engine_that_was_not_built_to_be_refitted(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="not built to be refitted"):
        runner(tmp_path, "refit", library(refittable=False))


def test_closing_frees_all_device_memory(tmp_path: Path) -> None:
    r = runner(tmp_path)
    r(IMAGES)
    with r.faults(some_flips(r.space)):
        r(IMAGES)
    device = r.loader.device
    r.close()
    assert isinstance(device, HostDevice)
    assert device.blocks == {}
    assert device.closed


def test_the_backends_by_name(tmp_path: Path) -> None:
    fake = library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan())
    with open_runner(bundle, "tensorrt", device=device_of, module=fake) as r:
        assert r.backend == "tensorrt"
    assert BACKENDS["tensorrt-rtx"].endswith(TrtRtxRunner.__name__)
    with pytest.raises(BackendError, match=r"no TensorRT-RTX plan; its plans: orin \(tensorrt\)"):
        TrtRtxRunner.open(bundle, device=device_of, module=fake)


def test_a_plan_with_a_fixed_batch(tmp_path: Path) -> None:
    """It need not have a profile; batches are cut up and filled up."""
    with runner(tmp_path, fake=library(fixed=True)) as r:
        assert r.info["batch"] == [2, 2]
        np.testing.assert_allclose(r(IMAGES), reference(MODEL, IMAGES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_goes_before_what_it_needs(tmp_path: Path, way: str) -> None:
    """The library calls the allocator as long as an engine lives, and a refitter keeps one alive."""
    fake = library()
    r = runner(tmp_path, way, fake)
    with r.faults(some_flips(r.space)):
        r(IMAGES)
    r.close()
    assert fake.crashes == []
    assert r.loader.blocks.sizes == {}
    with pytest.raises(BackendError, match="the runner is closed"):
        r.unreachable(Flips({}))


def test_an_engine_that_is_still_held_keeps_its_allocator(tmp_path: Path) -> None:
    fake = library()
    r = runner(tmp_path, "plan", fake)
    held = r.golden.engine
    r.close()
    assert r.loader.blocks.sizes
    del held
    assert fake.crashes == []
    assert r.loader.blocks.sizes == {}
    session._KEPT.clear()


def test_memory_that_is_short_is_the_null_pointer_to_the_library() -> None:
    class Full(HostDevice):
        def allocate(self, size: int) -> int:
            raise BackendError("the GPU is out of memory")

    blocks = session.Blocks(Full())
    allocator = session.allocator(library(), blocks)
    assert allocator.allocate(16, 256, 0) == 0
    assert allocator.allocate_async(16, 256, 0, 7) == 0
    assert allocator.allocate(0, 256, 0) == 0
    assert allocator.reallocate(2**40, 256, 32) == 0
    assert allocator.deallocate(0)
    assert not allocator.deallocate(12345)


def test_memory_of_streams_is_kept_account_of_too() -> None:
    device = HostDevice()
    blocks = session.Blocks(device)
    allocator = session.allocator(library(), blocks)
    address = allocator.allocate_async(16, 256, 0, 7)
    assert blocks.sizes == {address: 16}
    assert allocator.deallocate_async(address, 7)
    assert blocks.sizes == {} == device.blocks
