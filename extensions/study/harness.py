"""Scores of EleutherAI's lm-evaluation-harness for whatever mixes adapters into a model (package lm_eval)."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave import Adapter, Composer, Composition, Formula, Hub, PackageMissing, ScopeError, UnknownName, WeightingError
from loraweave.extend import is_list, is_whole
from loraweave.extend.recipes import ExpertModel
from loraweave.extend.routing import TokenRouter
from loraweave.extend.scoring import untouched
from loraweave.extend.training import caller_randomness

BATCH_SIZE = 8


def evaluate_harness(
    what: Any,
    tasks: Sequence[str],
    *,
    model: Any = None,
    tokenizer: Any = None,
    hub_or_pool: Any = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Score a composition, an expert model, a formula, an adapter, a mixture or a router by `lm_eval.simple_evaluate`.

    `tasks` are names of lm_eval, or of YAML files below the folder `include_path`. The model mixes live, and the scores are
    those of the merged model within rounding. A composition has its model and tokenizer, and an expert model its tokenizer
    where it was given one; the others need `model` and `tokenizer`, formulas and mixtures ({name: weight}) also
    `hub_or_pool`, routers where they have no pool. None is the model alone. Prompts are lm_eval's: the instruction and
    demonstrations of a composition's task take no part.

    `limit` is how many documents of each task count, `batch_size` the rows of a pass, 8 by default. Where weights depend on
    the input it is 1, since lm_eval pads rows without a mask. `seed` is that of lm_eval's draws, which leave the caller's
    alone; `settings` are other arguments of simple_evaluate. `["results"][task]` of the result has the figures.

    Raises PackageMissing without lm_eval, UnknownName for an unknown task, WeightingError for a missing argument or a value
    of another kind, ScopeError for a batch size other than 1 where it must be 1, and for what cannot answer as one model.
    """
    if not is_list(tasks, str) or not tasks:
        raise WeightingError(f"tasks is {tasks!r:.80}: give a list of names, such as ['arc_easy']")
    mixed = _mixture_and_pool(what, hub_or_pool)
    match what:
        case Composition():
            router, model, tokenizer = what.router, what.model, what.tokenizer
        case ExpertModel():
            router, model, tokenizer = what, what, what.tokenizer if tokenizer is None else tokenizer
        case _:
            router = mixed and mixed[0]
    by_input = isinstance(router, ExpertModel | TokenRouter)
    rows = batch_size if batch_size is not None else 1 if by_input else BATCH_SIZE
    if not is_whole(rows, 1):
        raise WeightingError(f"batch_size is {batch_size!r}: give a whole number of at least 1")
    if by_input and rows != 1:
        raise ScopeError(f"lm_eval pads rows without a mask, and weights by input would see it: leave batch_size={rows} out")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PackageMissing(f"evaluate_harness needs lm_eval ({error}): pip install 'loraweave[harness]'") from error
    if model is None or tokenizer is None:
        missing = "model" if model is None else "tokenizer"
        raise WeightingError(f"evaluate_harness of {type(what).__name__} needs {missing}=: lw.load_base() gives both")
    # lm_eval reads some ten thousand files to know its own tasks
    manager = None if include_path is None else TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise UnknownName(
            f"lm_eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them, and include_path adds a folder"
        )
    settings |= {"num_fewshot": num_fewshot, "limit": limit, "task_manager": manager}
    settings["tasks"] = manager.match_tasks(list(tasks))
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    mixing: AbstractContextManager[Any] = nullcontext()
    averages = isinstance(what, Composition) and bool(what.members)
    if averages:
        for name, member in what.members.items():
            if member.steps:
                raise ScopeError(f"member {name!r} of the average answers in steps, and lm_eval asks for one pass")
    elif isinstance(what, Composition):
        mixing = what.activate()
    elif mixed is not None:
        mixing = Composer(model, mixed[1], tokenizer=tokenizer).activate(mixed[0])
    with caller_randomness(), untouched(model), mixing:
        # lm_eval asks for nothing but what a plain model has
        kind = _averaging(HFLM, what) if averages else HFLM
        language_model = kind(pretrained=model, tokenizer=tokenizer, batch_size=rows)
        scores: dict[str, Any] = simple_evaluate(model=language_model, **seeds, **settings)
    return scores


def _averaging(language_model: Any, average: Composition) -> Any:
    """Return a subclass of lm_eval's HFLM whose log-probabilities are those of the average of a composition's members."""
    total = sum(member.share for member in average.members.values())

    class Averaging(language_model):  # type: ignore[misc]
        def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
            parts = []
            for member in average.members.values():
                with member.activate():
                    logits = super()._model_call(*args, **kwargs)
                parts.append(logits.float().log_softmax(dim=-1) + math.log(member.share / total))
            return torch.stack(parts).logsumexp(dim=0)

        def _model_generate(self, *_: Any, **__: Any) -> Tensor:
            raise ScopeError("members of an average answer apart: lm_eval can score texts by them, and generate none")

    return Averaging


def _mixture_and_pool(what: Any, hub_or_pool: Any) -> tuple[Any, Any] | None:
    """Return the (mixture, pool) for a Composer that answers as `what` does; None if no mixture is needed."""
    match what:
        case None | Composition() | ExpertModel():
            return None
        case Adapter():
            return {what.name: 1.0}, [what]
        case Formula() if what.is_base:
            return None
        case TokenRouter() if hub_or_pool is None and what.pool is not None:
            return what, what.pool
        case Formula() if hub_or_pool is not None:
            return what.mixture(hub_or_pool), what.pool(hub_or_pool)
        case Mapping() | TokenRouter() if hub_or_pool is not None:
            names = list(what) if isinstance(what, Mapping) else what.experts
            return what, hub_or_pool.pool(names) if isinstance(hub_or_pool, Hub) else hub_or_pool
        case Mapping() | TokenRouter() | Formula():
            raise WeightingError(
                f"evaluate_harness of {type(what).__name__} needs hub_or_pool=, the adapters that it weighs"
            )
    raise WeightingError(
        "evaluate_harness takes a composition, an expert model, a formula, an adapter, a mixture or a router, but got "
        f"{what!r:.80}"
    )
