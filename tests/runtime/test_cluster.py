"""The same trials on Ray's own multi-node test cluster: the same figures, also when a node dies on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from resq_deploy.errors import BackendError, IntegrityError, MissingExtra
from resq_deploy.runtime import cluster as c
from resq_deploy.runtime.campaign import Inline, Rule, run_campaign
from resq_deploy.runtime.cluster import RayPool
from resq_deploy.runtime.journal import Journal
from resq_deploy.runtime.shipping import Shipped, ship
from resq_deploy.runtime.trials import TrialEngine
from resq_deploy.runtime.workers import open_pool
from tests.runtime.engines import CannotOpen, Misbehaves, Opens, is_bad, job, plain
from tests.test_bundle import write

pytestmark = pytest.mark.slow

STORE = 80 * 2**20  # bytes of each node's object store: the least that Ray takes, nearly


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    # the head has no CPU to give, so that every node with a worker can die
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, object_store_memory=STORE)
    yield cluster
    ray.shutdown()
    cluster.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def address(nodes: Cluster) -> str:
    return f"ray:{nodes.address}"


def run(pool: Any, trials: int, **options: Any) -> Any:
    try:
        return run_campaign(pool, job(), rule=Rule(trials=trials), **options)
    finally:
        pool.close()


def test_a_cluster_changes_no_figure(address: str, tmp_path: Path) -> None:
    alone = run_campaign(Inline(plain()), job(), rule=Rule(trials=150))
    with Journal.open(tmp_path / "j", {}) as journal:
        log = journal.campaign("seu")
        first = run(open_pool(Opens(), address), 60, log=log)
        found = run(open_pool(Opens(), address), 150, log=log)
        assert log.ranges()[0] == range(150)
    assert found.figures() == alone.figures()
    assert (first.execution["trials_run_now"], found.execution["trials_run_now"]) == (60, 90)
    assert "nodes of a Ray cluster" in found.execution["on"]


def test_a_node_that_dies_loses_no_trial(nodes: Cluster, address: str) -> None:
    second = nodes.add_node(num_cpus=1, object_store_memory=STORE)
    pool = open_pool(Opens(0.05), address)
    assert isinstance(pool, RayPool)
    seen: list[int] = []
    started, killed = time.monotonic(), False
    for rows in pool.run(job(), iter(range(150))):
        seen += [row.trial for row in rows]
        if not killed and (len(pool._actors) == 3 or time.monotonic() - started > 60):
            assert len(pool._actors) == 3, "the new node never got a worker"
            killed = True
            threading.Thread(target=nodes.remove_node, args=(second, False)).start()
    lost = pool.info["workers_lost"]
    pool.close()
    assert killed
    assert sorted(seen) == list(range(150))
    assert lost >= 1


def test_a_node_that_joins_is_given_work(
    nodes: Cluster, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c, "_LOOK_SECONDS", 0.2)
    pool = open_pool(Opens(0.02), address)
    assert isinstance(pool, RayPool)
    third = nodes.add_node(num_cpus=1, object_store_memory=STORE)
    most = 0
    for _ in pool.run(job(), iter(range(100_000))):
        most = max(most, len(pool._actors))
        if most == 3:
            break
    pool.close()
    nodes.remove_node(third)
    assert most == 3


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_trials_that_end_their_worker_are_due(address: str, how: str) -> None:
    work = job()
    bad = [i for i in range(40) if is_bad(work.model.trial(work.space, 0, i).flips)]
    assert bad
    timeout = 0.5 if how == "hang" else None
    found = run(RayPool(Misbehaves(how), address[4:], timeout=timeout), 40)
    assert found.failed == {"error": 0, "crash": 0, "hang": 0, how: len(bad)}


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [("refuse", BackendError, "memory is not back"), ("bug", RuntimeError, "a bug of ours")],
)
def test_what_is_no_outcome_ends_the_campaign(
    address: str, how: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(open_pool(Misbehaves(how), address), 60)


def test_what_was_finished_before_is_handed_over(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job()
    first = next(i for i in range(60) if is_bad(work.model.trial(work.space, 0, i).flips))
    assert first
    engine = c._Engine(Misbehaves("bug"), 1)
    engine.open()
    rows, *failure = engine.run(work, list(range(60)))
    assert [row.trial for row in rows] == list(range(first))
    assert failure[0] == "TypeError"
    pool = open_pool(Misbehaves("bug"), address)
    monkeypatch.setattr(pool, "_batch", lambda *_: 60)
    handed = pool.run(work, iter(range(60)))
    assert [row.trial for row in next(handed)] == list(range(first))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        next(handed)
    pool.close()


def test_an_engine_that_does_not_open(address: str) -> None:
    with pytest.raises(BackendError, match="no such device"):
        open_pool(CannotOpen("refuse"), address)


def test_a_cluster_without_gpus(address: str) -> None:
    with pytest.raises(BackendError, match="no GPU"):
        open_pool(OnGpu(), address)


@dataclass(frozen=True)
class OnGpu(Opens):
    backend: str = "tensorrt"


def test_no_cluster_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("ray is not running\nand more words")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        BackendError, match=r"no Ray cluster at 10\.0\.0\.1:6379: ray is not running"
    ) as e:
        open_pool(Opens(), "ray:10.0.0.1:6379")
    assert "more words" not in str(e.value)


def test_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"resq-deploy\[ray\]"):
        open_pool(Opens(), "ray")


@dataclass(frozen=True)
class OpensBundle:
    """Says which bundle it has opened."""

    bundle: str

    def __call__(self, threads: int) -> TrialEngine:
        engine = plain()
        engine.runner.backend = self.bundle  # type: ignore[misc]
        return engine


def test_a_bundle_travels_with_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    write(tmp_path / "m.resq")
    golden = (tmp_path / "m.resq" / "model.int8.onnx").read_bytes()
    shipped = ship(OpensBundle(str(tmp_path / "m.resq")))
    assert isinstance(shipped, Shipped)
    (tmp_path / "m.resq").rename(tmp_path / "gone")
    opened = {shipped(1).runner.backend for _ in range(2)}  # type: ignore[attr-defined]
    (place,) = map(Path, opened)
    assert place.is_relative_to(tmp_path / "there")
    assert (place / "model.int8.onnx").read_bytes() == golden
    (place / "model.int8.onnx").write_bytes(b"other")
    with pytest.raises(IntegrityError):
        shipped(1)


def test_what_has_no_bundle_is_sent_as_it_is() -> None:
    assert ship(Opens()) == Opens()
