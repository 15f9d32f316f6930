"""The statistics of many adapters for merge methods that weigh by data, each adapter's from texts of its own."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from loraweave import Adapter, ExpertPool, Hub, InvalidTask
from loraweave.extend import GivenRows, Row, progress_bar, read_rows, require_all, spread
from loraweave.extend.composing import experts_of
from loraweave.extend.models import base_loader
from loraweave.extensions.statistics.collecting import KINDS, collect_statistics
from loraweave.extensions.statistics.saved import Statistics


def pool_statistics(
    model: Any,
    tokenizer: Any,
    hub_or_pool: Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
    texts: Mapping[str, GivenRows],
    *,
    what: Collection[str] = KINDS,
    layers: Collection[str] = (),
    batch_size: int = 8,
    max_tokens: int = 256,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: bool = True,
) -> dict[str, Statistics]:
    """Return {name: what `collect_statistics` returns} of the adapters named in `texts`, each from its own texts.

    `n_jobs` workers, or those that `joblib.parallel_config` names, each take an adapter at a time, to the same bits, and
    open those of a hub themselves (docs/howto/many_machines.md). The options are those of `collect_statistics`; `layers`
    are recorded of every adapter. All matrices come back into this process.

    Raises InvalidTask if `texts` is not a mapping or is empty, UnknownExpert or AdapterNotFound for an unknown name, before
    anything runs; then what `collect_statistics` raises, with the adapter's name in a note.
    """
    if not isinstance(texts, Mapping) or not texts:
        raise InvalidTask(f"texts are {texts!r:.80}; give {{name of an adapter: its texts}}, at least one")
    experts = experts_of(hub_or_pool)
    # rows may come from a file or data set that cannot be sent to a worker
    rows = {
        name: read_rows(adapter_texts, noun="text", of=repr(name), targets="any") for name, adapter_texts in texts.items()
    }
    hub = experts if isinstance(experts, Hub) else None
    sides = {name: experts[name] if isinstance(experts, ExpertPool) else experts.record(name).name for name in rows}
    pieces = {name: (sides[name], adapter_rows) for name, adapter_rows in rows.items()}
    options = {"what": what, "layers": layers, "batch_size": batch_size, "max_tokens": max_tokens, "seed": seed}
    work = partial(_collected, base_loader(model, tokenizer, n_jobs), hub, options)
    with progress_bar(progress) as bar:
        results = require_all(dict(spread(work, pieces, n_jobs=n_jobs, label="statistics of", bar=bar)))
    return {name: results[name] for name in texts}


def _collected(
    load: Callable[[], tuple[Any, Any]],
    hub: Hub | None,
    options: Mapping[str, Any],
    piece: tuple[Adapter | str, Sequence[Row]],
) -> Statistics:
    """Return the statistics of one adapter from its texts; `piece` is (adapter, or its name in `hub`; rows)."""
    side, rows = piece
    adapter = side if isinstance(side, Adapter) else cast(Hub, hub)[side]
    texts = [(row.asked, row.targets[0]) if row.targets else row.asked for row in rows]
    return collect_statistics(*load(), adapter, texts, progress=False, **options)
