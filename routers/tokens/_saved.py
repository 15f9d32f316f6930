"""Routers by name, and saved routers read from a folder or from a repository of the model hub."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loraweave.registry as registry
from loraweave.common.checks import is_whole
from loraweave.common.options import require_known
from loraweave.errors import AdapterCorrupt, AdapterNotFound, AdapterUnsupported, LoraweaveError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.adding import layout_of, layouts
from loraweave.hub.formats._files import folder_within, listing, present, read_json
from loraweave.hub.formats._safetensors import hashed_tensors
from loraweave.hub.pool import ExpertPool
from loraweave.hub.sources import ADAPTER_FILES, find_folder
from loraweave.lowrank.algebra import all_finite
from loraweave.routers.tokens._members import LayerTensors, Members
from loraweave.routers.tokens._router import TokenRouter, option_names
from loraweave.routers.tokens._written import ADAPTERS, FILE, FORMAT, TENSORS

# the members of a pool of thousands
MAX_JSON_BYTES = 64 * 2**20
FILES = (FILE, TENSORS, *(f"{ADAPTERS}/*/{name}" for name in ADAPTER_FILES))


@dataclass(frozen=True)
class Saved:
    """The content of router.json. `name` is the router's name in the registry."""

    name: str
    options: Mapping[str, Any]
    members: Members
    sha256: str
    num_adapters: int
    report: Mapping[str, Any] | None


def is_saved_router(folder: Path) -> bool:
    """Return True if the folder has a saved router of ours or of a layout that an extension reads; it may be damaged."""
    return present(folder, FILE) or layout_of(folder) is not None


def read_saved(folder: Path) -> Saved:
    """Read router.json. Raises AdapterNotFound, AdapterCorrupt, or AdapterUnsupported if a newer version wrote it."""
    if not present(folder, FILE):
        raise AdapterNotFound(f"{folder} is not a router: it has no {FILE}, and holds {listing(folder)}")
    recipe = read_json(folder, FILE, max_bytes=MAX_JSON_BYTES)
    saved_format = recipe.get("format")
    if is_whole(saved_format, FORMAT + 1):
        raise AdapterUnsupported(
            f"{folder / FILE} has format {saved_format}, which a newer version of loraweave wrote: update it; this one "
            f"reads {FORMAT}"
        )
    try:
        if saved_format != FORMAT:
            raise ValueError(f"its format is {saved_format!r}, not {FORMAT}")
        members = Members.from_json(recipe["members"])
        options, count = dict(recipe["options"]), int(recipe["adapters"])
        report = None if recipe["report"] is None else dict(recipe["report"])
        if count not in (0, len(members.names)):
            raise ValueError(f"it has {count} adapters of {len(members.names)} experts")
        return Saved(str(recipe["router"]), options, members, str(recipe["sha256"]), count, report)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterCorrupt(f"{folder / FILE} is damaged ({type(error).__name__}: {error})") from error


def read_router(folder: Path, saved: Saved, made_of: type[TokenRouter]) -> TokenRouter:
    """Read the router, with its adapters as `pool` if the folder has them.

    Raises AdapterCorrupt if the files have changed since they were written, and what the class raises for its options.
    """
    tensors = hashed_tensors(folder, TENSORS, saved.sha256, said_by=FILE)
    try:
        _require_room(made_of, saved, tensors, folder)
        router = made_of(saved.members, **saved.options)
        router.load_state_dict(tensors)
    except LoraweaveError:
        raise
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise AdapterCorrupt(f"{folder} is not a router {saved.name!r} ({type(error).__name__}: {error})") from error
    _require_tensors(router, folder / TENSORS)
    router.report = saved.report
    if saved.num_adapters:
        router.pool = _read_pool(folder, saved.members)
    return router.eval()


def _require_room(made_of: type[TokenRouter], saved: Saved, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise AdapterCorrupt, before allocating, if the router that `saved` describes exceeds the file's bytes of tensors."""
    with torch.device("meta"):
        needed = sum(tensor.nbytes for tensor in made_of(saved.members, **saved.options).state_dict().values())
    if needed > (held := sum(tensor.nbytes for tensor in tensors.values())):
        raise AdapterCorrupt(
            f"{folder / FILE} asks for a router of {needed} bytes, but {TENSORS} has {held}: one of them is damaged or of "
            "another router; copy or download the folder again"
        )


def _require_tensors(router: TokenRouter, file: Path) -> None:
    """Raise AdapterCorrupt for numbers that are not finite and for tensors of other layers than the router's."""
    for name, tensor in router.state_dict().items():
        if not all_finite(tensor):
            raise AdapterCorrupt(f"{file} has numbers in {name!r} that are not finite: copy or download the folder again")
    layers = set(router.members.layers)
    for part in router.modules():
        if not isinstance(part, LayerTensors):
            continue
        if strange := sorted(set(part) - layers):
            raise AdapterCorrupt(f"{file} has a tensor for layer {strange[0]!r}, which no expert updates")
        # learned tensors may cover only some layers
        if not part.learned and (missing := sorted(layers - set(part))):
            raise AdapterCorrupt(f"{file} has no tensor for layer {missing[0]!r}, which an expert updates")


def _read_pool(folder: Path, members: Members) -> ExpertPool:
    adapters = {}
    for number, (name, digest) in enumerate(zip(members.names, members.hashes, strict=True)):
        where = folder_within(folder, f"{ADAPTERS}/{number}")
        adapters[name] = Adapter.from_pretrained(where)
        if adapters[name].hash != digest:
            raise AdapterCorrupt(
                f"{where} is not expert {name!r} as the router knows it: its hash is {adapters[name].hash}, not {digest}"
            )
    return ExpertPool(adapters)


def router(
    name: str | Path,
    pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    model: nn.Module | None = None,
    **options: Any,
) -> TokenRouter:
    """Return a new router by name for the experts of a pool, or a saved one from a folder or `owner/name` on the model hub.

    A saved router brings its options and its experts; its `pool` holds their adapters if they were saved, too. With `pool`
    it works for that pool, whatever its order and other experts (`TokenRouter.onto`). What PEFT saved of an X-LoRA or of
    `create_arrow_model` is read, too (docs/extensions/routers.md); `model` is the base, for an X-LoRA whose layers have
    weights of their own.

    Raises UnknownName, with near misses, for an unknown name; WeightingError for an unknown option or a pool that lacks its
    experts; AdapterNotFound if nothing there is a router; AdapterCorrupt for damaged files; AdapterUnsupported for files
    of a newer version; and what a download raises.
    """
    if not isinstance(name, str | Path) or name == "":
        raise UnknownName(f"{name!r} is not a router; give one of {', '.join(router_names())}, or a saved one's folder")
    experts = None if pool is None else ExpertPool.of(pool)
    if isinstance(name, Path) or "/" in name or (name not in registry.names("routers") and Path(name).is_dir()):
        if options:
            raise WeightingError(f"a saved router has its options already: leave out {', '.join(options)}")
        wanted = {"revision": revision, "token": token, "local_files_only": local_files_only}
        patterns = (*FILES, *(file for layout in layouts() for file in layout.FILES))
        folder = find_folder(name, "a saved router", patterns, **wanted)  # type: ignore[arg-type]
        if not present(folder, FILE) and (layout := layout_of(folder)) is not None:
            opened: TokenRouter = layout.read(folder, experts, model)
        else:
            saved = read_saved(folder)
            opened = read_router(folder, saved, router_class(saved.name))
        return opened if experts is None else opened.onto(experts)
    made_of = router_class(name)
    if experts is None:
        raise WeightingError(f"router {name!r} is made for the experts of a pool: pass one, or the folder of a saved router")
    require_known(f"router {name!r}", options, option_names(made_of))
    # evaluation mode, without dropout
    return made_of(experts, **options).eval()


def router_class(name: str) -> type[TokenRouter]:
    """Return the class of that name. Raises UnknownName for an unknown name, and for a search, which is not a router."""
    if name not in registry.names("routers"):
        known = router_names()
        raise UnknownName(f"no router {name!r}{registry.nearest(name, known, 'routers')}; there are {', '.join(known)}")
    registered = _look_up(name)
    if not _is_router(registered):
        raise UnknownName(
            f"{name!r} searches for the weights of a task and is not a router: compose(method={name!r}) runs it; routers "
            f"are {', '.join(router_names())}"
        )
    return registered  # type: ignore[no-any-return]


def router_names() -> list[str]:
    """Return the names of the routers that weigh by a layer's input or the text; imports each file of the registry."""
    return [name for name in registry.names("routers") if _is_router(_look_up(name))]


def _look_up(name: str) -> Any:
    registered = registry.get("routers", name)
    # a search may name a router with the same formula for each input
    return getattr(registered, "token_router", registered)


def _is_router(entry: Any) -> bool:
    return inspect.isclass(entry) and issubclass(entry, TokenRouter)
