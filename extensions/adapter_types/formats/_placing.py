"""The paths in the base model of a module that a LoRA file names: by a table of rules, or by the model's names."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from loraweave import AdapterUnsupported, Factors, LayerMismatch
from loraweave.extend.models import BaseLayer, as_base_layer, head_size, missing_layer
from loraweave.extensions.adapter_types.formats._known_modules import Rule

WITH_MODEL = "Adapter.from_pretrained(..., model=model)"
# how an error ends if names or shapes in a file do not say enough
GIVE_MODEL = f"give the base model: {WITH_MODEL}"
# the pipeline's name for a part of it, and a step that transformers has removed from CLIP's paths
_OPTIONAL = re.compile(r"^(?:unet|transformer|text_encoder|text_encoder_2|text_encoder_3)\.|(?:(?<=\.)|^)text_model\.")


@dataclass(frozen=True)
class Placement:
    """The paths in the base of one module of a file, and the proportions in which they share B's rows, in order.

    B has `groups` equal runs of rows, each shared in these proportions. `turned` is that of a Rule.
    """

    targets: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    groups: int = 1
    turned: bool = False


class Rules:
    """A table of rules that is searched by names whose dots were turned into underscores."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._by_form: dict[str, list[tuple[re.Pattern[str], Rule]]] = defaultdict(list)
        for rule in rules:
            flat = re.escape(rule.source.replace(".", "_")).replace(r"\#", r"(\d+)")
            self._by_form[_form(rule.source)].append((re.compile(flat), rule))

    def find(self, flat: str) -> list[Placement]:
        """Return every distinct placement that a rule gives the name; several mean that it is ambiguous."""
        placements: list[Placement] = []
        for pattern, rule in self._by_form.get(_form(flat), ()):
            hit = pattern.fullmatch(flat)
            if hit is not None:
                targets = tuple(target.replace("#", "{}").format(*hit.groups()) for target in rule.targets)
                placement = Placement(targets, rule.shares, turned=rule.turned)
                placements += [] if placement in placements else [placement]
        return placements


class BaseNames:
    """The layers of a base model, by path and by path with underscores."""

    def __init__(self, model: nn.Module) -> None:
        layers = ((name, as_base_layer(name, module)) for name, module in model.named_modules())
        self.layers: dict[str, BaseLayer] = {name: layer for name, layer in layers if layer is not None}
        self._flat: dict[str, list[str]] = defaultdict(list)
        for name in self.layers:
            self._flat[name.replace(".", "_")].append(name)
        self.head_size = head_size(getattr(model, "config", None))

    def by_flat(self, flat: str, component: str) -> list[str]:
        """Return the paths that a name with underscores can mean in this model, or in its part `component`."""
        return [*self._flat.get(flat, ()), *self._flat.get(f"{component}_{flat}", ())]

    def path(self, target: str, where: str) -> str:
        """Return a target's path in this model, with or without its pipeline prefix. Raises LayerMismatch if it has none."""
        for name in _shorten(target):
            if name in self.layers:
                return name
        raise missing_layer(where, target, self.layers)

    def fitted(self, path: str, factors: Factors, where: str) -> Factors:
        """Return the factors with the kind and kernel size of the layer at `path`. Raises LayerMismatch for other sizes."""
        base = self.layers[path]
        shape, update_shape = (base.num_outputs, base.num_inputs), (factors.b_OR.shape[0], factors.a_RI.shape[1])
        if shape != update_shape or (factors.kernel and max(factors.kernel) > 1 and factors.kernel != base.kernel):
            raise LayerMismatch(
                f"{where} updates layer {path!r} with (O, I) = {update_shape} and kernel {factors.kernel}, but the model's "
                f"{type(base.module).__name__} has {shape} and kernel {base.kernel}"
            )
        return replace(factors, kind=base.kind, kernel=base.kernel)


def only(placements: Sequence[Placement], name: str, where: str, *, model_given: bool) -> Placement:
    """Return the only placement of the module `name`. Raises AdapterUnsupported if there is none or more than one."""
    if len(placements) == 1:
        return placements[0]
    ways = "" if model_given else f"; give the base model, whose names decide: {WITH_MODEL}"
    if not placements:
        raise AdapterUnsupported(f"{where}: {name!r} is not a module of an architecture whose names are known here{ways}")
    listed = " or ".join(repr(" + ".join(placement.targets)) for placement in placements[:3])
    raise AdapterUnsupported(f"{where}: {name!r} can mean {listed}, and nothing in the file says which{ways}")


def divide(factors: Factors, placement: Placement, name: str, where: str) -> list[Factors]:
    """Return the factors of each target of a placement: its rows of B, and the rows of A that these use.

    Raises AdapterUnsupported, naming the module `name`, if B's rows do not divide in the placement's proportions.
    """
    if len(placement.targets) == 1:
        return [turned(factors) if placement.turned else factors]
    rows, total = factors.b_OR.shape[0], placement.groups * sum(placement.shares)
    if rows % total:
        raise AdapterUnsupported(
            f"{where}: {name!r} is a fused projection of {rows} outputs, which do not divide into {placement.groups} x "
            f"({' : '.join(map(str, placement.shares))}) for {', '.join(placement.targets)}"
        )
    grouped = factors.b_OR.reshape(placement.groups, rows // placement.groups, factors.rank)
    parts = torch.split_with_sizes(grouped, [rows // total * share for share in placement.shares], dim=1)
    return [_used(replace(factors, b_OR=part.reshape(-1, factors.rank).contiguous())) for part in parts]


def _used(factors: Factors) -> Factors:
    # files that join several updates into one have zeros outside the blocks
    used_R = factors.b_OR.any(dim=0)
    if bool(used_R.all()) or not bool(used_R.any()):
        return factors
    return replace(factors, a_RI=factors.a_RI[used_R].contiguous(), b_OR=factors.b_OR[:, used_R].contiguous())


def turned(factors: Factors) -> Factors:
    """Return the factors with the two halves of their outputs swapped, if each half is as large as the inputs."""
    if len(factors.b_OR) != 2 * factors.a_RI.shape[1]:
        return factors
    return replace(factors, b_OR=torch.cat(factors.b_OR.chunk(2)[::-1]))


def _form(name: str) -> str:
    return "_".join("#" if piece.isdigit() else piece for piece in re.split(r"[._]", name))


def _shorten(target: str) -> list[str]:
    """Return the path, and the path without its optional parts (`unet.`, `text_model.` and the like), one or both."""
    paths = [target]
    for name in paths:
        for hit in _OPTIONAL.finditer(name):
            short = name[: hit.start()] + name[hit.end() :]
            if short not in paths:
                paths.append(short)
    return paths
