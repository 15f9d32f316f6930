"""Which of the ways measured is returned: never one that held-out examples speak against."""

from __future__ import annotations

from collections.abc import Mapping

# what a searched composition is compared with
PLAIN = ("base", "best_single")


def guard(method: str, held_out_losses: Mapping[str, float], *, guarded: bool) -> tuple[str, str]:
    """The name of the way to return, and why; the losses are those of all ways measured.

    "auto" takes the lowest, the better of base and best single where they are equal. Any other method gives way, if it is
    to be `guarded`, to the better of these two when it is worse.
    """
    if method != "auto" and not guarded:
        return method, "as asked"
    plain = min(PLAIN, key=lambda name: held_out_losses[name])
    if method == "auto":
        best = min(held_out_losses, key=lambda name: (held_out_losses[name], name != plain))
        return best, "lowest loss on held-out examples"
    if held_out_losses[method] > held_out_losses[plain]:
        figures = f"{held_out_losses[method]:.3f} against {held_out_losses[plain]:.3f}"
        return plain, f"{method} was worse than {plain} on held-out examples: loss {figures}"
    return method, "not worse than base and best single on held-out examples"
