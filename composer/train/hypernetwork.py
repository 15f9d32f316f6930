"""Text-to-LoRA: a network that makes an adapter from a task's description and examples, without training on the task."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from loraweave.common.checks import is_whole
from loraweave.common.descent import Descent, descend, warmed_cosine
from loraweave.common.display import progress_bar, tracked
from loraweave.common.files import as_path, replacing
from loraweave.common.options import Count, Positive, Seed, check_options, options_of
from loraweave.common.randomness import seeded, with_seed
from loraweave.common.rows import GivenRows
from loraweave.common.state import tensor_bytes
from loraweave.composer.model.batches import EncodedRow, untouched
from loraweave.composer.model.scoring import encode_pairs
from loraweave.composer.train.jobs import LoraJob
from loraweave.composer.train.passes import SharedPass, job_losses
from loraweave.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    AdapterUnsupported,
    DimensionMismatch,
    InvalidTask,
    TrainingError,
)
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_key
from loraweave.hub.embedders._embedder import Embedder, embed_checked, embedder_of, unit
from loraweave.hub.formats._files import entry, listing, present, read_json
from loraweave.hub.formats._safetensors import hashed_tensors
from loraweave.hub.hub import Hub
from loraweave.hub.licenses import license_of_work
from loraweave.hub.same_base import require_same_base
from loraweave.lowrank import algebra
from loraweave.types import BaseKey, Factors, Fingerprint, Record, Task

FILE, TENSORS, FORMAT = "hypernetwork.json", "hypernetwork.safetensors", 1
# a step shows at most so many of a task's examples
MOST_SHOWN = 5
# half a megabyte each; of larger pools, those whose turn was last
MOST_OPEN = 512
Layers = Mapping[str, tuple[int, int]]
Opener = Callable[[str], Adapter]


class Hypernetwork(nn.Module):
    """`adapter(description=..., examples=...)` is a new adapter of the base that it was trained for.

    For layer l of depth p and type m (its path without the number of the block, and its size), with text vector e:
    h = trunk([LN(W e + c), LN(depth_p), LN(type_m)]), and (a, b / s_l) = H_m h + offset_l, reshaped. The trunk is that of
    the authors' code (SakanaAI/text-to-lora, `linear`, all ranks at once) without its dropout: two linear layers, two
    residual blocks, two linear layers, with SiLU, `width` wide and four times as wide within. e are two unit vectors: of the
    description, and of the mean over examples; one that is not there is zero (the paper has descriptions alone).
    s_l is the root mean square over the adapters of the update's norm. H begins without b, so that all begins at the base.
    """

    def __init__(self, base: BaseKey, layers: Layers, embedder: Embedder, *, rank: Count = 8, width: Count = 128) -> None:
        super().__init__()
        self.base, self.layers, self.embedder = base, dict(layers), embedder
        self.rank, self.width = rank, width
        self.recipe: Mapping[str, Any] = {}
        self.types = _types(layers)
        half, quarter = max(1, width // 2), max(1, width // 4)
        joined, wide = half + 2 * quarter, 4 * width
        depths = 1 + max(depth for paths in self.types.values() for depth in paths)
        self.of_text = nn.Sequential(nn.Linear(2 * embedder.dim, half), nn.LayerNorm(half))
        self.of_depth = nn.Sequential(nn.Embedding(depths, quarter), nn.LayerNorm(quarter))
        self.of_type = nn.Sequential(nn.Embedding(len(self.types), quarter), nn.LayerNorm(quarter))
        mixer = [nn.Linear(joined, wide), nn.SiLU(), nn.Linear(wide, joined), nn.SiLU()]
        last = [nn.LayerNorm(joined), nn.Linear(joined, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU()]
        self.trunk = nn.Sequential(*mixer, _Residual(joined, wide), _Residual(joined, wide), *last)
        sizes = [(len(paths), rank * num_in, rank * num_out) for (_, num_out, num_in), paths in self.types.items()]
        self.heads = nn.ModuleList(nn.Linear(wide, for_a + for_b, bias=False) for _, for_a, for_b in sizes)
        self.offsets = nn.ParameterList(torch.zeros(count, for_a + for_b) for count, for_a, for_b in sizes)
        self.scales_L = nn.Buffer(torch.ones(len(self.layers)))
        for (_, for_a, _), head, offset in zip(sizes, self.heads, self.offsets, strict=True):
            nn.init.zeros_(head.get_parameter("weight")[for_a:])
            nn.init.uniform_(offset[:, :for_a], -((for_a / rank) ** -0.5), (for_a / rank) ** -0.5)

    def factors(self, texts_NE: Tensor) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Of each type: the paths of its layers, a_NLRI and b_NLOR, for N text vectors."""
        text_N1W = self.of_text(texts_NE)[:, None]
        places = {path: place for place, path in enumerate(self.layers)}
        for number, ((_, num_out, num_in), paths) in enumerate(self.types.items()):
            depth_LW = self.of_depth(torch.tensor(list(paths)))
            type_W = self.of_type(torch.tensor(number))
            size = len(texts_NE), len(paths), -1
            joined_NLW = torch.cat([part.expand(size) for part in (text_N1W, depth_LW, type_W)], dim=-1)
            both_NLQ = self.heads[number](self.trunk(joined_NLW)) + self.offsets[number]
            a_NLQ, b_NLQ = both_NLQ.split([self.rank * num_in, self.rank * num_out], dim=-1)
            scale_L = self.scales_L[[places[path] for path in paths.values()]]
            b_NLRO = b_NLQ.unflatten(-1, (self.rank, num_out)) * scale_L[:, None, None]
            yield list(paths.values()), a_NLQ.unflatten(-1, (self.rank, num_in)), b_NLRO.mT

    @torch.no_grad()
    def adapter(self, *, description: str = "", examples: GivenRows | None = None, name: str = "made") -> Adapter:
        """The adapter for a task of which one knows a description, (input, target) examples, or both.

        Raises InvalidTask without either, and for a description that is no text.
        """
        if not isinstance(description, str):
            raise InvalidTask(f"description is {description!r:.60}; it must be a text")
        rows = () if examples is None else Task.of(examples).examples
        shown = [_shown(str(asked), target) for asked, target in rows]
        text_E = text_vector(*_vectors(self.embedder, description, shown), range(len(shown)))
        if not text_E.any():
            raise InvalidTask("nothing is said of the task: give description=..., examples=[(input, target), ...] or both")
        layers = {
            path: Factors(a_RI.contiguous(), b_OR.contiguous())
            for paths, a_1LRI, b_1LOR in self.factors(text_E[None])
            for path, a_RI, b_OR in zip(paths, a_1LRI[0], b_1LOR[0], strict=True)
        }
        recipe = {"method": "loraweave.train_hypernetwork", **self.recipe}
        license = {"license": recipe.pop("license")} if recipe.get("license") else {}
        card = {"description": description, "examples": [str(asked) for asked, _ in rows], "recipe": recipe, **license}
        layers = {path: layers[path] for path in self.layers}
        return Adapter(name, self.base.id, layers, self.base.fingerprint, card)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes a folder, whole or not at all. TrainingError for one that holds something else."""
        path = as_path(folder, "the folder of a hypernetwork")
        if path.exists() and not (path / FILE).is_file() and (not path.is_dir() or any(path.iterdir())):
            raise TrainingError(f"{path} holds something that is no hypernetwork; name another folder")
        raw = tensor_bytes(self.state_dict())
        fingerprint = None if self.base.fingerprint is None else self.base.fingerprint.to_json()
        said = {
            "format": FORMAT,
            "base": {"id": self.base.id, "revision": self.base.revision, "fingerprint": fingerprint},
            "layers": self.layers,
            "embedder": self.embedder.id,
            "options": {"rank": self.rank, "width": self.width},
            "recipe": dict(self.recipe),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        with replacing(path) as new:
            (new / TENSORS).write_bytes(raw)
            (new / FILE).write_text(json.dumps(said, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, embedder: str | Path | Embedder = "sentence") -> Self:
        """Reads what `save_pretrained` wrote; `embedder` is the one that it was trained with.

        Raises AdapterNotFound for a folder without one, DimensionMismatch for another embedder, AdapterCorrupt for files
        that are damaged or were changed, AdapterUnsupported for a format that a newer version wrote.
        """
        path, reads = as_path(folder, "the folder of a hypernetwork"), embedder_of(embedder)
        if not present(path, FILE):
            raise AdapterNotFound(f"{path} is no hypernetwork: it has no {FILE}, and holds {listing(path)}")
        said = read_json(path, FILE)
        if is_whole(said.get("format"), FORMAT + 1):
            raise AdapterUnsupported(
                f"{path / FILE} has format {said['format']}, of a newer loraweave; this one reads {FORMAT}"
            )
        try:
            if said["embedder"] != reads.id:
                raise DimensionMismatch(
                    f"the hypernetwork in {path} reads vectors of embedder {said['embedder']!r}, not {reads.id!r}: pass the "
                    "one that it was trained with as embedder=..."
                )
            tensors = hashed_tensors(path, TENSORS, str(said["sha256"]), said_by=FILE)
            print_of = said["base"]["fingerprint"]
            fingerprint = None if print_of is None else Fingerprint.from_json(print_of)
            base = BaseKey(str(said["base"]["id"]), said["base"]["revision"], fingerprint)
            layers = {str(layer): (int(out), int(into)) for layer, (out, into) in said["layers"].items()}
            # on no device, so that sizes that are not the file's take no memory
            with torch.device("meta"):
                found = cls(base, layers, reads, **{name: int(said["options"][name]) for name in ("rank", "width")})
            found.load_state_dict(tensors, assign=True)
            found.recipe = dict(said["recipe"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if isinstance(error, DimensionMismatch):
                raise
            raise AdapterCorrupt(
                f"{path} is no whole hypernetwork ({type(error).__name__}: {error!s:.200}); copy or train it again"
            ) from error
        return found.eval()


class _Residual(nn.Module):
    def __init__(self, size: int, wide: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, wide), nn.SiLU(), nn.Linear(wide, size), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def _types(layers: Layers) -> dict[tuple[str, int, int], dict[int, str]]:
    """{(path without the first number, O, I): {that number, or 0: path}}."""
    found: dict[tuple[str, int, int], dict[int, str]] = {}
    for path, (num_out, num_in) in layers.items():
        number = re.search(r"(?<![^.])\d+(?![^.])", path)
        rest = path if number is None else f"{path[: number.start()]}*{path[number.end() :]}"
        found.setdefault((rest, num_out, num_in), {})[0 if number is None else int(number[0])] = path
    return found


def train_hypernetwork(
    hub: Hub,
    model: Any = None,
    tokenizer: Any = None,
    *,
    names: Iterable[str] | None = None,
    steps: Count = 1000,
    tasks_per_step: Count = 8,
    rows_per_task: Count = 4,
    rank: Count = 8,
    width: Count = 128,
    lr: Positive = 1e-3,
    seed: Seed = 0,
    embedder: str | Path | Embedder = "sentence",
    start: Hypernetwork | None = None,
    allow_licenses: bool = False,
    progress: bool = True,
) -> Hypernetwork:
    """A `Hypernetwork`, trained on the hub's adapters and what their cards say: Text-to-LoRA (arXiv 2506.06105).

    Without a model it learns to give back the adapters: the mean over tasks and layers of |b a - b* a*|^2 / s_l^2, in
    factors, since a factor alone is arbitrary (the authors take |a - a*| + |b - b*|). With `model` and `tokenizer` it learns
    to answer: the mean loss of `rows_per_task` rows of each task's card, its examples with their outputs, through the frozen
    model with the made adapter in it; the paper finds that only this helps with tasks that were not trained on. `start`
    is a hypernetwork to go on from, whose rank and width then count.

    Each step takes `tasks_per_step` tasks, and of each the description, one to five examples, or both. AdamW, warm-up over a
    tenth of the steps, then a cosine to zero. The paper had 479 tasks with 128 descriptions each; with a few dozen, expect
    adapters near to those it has seen, and compare with `Retriever` (benchmarks, "hypernetwork"). Up to MOST_OPEN adapters
    stay open. Card and license of what is made name the parents.

    Raises TrainingError for settings out of range and fewer than two adapters, InvalidTask for a card that says nothing or,
    with a model, has no outputs, AdapterUnsupported for more than plain LoRA on linear layers, BaseModelMismatch, and
    InvalidLicense for licenses that exclude each other or derived works, unless `allow_licenses`.
    """
    settings = {"steps": steps, "tasks_per_step": tasks_per_step, "rows_per_task": rows_per_task, "lr": lr, "seed": seed}
    given = {**settings, "rank": rank, "width": width}
    check_options("train_hypernetwork()", given, options_of(train_hypernetwork), error=TrainingError)
    _require_sense(hub, model, tokenizer, names, start)
    chosen = None if names is None else list(names)
    records = hub.records() if chosen is None else [hub.record(name) for name in chosen]
    if len(records) < 2:
        raise TrainingError(f"{len(records)} adapters are no pool to learn from: give two or more, better hundreds")
    license = license_of_work([(record.name, record.card) for record in records], allowed=allow_licenses)
    opened = lru_cache(MOST_OPEN)(hub.pool([record.name for record in records], lazy=True).__getitem__)
    reads = embedder_of(embedder) if start is None else start.embedder
    texts = {record.name: _vectors(reads, record.description, _examples(record)) for record in records}
    for record in records:
        if not any(part.any() for part in texts[record.name]):
            raise InvalidTask(f"the card of {record.name!r} has neither description nor examples: hub.update() adds them")
    base, layers, scales = _surveyed(opened, records, progress)
    if start is None:
        network = with_seed(seed, lambda: Hypernetwork(base, layers, reads, rank=rank, width=width))
        network.scales_L.copy_(torch.tensor([scales[path] for path in layers]))
    else:
        if start.layers != layers:
            raise TrainingError(f"start makes {len(start.layers)} layers, the adapters have {len(layers)}, not all the same")
        network = copy.deepcopy(start).train()
    parents = [{"hash": record.hash, "name": record.name} for record in records]
    network.recipe = {**settings, "way": "factors" if model is None else "answers", "parents": parents, "license": license}
    if model is None:
        _descend(network, texts, settings, lambda step, made: _reconstruction(network, opened, step, made), progress)
    else:
        require_same_base("the pool", base, base_key(model))
        rows = {record.name: _rows(model, tokenizer, record) for record in records}
        with untouched(model):
            answer = _answering(model, tokenizer, rows, settings)
            _descend(network, texts, settings, answer, progress)
    return network.eval()


def _require_sense(hub: Any, model: Any, tokenizer: Any, names: Any, start: Any) -> None:
    if not isinstance(hub, Hub) or not isinstance(model, nn.Module | None) or (model is None) != (tokenizer is None):
        raise TrainingError("a hypernetwork learns from a Hub's adapters; pass model and tokenizer both, or neither")
    if not isinstance(start, Hypernetwork | None) or isinstance(names, str):
        raise TrainingError(
            f"start is {start!r:.40}, a Hypernetwork or None, and names {names!r:.60}, a list of names or None"
        )


Made = Sequence[tuple[list[str], Tensor, Tensor]]
# of names and what was made for them
Loss = Callable[[tuple[int, list[str]], Made], Tensor]


def _descend(
    network: Hypernetwork,
    texts: Mapping[str, tuple[np.ndarray, np.ndarray]],
    settings: Mapping[str, Any],
    loss: Loss,
    progress: bool,
) -> None:
    names, steps, lr = list(texts), settings["steps"], settings["lr"]
    warmup = max(1, steps // 10)
    descent = Descent(network.parameters(), lambda step: lr * warmed_cosine(1.0, step, steps, warmup))

    def at(step: int) -> Tensor:
        generator = seeded("hypernetwork", settings["seed"], step)
        order = torch.randperm(len(names), generator=generator)[: settings["tasks_per_step"]].tolist()
        drawn = [names[place] for place in order]
        texts_NE = torch.stack([_drawn(*texts[name], generator) for name in drawn])
        return loss((step, drawn), list(network.factors(texts_NE)))

    with progress_bar(progress, field="loss") as bar:
        descend({"the hypernetwork": descent}, at, steps, bar, title="training the hypernetwork")


def _reconstruction(network: Hypernetwork, opened: Opener, step: tuple[int, list[str]], made: Made) -> Tensor:
    scales = dict(zip(network.layers, network.scales_L.tolist(), strict=True))
    adapters = [opened(name).layers for name in step[1]]
    losses = []
    for paths, a_NLRI, b_NLOR in made:
        targets = [_stacked([each.get(path) for path in paths], a_NLRI[0, 0], b_NLOR[0, 0]) for each in adapters]
        most = max(a_LRI.shape[1] for a_LRI, _ in targets)
        their_a = torch.stack([nn.functional.pad(a_LRI, (0, 0, 0, most - a_LRI.shape[1])) for a_LRI, _ in targets])
        their_b = torch.stack([nn.functional.pad(b_LOR, (0, most - b_LOR.shape[2])) for _, b_LOR in targets])
        scale_L = torch.tensor([scales[path] for path in paths])
        losses.append((squared_distance(a_NLRI, b_NLOR, their_a, their_b) / scale_L**2).mean(dim=0))
    return torch.cat(losses).mean()


def squared_distance(a: Tensor, b: Tensor, their_a: Tensor, their_b: Tensor) -> Tensor:
    """|b a - b' a'|^2 along leading axes, from products of factors alone: a is (.., R, I), b (.., O, R), of any ranks."""

    def inner(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor) -> Tensor:
        return ((b.mT @ other_b) * (a @ other_a.mT)).sum(dim=(-2, -1))

    return inner(a, b, a, b) - 2 * inner(a, b, their_a, their_b) + inner(their_a, their_b, their_a, their_b)


def _stacked(parts: Sequence[Factors | None], like_a: Tensor, like_b: Tensor) -> tuple[Tensor, Tensor]:
    """a_LRI and b_LOR of one adapter's layers at its largest rank; zeros where it has none."""
    most = max((part.rank for part in parts if part is not None), default=1)
    a_LRI, b_LOR = torch.zeros(len(parts), most, like_a.shape[1]), torch.zeros(len(parts), like_b.shape[0], most)
    for place, part in enumerate(parts):
        if part is not None:
            a_LRI[place, : part.rank], b_LOR[place, :, : part.rank] = part.a_RI, part.b_OR
    return a_LRI, b_LOR


def _answering(model: Any, tokenizer: Any, rows: Mapping[str, Sequence[EncodedRow]], settings: Mapping[str, Any]) -> Loss:
    def loss(step: tuple[int, list[str]], made: Made) -> Tensor:
        number, names = step
        chosen, jobs, device = [], [], next(model.parameters()).device
        for place, name in enumerate(names):
            order = torch.randperm(len(rows[name]), generator=seeded("rows", settings["seed"], number, name)).tolist()
            count = settings["rows_per_task"]
            # a card of few rows shows some twice, so that all tasks have as many
            chosen += [rows[name][order[turn % len(order)]] for turn in range(count)]
            factors = {
                path: (a_NLRI[place, layer].to(device), b_NLOR[place, layer].to(device))
                for paths, a_NLRI, b_NLOR in made
                for layer, path in enumerate(paths)
            }
            jobs.append(LoraJob(name, factors, 1.0))
        with SharedPass(model, jobs):
            return job_losses(model, tokenizer, chosen, len(jobs)).mean()

    return loss


def _surveyed(opened: Opener, records: Sequence[Record], progress: bool) -> tuple[BaseKey, Layers, Mapping[str, float]]:
    """The one base, (O, I) of each layer in the order of first mention, and s_l."""
    layers: dict[str, tuple[int, int]] = {}
    squares: dict[str, float] = {}
    base = records[0].base
    for record in tracked(records, "looking at adapters", total=len(records), shown=progress):
        adapter = opened(record.name)
        require_same_base(f"adapter {record.name!r}", adapter.base, base)
        if adapter.heads or adapter.invocation:
            raise AdapterUnsupported(f"adapter {record.name!r} has heads or invocation tokens, which no hypernetwork makes")
        for path, factors in adapter.layers.items():
            shape = len(factors.b_OR), factors.a_RI.shape[1]
            if not factors.is_product or factors.kind != "linear" or layers.setdefault(path, shape) != shape:
                raise AdapterUnsupported(
                    f"adapter {record.name!r}: layer {path!r} is no plain LoRA of a linear layer, or of other size than in "
                    "the adapters before it; name those to learn from in names=[...]"
                )
            squares[path] = squares.get(path, 0.0) + algebra.inner(factors, factors)
    return base, layers, {path: (square / len(records)) ** 0.5 or 1.0 for path, square in squares.items()}


def _rows(model: Any, tokenizer: Any, record: Record) -> list[EncodedRow]:
    pairs = _pairs(record)
    if not pairs:
        raise InvalidTask(
            f"the card of {record.name!r} has no outputs beside its examples, which training through the model needs: "
            "hub.update(name, examples=..., outputs=...), or train on factors, without a model"
        )
    return encode_pairs(model, tokenizer, Task(pairs, instruction=record.description), pairs)


def _pairs(record: Record) -> list[tuple[str, str]]:
    outputs = entry(record.card, "outputs", list) or []
    return [(text, str(target)) for text, target in zip(record.examples, outputs, strict=False)]


def _examples(record: Record) -> list[str]:
    return [_shown(*pair) for pair in _pairs(record)] or list(record.examples)


def _shown(text: str, target: str) -> str:
    return f"{text}\n{target}"


def _vectors(embedder: Embedder, description: str, examples: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The unit vector of the description, zero where there is none, and those of examples (N, dim)."""
    said = embed_checked(embedder, (description,))[0] if description.strip() else np.zeros(embedder.dim, np.float32)
    return said, embed_checked(embedder, tuple(examples)) if examples else np.zeros((0, embedder.dim), np.float32)


def text_vector(said_D: np.ndarray, shown_ND: np.ndarray, which: Sequence[int], *, describe: bool = True) -> Tensor:
    """e: the description's vector, and the unit mean over the chosen examples."""
    mean_D = unit(shown_ND[list(which)].mean(axis=0)) if len(which) else np.zeros_like(said_D)
    return torch.from_numpy(np.concatenate([said_D if describe else np.zeros_like(said_D), mean_D]).astype(np.float32))


def _drawn(said_D: np.ndarray, shown_ND: np.ndarray, generator: torch.Generator) -> Tensor:
    """One of the forms in which a user may describe the task: in words, by examples, or both."""
    form = int(torch.randint(3, (), generator=generator))
    count = 1 + int(torch.randint(MOST_SHOWN, (), generator=generator))
    which = torch.randperm(len(shown_ND), generator=generator)[:count].tolist()
    # of what there is
    if not said_D.any() or not which:
        return text_vector(said_D, shown_ND, which)
    return text_vector(said_D, shown_ND, which if form else [], describe=form != 1)
