"""Pieces on processes of this machine, some of which die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import joblib
import psutil
import pytest
import torch

import loraweave.common.spread as spreading
from loraweave.common.display import progress_bar
from loraweave.common.spread import Failed, processes_here, require_all, spread
from loraweave.errors import InvalidTask, WorkersFailed

ROOT = Path(__file__).parents[2]
TRIED = 2
DIES_ONCE, DIES_ALWAYS, RAISES, IS_PECULIAR = 1, 5, 2, 3
PIECES = {f"piece {number}": number for number in range(8)}


class Peculiar(Exception):
    """Cannot be unpickled: its arguments are not those of its class."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def work(folder, number):
    """Notes that it runs, and then does what its number says."""
    ran = runs(folder, number)
    (folder / f"{number}-{os.getpid()}-{time.monotonic_ns()}").touch()
    # what runs beside it is in the middle of its work
    time.sleep(0.3)
    if (number == DIES_ONCE and ran == 0) or number == DIES_ALWAYS:
        os._exit(1)
    if number == RAISES:
        raise InvalidTask("two is no task")
    if number == IS_PECULIAR:
        raise Peculiar("three", "parts")
    return number * number, os.getpid(), torch.get_num_threads(), processes_here(None)


def runs(folder, number):
    return len(list(folder.glob(f"{number}-*")))


def outcomes(folder, pieces=PIECES, **options):
    with progress_bar(False) as bar:
        return dict(spread(partial(work, folder), pieces, **{"n_jobs": 2, "label": "squaring", "bar": bar, **options}))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What became of the pieces in two processes, and the folder in which each noted that it ran."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, joblib.parallel_config(n_jobs=2):
        patch.setattr(spreading, "TRIES", TRIED)
        return outcomes(folder, n_jobs=None), folder


def whole(found):
    return {name: each for name, each in found[0].items() if not isinstance(each, Failed)}


def failed(found):
    return {name: each.error for name, each in found[0].items() if isinstance(each, Failed)}


def test_pieces_run_in_other_processes_with_the_threads_of_this_one(found):
    assert {name: result[0] for name, result in whole(found).items()} == {f"piece {n}": n * n for n in (0, 1, 4, 6, 7)}
    assert os.getpid() not in {result[1] for result in whole(found).values()}
    assert {result[2] for result in whole(found).values()} == {torch.get_num_threads()}


def test_a_killed_process_costs_its_piece_and_no_other(found):
    assert [runs(found[1], number) for number in PIECES.values()] == [1, 2, 1, 1, 1, TRIED, 1, 1]


def test_a_piece_that_kills_every_worker_is_given_up_by_name(found):
    lost = failed(found)[f"piece {DIES_ALWAYS}"]
    assert isinstance(lost, WorkersFailed)
    assert "'piece 5' was given up after 2 workers were lost" in str(lost)


def test_what_a_piece_raises_comes_back_under_its_name(found):
    assert failed(found).keys() == {"piece 2", "piece 3", "piece 5"}
    assert isinstance(failed(found)["piece 2"], InvalidTask)
    assert str(failed(found)["piece 3"]) == "Peculiar: three parts"


def test_a_piece_spreads_nothing_itself(found):
    assert {result[3] for result in whole(found).values()} == {None}


def test_one_worker_is_this_process_and_runs_the_pieces_in_order(tmp_path):
    pieces = {name: number for name, number in PIECES.items() if number not in (DIES_ONCE, DIES_ALWAYS)}
    with joblib.parallel_config(n_jobs=2):
        found = outcomes(tmp_path, pieces, n_jobs=1)
    assert list(found) == list(pieces)
    assert {result[1] for result in whole([found]).values()} == {os.getpid()}
    assert {result[3] for result in whole([found]).values()} == {None}


def test_the_first_failure_is_raised_with_the_names_of_the_others():
    found = {"a": 1, "b": Failed(InvalidTask("no task")), "c": Failed(OSError("no disk"))}
    with pytest.raises(InvalidTask, match="no task") as raised:
        require_all(found)
    assert raised.value.__notes__ == [
        "this was piece 'b' of 3; the same call runs what failed again",
        "'c' failed, too: OSError: no disk",
    ]
    require_all({"a": 1})


def test_joblib_says_where_and_a_number_of_the_call_comes_first():
    assert processes_here(None) is None
    with joblib.parallel_config(backend="loky", n_jobs=3):
        assert processes_here(None) == 3
        assert processes_here(2) == 2
    with joblib.parallel_config(backend="sequential"):
        assert processes_here(None) is None
    cores = joblib.cpu_count() // torch.get_num_threads()
    assert processes_here(-1) == max(1, cores)


@pytest.mark.parametrize("n_jobs", [0, True, 1.5])
def test_a_number_that_is_none_is_refused(n_jobs):
    with pytest.raises(WorkersFailed, match="give a number of workers, -1 for all"):
        processes_here(n_jobs)


@pytest.mark.parametrize("backend", ["threading", "multiprocessing"])
def test_backends_whose_workers_share_a_model_or_cannot_be_lost_are_refused(backend):
    with (
        joblib.parallel_config(backend=backend, n_jobs=2),
        pytest.raises(WorkersFailed, match="name one of loky, sequential"),
    ):
        processes_here(None)


DRIVER = """
import time
from loraweave.common.display import progress_bar
from loraweave.common.spread import spread

with progress_bar(False) as bar:
    for name, _ in spread(time.sleep, {"short": 0, "long": 600, "longer": 601}, n_jobs=2, label="", bar=bar):
        print(name, flush=True)
"""


def test_the_workers_of_a_driver_that_is_killed_end_too():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, env=environment)
    assert driver.stdout.readline() == b"short\n"
    workers = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(workers, timeout=120)
    assert len(workers) >= 2
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
