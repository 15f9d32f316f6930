"""Pictures are drawn with matplotlib, which is optional."""

from __future__ import annotations

from typing import Any

from loraweave.errors import PackageMissing


def blank_figure(why: str, **settings: Any) -> Any:
    """A matplotlib Figure made with these settings. PackageMissing, which says `why`, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PackageMissing(f"{why}: pip install 'loraweave[plot]'") from error
    return Figure(**settings)


def count_along(axes: Any) -> None:
    """Makes the horizontal axis show whole numbers only: it counts steps, candidates or evaluations."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
