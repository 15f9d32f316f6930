"""How much memory this machine has left."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int | None:
    """What a process may still take; in a container what its limit leaves. None where the system does not say."""
    if not MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    return min([free, *_cgroup_bytes()])


def _cgroup_bytes() -> list[int]:
    """What the limit of a container leaves, with the cached files that it would give up; nothing where there is none."""
    limit, used, statistics = (CGROUP / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not limit.is_file() or (text := limit.read_text().strip()) == "max":
        return []
    cached = dict(line.split() for line in statistics.read_text().splitlines())
    return [max(0, int(text) - int(used.read_text()) + int(cached.get("inactive_file", 0)))]
