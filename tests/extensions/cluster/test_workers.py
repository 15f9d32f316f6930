"""Pieces on a Dask cluster of several processes and on a Ray cluster, some of which die."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import engines
import joblib
import pytest

import loraweave.common.spread as spreading
from loraweave.common.display import progress_bar
from loraweave.common.spread import processes_here, spread
from loraweave.errors import WorkersFailed
from loraweave.extensions.cluster.workers import _counted

ROOT = Path(__file__).parents[3]
DIES_ONCE = 1


def work(folder, number):
    """Notes that it runs, and then does what its number says."""
    ran = runs(folder, number)
    (folder / f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
    # what runs beside it is in the middle of its work
    time.sleep(0.3)
    if number == DIES_ONCE and ran == 0:
        os._exit(1)
    assert processes_here(None) is None
    return number * number


def runs(folder, number):
    return len(list(folder.glob(f"{number}-*")))


def outcomes(folder, pieces):
    assert processes_here(None) == 1
    with progress_bar(False) as bar:
        return dict(spread(partial(work, folder), pieces, n_jobs=None, label="squaring", bar=bar))


@pytest.fixture
def dask_client():
    """dask_client(workers): a client of so many worker processes behind a scheduler, all on loopback; then none is left."""
    distributed = pytest.importorskip("distributed")

    @contextmanager
    def client(num_workers):
        settings = {"n_workers": num_workers, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
        with distributed.LocalCluster(**settings, silence_logs=50) as cluster, distributed.Client(cluster) as opened:
            yield opened

    return client


def test_a_dask_worker_that_dies_costs_its_piece_and_no_result(dask_client, tmp_path):
    pieces = {f"piece {number}": number for number in (0, DIES_ONCE, 4)}
    with dask_client(2), joblib.parallel_config(backend="dask"):
        found = outcomes(tmp_path, pieces)
    assert found == {name: number**2 for name, number in pieces.items()}
    assert runs(tmp_path, DIES_ONCE) == 2


def test_a_cluster_whose_workers_stay_away_is_believed_dead(dask_client, tmp_path, monkeypatch):
    monkeypatch.setattr(_counted, "GONE_S", 1.0)
    monkeypatch.setattr(_counted, "COUNTED_S", 0.1)
    monkeypatch.setattr(spreading, "LOOK_S", 0.1)
    with dask_client(0), joblib.parallel_config(backend="dask"), pytest.raises(WorkersFailed, match="had no worker for 1 s"):
        outcomes(tmp_path, {"piece": 1})
    assert runs(tmp_path, 1) == 0


def test_a_cluster_is_empty_from_the_first_look_that_finds_no_worker(monkeypatch):
    now, workers = 0.0, 2
    monkeypatch.setattr(_counted.time, "monotonic", lambda: now)
    cluster = _counted.Counted(lambda: workers, None)
    assert cluster.room == 4
    # nobody looks while the caller does something else
    now, workers = 1_000.0, 0
    assert cluster.room == 2
    now = 1_250.0
    assert cluster.room == 2
    now, workers = 1_290.0, 1
    assert cluster.room == 2
    now, workers = 1_310.0, 0
    assert cluster.room == 2
    now = 1_620.0
    with pytest.raises(WorkersFailed, match="had no worker for 300 s"):
        _ = cluster.room


@pytest.mark.slow
def test_a_ray_worker_that_dies_costs_its_piece_and_ray_is_not_started_unasked(tmp_path):
    script = ROOT / "tests" / "engine_scripts" / "ray_pieces.py"
    said = engines.run("ray", script, {"root": str(ROOT), "folder": str(tmp_path)}, timeout=500, **engines.RAY)
    assert said["refused"] == 'Ray is not connected: call ray.init(address="...") first, or set RAY_ADDRESS'
    assert said["failed"] == {"raises": "ValueError: its disk is full"}
    assert said["elsewhere"] == ["a", "b", "c", "dies"]
    assert said["ran"] == {"dies": 2, "raises": 1, "a": 1, "b": 1, "c": 1}
