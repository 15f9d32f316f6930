"""What the system says of memory, read from files written for the test."""

from __future__ import annotations

import sys

import pytest
import torch

from loraweave.common import process
from loraweave.composer.train.memory import MemoryUse, free_bytes

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 3000 kB available, in no container."""
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:   3000 kB\n")
    monkeypatch.setattr(process, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(process, "CGROUP", tmp_path)
    return tmp_path


def limited(folder, maximum, current, cached):
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_free_is_what_the_machine_has_available(system):
    assert free_bytes(CPU) == 3000 * 1024


def test_in_a_container_free_is_what_its_limit_leaves(system):
    limited(system, 500_000, 300_000, 50_000)
    assert free_bytes(CPU) == 250_000
    limited(system, 300_000, 400_000, 0)
    assert free_bytes(CPU) == 0


def test_a_container_without_a_limit_or_with_a_larger_one_leaves_what_the_machine_has(system):
    limited(system, "max", 300_000, 0)
    assert free_bytes(CPU) == 3000 * 1024
    limited(system, 10**12, 0, 0)
    assert free_bytes(CPU) == 3000 * 1024


def test_where_the_system_does_not_say_nothing_is_claimed(system):
    (system / "meminfo").unlink()
    assert free_bytes(CPU) is None
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="no other system has it")
def test_use_has_grown_by_at_least_what_was_written_to(monkeypatch):
    monkeypatch.setattr(MemoryUse, "_highest", lambda self: 7_000_000)
    use = MemoryUse(CPU)
    assert use.grown() is None
    monkeypatch.setattr(MemoryUse, "_highest", lambda self: use._begun + 5_000_000)
    assert use.grown() == 5_000_000
