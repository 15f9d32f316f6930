"""What the residents' paging has done so far, in figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Residency:
    """Counts since the Composer was made, and what is resident now. All sizes in bytes; a budget of None is no limit.

    A hit is an expert of an activation (or prefetch) that was where the layers are; a miss one that had to be brought
    there. `host` is the CPU's memory: the experts of layers on the CPU, and copies kept for other devices. Factors that
    stay mapped from the hub's file count as resident, though the operating system may drop their pages.
    """

    num_hits: int
    num_misses: int
    num_evictions: int
    bytes_from_disk: int
    bytes_to_device: int
    num_on_device: int
    num_on_host: int
    device_bytes: int
    host_bytes: int
    device_budget_bytes: int | None
    host_budget_bytes: int | None

    def __str__(self) -> str:
        asked = self.num_hits + self.num_misses
        share = f" ({self.num_hits / asked:.0%})" if asked else ""
        return "\n".join(
            [
                f"hits       {self.num_hits:,} of {asked:,}{share}, {self.num_evictions:,} evictions",
                f"moved      {_size(self.bytes_from_disk)} disk to host, {_size(self.bytes_to_device)} host to device",
                f"on device  {_held(self.num_on_device, self.device_bytes, self.device_budget_bytes)}",
                f"on host    {_held(self.num_on_host, self.host_bytes, self.host_budget_bytes)}",
            ]
        )


def _held(number: int, size: int, budget: int | None) -> str:
    limit = "no limit" if budget is None else f"{size / budget:.0%} of {_size(budget)}"
    return f"{number:,} experts, {_size(size)} ({limit})"


def _size(num_bytes: int) -> str:
    value, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1024 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
