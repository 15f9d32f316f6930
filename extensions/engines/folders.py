"""Formulas as folders on disk, named by content, that an engine loads as one LoRA adapter; up to a limit of bytes."""

import logging
import math
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from loraweave import (
    Adapter,
    AdapterCorrupt,
    AdapterNotFound,
    AdapterUnsupported,
    BaseKey,
    Fingerprint,
    Formula,
    Hub,
    HubLocked,
    LayerMismatch,
    ScopeError,
    parse,
)
from loraweave.extend import MAX_NAME_CHARACTERS, BudgetExceeded, sync, text_digest
from loraweave.extend.composing import Stored, leaves
from loraweave.extend.formats import entry, read_card
from loraweave.extend.hubs import unsynced
from loraweave.extend.models import require_same_base, rounded_samples, sampled_places, says_nothing

logger = logging.getLogger(__name__)

# the largest relative error of a cut: below the rounding of bf16, in which most servers compute
MAX_ERROR = 1e-3
MAX_BYTES = 4 << 30
# seconds without use before a folder may be removed: an engine may hear late that a request has ended
GRACE_S = 5.0
# part of every key, so that folders of another layout are not reused
LAYOUT = "1"
# the file that marks a folder as flushed to the disk
SETTLED = ".settled"
_KEY = re.compile("[0-9a-f]{32}")
_PINNED = re.compile("(.*)#([0-9a-f]{16})", re.DOTALL)


@dataclass(frozen=True)
class Folder:
    """A formula written as a folder. Its name, `key`, is a hash of the formula, its contents, the rank limit and the base.

    `relative_error` is the error of the whole update from the cut of its rank, in the Frobenius norm; 0 without a cut.
    """

    key: str
    canonical: str
    path: Path
    relative_error: float

    @property
    def name(self) -> str:
        """The name for clients: the canonical formula and the beginning of the key, which changes with the content."""
        text = self.canonical
        return f"{text if len(text) <= MAX_NAME_CHARACTERS else text[: MAX_NAME_CHARACTERS - 3] + '...'}#{self.key[:16]}"


@dataclass
class _Kept:
    size_bytes: int
    users: int = 0
    free_since: float = float("-inf")


class Folders:
    """The folders of one server, in `root`, which no other process may use meanwhile. Raises HubLocked if one does.

    An update of a rank above `max_rank` is cut to it, and refused where that costs more than `max_error`. Above `max_bytes`
    the least recently used folders are deleted, but none that is in use or was a few seconds ago, even beyond the limit.
    Any thread may call; merges are made one at a time. `base` is the engine's model, `shapes` are {parameter: shape} of it,
    where known: vLLM ignores an update of a layer that its model does not have, and answers as the base.
    """

    def __init__(
        self,
        hub: Hub,
        root: Path,
        *,
        max_rank: int,
        max_error: float = MAX_ERROR,
        max_bytes: int = MAX_BYTES,
        base: BaseKey | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._hub, self._root, self._base, self._shapes = hub, root, base, shapes or {}
        self._max_rank, self._max_error, self._max_bytes = max_rank, max_error, max_bytes
        self._lock = threading.RLock()
        self._making = threading.Lock()
        self._later = ThreadPoolExecutor(1)
        root.mkdir(parents=True, exist_ok=True)
        self._owner = FileLock(root / ".lock")
        try:
            self._owner.acquire(timeout=0)
        except Timeout:
            raise HubLocked(f"another process serves from {root}; give this one a folder of its own") from None
        self._kept = self._found()

    def close(self) -> None:
        """Release the folder for other processes."""
        self._later.shutdown()
        self._owner.release()

    def key(self, name: str) -> str:
        """Return the key of a formula, or of a folder's name, with the hub's adapters as they are now.

        Raises FormulaError for a formula that cannot be read, what the hub raises for a name that it lacks, ScopeError for
        the base model, routers and `auto`, which are not adapters, and AdapterNotFound for a folder's name where the content
        of its formula has changed.
        """
        return self._formula(name)[1]

    def hold(self, name: str) -> Folder:
        """Return the folder of a formula or of a folder's name, made if it is missing; it stays until `release` of its key.

        Raises what `key` raises, AdapterUnsupported for an update that the engine cannot load, or not within `max_error`,
        BaseModelMismatch and LayerMismatch for adapters of another base model, BudgetExceeded for a folder above the limit.
        """
        with self._making:
            formula, key = self._formula(name)
            if not self._use(key):
                # of the adapters just read, whatever happens to the hub meanwhile
                pool = formula.pool(self._hub)
                if any(isinstance(leaf, Stored) and leaf.key not in pool.names for leaf in leaves(formula.root)):
                    raise ScopeError(f"{formula} is a router, which weighs every token by itself, not an adapter")
                key = self._key(formula.identity(pool))
                if not self._use(key):
                    for expert in pool.names:
                        self._check_base(pool[expert].name, pool[expert].base)
                    # the merge stays on this machine, and licenses only restrict giving it away
                    merged = formula.merge(pool, progress=False, allow_licenses=True, interference=False)
                    self._check_layers(merged)
                    self._write(formula.canonical, key, merged)
        path = self._root / key
        try:
            card = read_card(path)[0]
            error = entry(entry(card, "export", dict), "relative_error", float)
            if error is None:
                raise AdapterCorrupt(f"{path} does not say how far its rank was cut; remove it")
            self._check_error(formula.canonical, error)
        except BaseException:
            self.release(key)
            raise
        return Folder(key, formula.canonical, path, error)

    def release(self, key: str) -> None:
        """End one use of a folder."""
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                kept.users -= 1
                kept.free_since = time.monotonic()

    def surplus(self) -> list[str]:
        """List the keys of the least recently used folders that are beyond the limit; the newest is not among them."""
        with self._lock:
            total, keys = sum(kept.size_bytes for kept in self._kept.values()), []
            for key, kept in list(self._kept.items())[:-1]:
                if total <= self._max_bytes:
                    break
                total -= kept.size_bytes
                keys.append(key)
            return keys

    def trim(self) -> None:
        """Remove folders that are beyond the limit and not in use."""
        with self._lock:
            for key in self.surplus():
                kept = self._kept[key]
                if kept.users <= 0 and time.monotonic() - kept.free_since >= GRACE_S:
                    old = self._root / f".{key}.old"
                    (self._root / key).rename(old)
                    shutil.rmtree(old, ignore_errors=True)
                    del self._kept[key]

    def touch(self, key: str) -> None:
        """Mark the folder as just used."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)

    def _formula(self, name: str) -> tuple[Formula, str]:
        pinned = _PINNED.fullmatch(name)
        formula = parse(pinned[1] if pinned else name).expand(self._hub)
        if formula.is_base:
            raise ScopeError(f"{name!r:.80} is the base model, which has no adapter: ask for the model by the server's name")
        key = self._key(formula.identity(self._hub))
        if pinned and not key.startswith(pinned[2]):
            raise AdapterNotFound(
                f"{name!r} is no longer there: its adapters have changed, and {formula.canonical!r} is now #{key[:16]}"
            )
        return formula, key

    def _key(self, identity: str) -> str:
        return text_digest(f"{LAYOUT} {identity} {self._max_rank} {self._base}")[:32]

    def _use(self, key: str) -> bool:
        with self._lock:
            if (kept := self._kept.get(key)) is None:
                return False
            kept.users += 1
            self._kept.move_to_end(key)
            return True

    def _write(self, canonical: str, key: str, merged: Adapter) -> None:
        unfinished = self._root / f".{key}.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            with unsynced():
                report = merged.export(unfinished, target="vllm", max_rank=self._max_rank, allow_licenses=True)
            self._check_error(canonical, report.relative_error, merged.rank)
            size = _size_bytes(unfinished)
            if size > self._max_bytes:
                raise BudgetExceeded(
                    f"the folder of {canonical!r:.200} has {size} bytes, above the limit of {self._max_bytes} for all"
                )
            unfinished.rename(self._root / key)
            self._later.submit(self._settle, self._root / key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if report.relative_error:
            logger.warning(
                "%s: rank %d cut to %d, relative error %.3g", canonical, merged.rank, report.rank, report.relative_error
            )
        with self._lock:
            self._kept[key] = _Kept(size, users=1)

    @staticmethod
    def _settle(folder: Path) -> None:
        """Flush a folder that is already in use to the disk, so that it survives a power failure, and mark it as flushed."""
        # the folder may have been removed meanwhile
        with suppress(FileNotFoundError):
            for path in folder.iterdir():
                sync(path)
            (folder / SETTLED).touch()
            sync(folder)

    def _check_error(self, canonical: str, error: float, rank: int | None = None) -> None:
        if error > self._max_error:
            raise AdapterUnsupported(
                f"{canonical!r:.200} has {f'rank {rank}' if rank else 'a rank'} above the server's {self._max_rank}, and "
                f"the cut changes the update by {error:.3g} of its norm, above the limit of {self._max_error:g}: ask for "
                "fewer adapters, give the formula a rank, start the server with a larger rank, or raise that limit"
            )

    def _check_base(self, name: str, its: BaseKey) -> None:
        if self._base is None:
            return
        require_same_base(f"adapter {name!r}", its, self._base, whatever_id=says_nothing(self._base.id))
        if not self._base.proves(its):
            logger.warning("adapter %r was made for %r, and nothing proves that %r is it", name, its.id, self._base.id)

    def _check_layers(self, merged: Adapter) -> None:
        for layer, factors in merged.layers.items() if self._shapes else ():
            model_shape, its = self._shapes.get(f"{layer}.weight"), (factors.b_OR.shape[0], factors.a_RI.shape[1])
            # some layers store their weight transposed
            if model_shape not in (its, its[::-1]):
                raise LayerMismatch(
                    f"{merged.name!r} updates {layer!r} with shape {its}, and the server's model has "
                    f"{f'shape {model_shape}' if model_shape else 'no such layer'} there: it was made for another model"
                )

    def _found(self) -> OrderedDict[str, _Kept]:
        """Return {key: folder} of an earlier process's folders, oldest first; remove those not marked as flushed."""
        for path in self._root.iterdir():
            if path.name.startswith(".") and path.name != ".lock":
                shutil.rmtree(path, ignore_errors=True)
        folders = [path for path in self._root.iterdir() if _KEY.fullmatch(path.name) and path.is_dir()]
        settled = [path for path in folders if (path / SETTLED).is_file()]
        for path in set(folders).difference(settled):
            shutil.rmtree(path, ignore_errors=True)
        ordered = sorted(settled, key=lambda path: path.stat().st_mtime_ns)
        return OrderedDict((path.name, _Kept(_size_bytes(path))) for path in ordered)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stored_base(model: str) -> tuple[BaseKey, dict[str, tuple[int, ...]]]:
    """Return the `base_key` and the parameters' shapes of a causal model in a local folder or the model hub's cache.

    The model is not loaded: only sampled weights are read. If its files are not on this machine, the key has no fingerprint
    and the shapes are empty; the fingerprint has no samples unless the files are safetensors of floating point with the
    parameters' names.
    """
    try:
        folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        logger.warning("%s cannot be read to compare it with the bases of adapters: %s", model, error)
        return BaseKey(model), {}
    own_print, places = sampled_places(dict(empty.named_parameters()))
    read: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name, where in places:
                if name in opened.keys():  # noqa: SIM118
                    stored = opened.get_slice(name)
                    columns = math.prod(stored.get_shape()[1:])
                    pairs = zip(where // columns, where % columns, strict=True)
                    read[name] = torch.stack([stored[row : row + 1].reshape(-1)[at] for row, at in pairs])
    known = [read.get(name) for name, _ in places]
    samples = rounded_samples([sampled for sampled in known if sampled is not None and sampled.is_floating_point()])
    complete = len(samples) == sum(len(where) for _, where in places)
    key = BaseKey(model, None, Fingerprint(own_print.shapes, samples if complete else ()))
    return key, {name: tuple(parameter.shape) for name, parameter in empty.named_parameters(remove_duplicate=False)}
