"""Trains a router's parameters; the base and the adapters stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from loraweave.composer.mixing.resolve import resolve
from loraweave.composer.router_training.accelerating import accelerating
from loraweave.composer.router_training.checkpointed_blocks import checkpointed_blocks
from loraweave.composer.router_training.kept_state import KeptState
from loraweave.composer.router_training.rows import Owners, RowReader
from loraweave.composer.router_training.run import Run
from loraweave.composer.router_training.settings import Settings
from loraweave.composer.untouched import untouched
from loraweave.errors import TrainingError
from loraweave.hub.progress import progress_bar
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.routers.routing.token_router import TokenRouter

if TYPE_CHECKING:
    from loraweave.composer.composer import Composer


def fit(engine: Composer, router: Any, dataset: Any, given: Mapping[str, Any]) -> None:
    """Trains `router` on a dataset with these `Settings`, live in the engine's model; what `Composer.fit` says."""
    if not isinstance(router, LearnedRouter):
        name = getattr(router, "name", type(router).__name__)
        if any(isinstance(part, LearnedRouter) for part in getattr(router, "parts", ())):
            raise TrainingError(
                f"router {name!r} is the one of another pool, at the places of this one's experts: fit() it in an engine of "
                "its own pool, and put it onto() this one afterwards"
            )
        if callable(own := getattr(type(router), "fit", None)) and own is not TokenRouter.fit:
            raise TrainingError(f"router {name!r} has no parameters to train: router.fit(engine, dataset) is its own way")
        raise TrainingError(f"{name!r} learns nothing, so there is nothing to fit: it can be activated as it is")
    settings = Settings.of(router, given)
    resolve(router, engine.pool, engine.bound_pool)
    if not any(parameter.requires_grad for parameter in router.parameters()):
        raise TrainingError(f"no parameter of router {router.name!r} requires a gradient, so there is nothing to fit")
    model = engine.model
    reader = RowReader(Owners.of(router), model, engine.tokenizer)
    rows = reader.read(dataset)
    held = [] if settings.evaluation is None else reader.read(settings.evaluation, what="evaluation", first=len(rows))
    kept = KeptState.of(router.name, _determining(router), settings, rows, held)
    device = next(model.parameters()).device
    router.to(device)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        accelerator = stack.enter_context(accelerating(device, settings.mixed_precision))
        bar = stack.enter_context(progress_bar(settings.progress and accelerator.is_main_process, field="seen"))
        stack.enter_context(engine.activate(router))
        # around what the activation has put in: blocks that run again are watched again
        stack.enter_context(checkpointed_blocks(model, settings.gradient_checkpointing))
        try:
            Run(engine, router, settings, rows, held, kept, accelerator, bar).all_steps()
        finally:
            router.step = None
            router.eval()


def _determining(router: LearnedRouter) -> list[Any]:
    """What is trained, as JSON."""
    learning = [name for name, parameter in router.named_parameters() if parameter.requires_grad]
    return [{name: repr(value) for name, value in router.options.items()}, router.members.to_json(), learning]
