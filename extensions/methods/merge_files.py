"""mergekit's files, which `loraweave merge FILE.yaml` reads if they mean the same for adapters as for models.

mergekit's merges of task vectors run on the updates of adapters: what remains of each has a density of its own. They are
`GeneralizedTaskArithmetic` (mergekit 0.1.5) with W + B A for the fine-tuned weights: thin out each update, weigh it,
let signs be elected or not, divide by the weights or not, scale by lambda. Randomness is ours: seeds, not torch's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loraweave import Adapter, CompositionError, WeightingError, merge
from loraweave.extend import is_list, is_number, nearest, require_known
from loraweave.extend.merging import (
    DenseUpdate,
    Entries,
    Experts,
    Prune,
    Rule,
    Weights,
    merge_elected,
    prune_random,
    prune_smallest,
    sum_pruned,
)
from loraweave.extensions.methods.methods.breadcrumbs import prune_both_ends
from loraweave.extensions.methods.methods.della import magprune

# tensors with a smaller norm are not rescaled
TINY = 1e-7


@dataclass(frozen=True)
class Kin:
    """A merge method of mergekit's: how it thins out updates, whether it elects signs, and its options' defaults."""

    thinning: str
    elects: bool
    normalize: bool = False
    rescale: bool = False
    # the name of its own parameter of each model, and the default
    extra: tuple[str, float] | None = None


KIN = {
    "task_arithmetic": Kin("nothing", False),
    "ties": Kin("magnitude", True, normalize=True),
    "dare_ties": Kin("random", True, rescale=True),
    "dare_linear": Kin("random", False, rescale=True),
    "breadcrumbs": Kin("outliers", False, extra=("gamma", 0.01)),
    "breadcrumbs_ties": Kin("outliers", True, extra=("gamma", 0.01)),
    "della": Kin("rank", True, normalize=True, rescale=True, extra=("epsilon", 0.15)),
    "della_linear": Kin("rank", False, rescale=True, extra=("epsilon", 0.15)),
}


def mergekit(
    experts: Experts,
    weights: Weights,
    *,
    seeds: Sequence[int],
    of: str,
    densities: Any,
    extras: Any,
    normalize: bool,
    rescale: bool,
    scale: float,
) -> DenseUpdate:
    """Return one layer's merge by the method `of`, a key of `KIN`; each expert has a density and an extra (gamma, epsilon).

    tau_e is what is left of delta_e; with `rescale` it is multiplied by |delta_e|_1 / |tau_e|_1, matrix and bias apart.
    With elected signs the result is scale * sum of w_e tau_e over the experts for which it has the sign of the sum of all,
    by `normalize` divided by the sum of their w_e; else it is scale * sum of w_e tau_e, divided by the sum of all w_e. A
    divisor of 0 is 1.
    """
    kin = KIN[of]
    if kin.thinning == "rank" and any(expert is not None and expert.kind != "linear" for expert in experts):
        raise CompositionError(
            "mergekit ranks entries within rows of a weight, and a layer that is not linear has others here"
        )
    prune = _thinned(kin.thinning, densities, extras, seeds)
    if rescale:
        prune = _with_norm(prune)
    if kin.elects:
        return merge_elected(experts, weights, prune, aggregate="weights" if normalize else "sum", scale=scale)
    total = sum(weights)
    return sum_pruned(experts, weights, prune, scale=scale / (total if normalize and abs(total) >= 1e-8 else 1.0))


def _thinned(thinning: str, densities: Sequence[float], extras: Sequence[float], seeds: Sequence[int]) -> Prune:
    """Return a `Prune` that thins out each expert's update by its own density and extra; both lists follow the experts."""
    settings = list(zip(densities, extras, strict=True))

    def by(density: float, extra: float) -> Prune:
        if density >= 1.0:
            return prune_smallest(1.0)
        match thinning:
            case "magnitude":
                return prune_smallest(density)
            case "random":
                return prune_random(seeds, density)[0]
            case "outliers":
                return prune_both_ends(density, extra)
        return lambda entries: magprune(entries, seeds, density, extra, rescale=False)

    def prune(entries: Entries) -> Sequence[Rule]:
        # one call makes the rules of all experts, so each setting is used once here
        rules = {setting: by(*setting)(entries) for setting in dict.fromkeys(settings[place] for place in entries.places)}
        return [rules[settings[place]][expert] for expert, place in enumerate(entries.places)]

    return prune


@dataclass(frozen=True)
class _Scaled:
    """A pruning rule that applies `rule` to an update's entries, and then multiplies them by `factor`."""

    rule: Rule
    factor: float
    numbers: None = None

    def apply(self, rows: slice, block_BI: Tensor, out_BI: Tensor) -> None:
        self.rule.apply(rows, block_BI, out_BI)
        out_BI.mul_(self.factor)


def _with_norm(prune: Prune) -> Prune:
    """Return `prune` with what is left of each tensor scaled so that its L1 norm is that of the whole tensor."""

    def rescaled(entries: Entries) -> Sequence[Rule]:
        rules = prune(entries)
        before_E, after_E = _norms(entries, None), _norms(entries, rules)
        factors_E = [b / a if min(a, b) >= TINY else 1.0 for b, a in zip(before_E, after_E, strict=True)]
        return list(map(_Scaled, rules, factors_E))

    return rescaled


def _norms(entries: Entries, rules: Sequence[Rule] | None) -> list[float]:
    sums = [0.0] * len(entries)
    for _, stack_EBI in entries.stacks(rules):
        for expert, block_BI in enumerate(stack_EBI):
            sums[expert] += float(block_BI.abs().double().sum())
    return sums


# the keys of mergekit's files that are read; OTHER_KEYS are those that only have a meaning for whole models
KEYS = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
DTYPES = ("float32", "bfloat16", "float16")
OTHER_KEYS = {
    "slices": "puts a model together of layers of others",
    "modules": "merges the parts of a model apart",
    "tokenizer_source": "chooses a tokenizer, which is the base model's here",
    "tokenizer": "chooses a tokenizer, which is the base model's here",
    "chat_template": "writes a template, which is the base model's here",
}
WHOLE = "works on whole weights, base and all, and not on what each model adds to the base"
OTHER_METHODS = {
    "slerp": f"{WHOLE}: nuslerp with a base_model turns the updates, and so does our method slerp",
    "karcher": f"{WHOLE}: our method karcher is the centre of the updates",
    "multislerp": f"{WHOLE}: our method karcher is the centre of the updates",
    "model_stock": "takes negative shares where updates point apart, as LoRA's often do: our method model_stock takes 0",
    "sce": "takes equal shares for updates as small as those of LoRA: our method sce has their own",
    "passthrough": "copies layers of one model",
    "arcee_fusion": "looks for the entries of whole weights that matter",
    "nearswap": WHOLE,
    "ram": WHOLE,
}
METHODS = ("linear", "nuslerp", *KIN)


@dataclass(frozen=True)
class Recipe:
    """A file of mergekit's: the method, and for each model the adapter's name or folder (None for the base) and weight."""

    whose: str
    method: str
    models: tuple[tuple[str | None, dict[str, Any]], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"

    @classmethod
    def of(cls, path: Path, said: Mapping[str, Any]) -> Recipe:
        """Read the recipe in `said`, the parsed YAML of the file `path`.

        Raises WeightingError, naming the key, for settings that have no meaning for adapters.
        """
        for key, why in OTHER_KEYS.items():
            if key in said:
                raise WeightingError(f"{path} has {key!r}, which {why}: leave it out")
        require_known(str(path), said, KEYS, noun="key")
        method, dtype = said.get("merge_method"), said.get("out_dtype") or said.get("dtype") or "float32"
        if method not in METHODS:
            why = OTHER_METHODS.get(
                str(method), f"is not a mergekit method that is read here{nearest(str(method), METHODS)}"
            )
            raise WeightingError(
                f"{path}: {method!r} {why}. A file with a formula has every method; read here: {', '.join(METHODS)}"
            )
        if dtype not in DTYPES:
            raise WeightingError(f"{path} has dtype {dtype!r}; an adapter is written as one of {', '.join(DTYPES)}")
        models, base = said.get("models"), said.get("base_model")
        if not is_list(models, Mapping) or not models:
            raise WeightingError(f"{path} has no 'models', a list of 'model' and 'parameters'")
        if base is None and method != "linear":
            raise WeightingError(
                f"{path} has no base_model, which mergekit's {method} needs: what adapters add is added to it"
            )
        recipe = cls(str(path), str(method), (), said.get("parameters") or {}, str(dtype))
        recipe._require_parameters("parameters", recipe.settings, (*recipe._of_models, *recipe._of_all))
        return replace(recipe, models=tuple(recipe._model(model, base) for model in models))

    @property
    def _of_models(self) -> tuple[str, ...]:
        """The names of the parameters that this method reads for each model."""
        kin = KIN.get(self.method)
        thinned = kin is not None and kin.thinning != "nothing"
        return ("weight", *(["density"] if thinned else []), *([kin.extra[0]] if kin and kin.extra else []))

    @property
    def _of_all(self) -> tuple[str, ...]:
        if self.method == "nuslerp":
            return ("nuslerp_row_wise", "nuslerp_flatten")
        kin = KIN.get(self.method)
        # the mask's dtype changes no number
        return ("normalize", *(["lambda", "int8_mask", "rescale"] if kin else []))

    def _require_parameters(self, place: str, given: Any, known: Sequence[str]) -> None:
        if not isinstance(given, Mapping):
            raise WeightingError(f"{self.whose} has {place} {given!r:.60}, and not names with values")
        require_known(f"{place} of {self.whose}, under {self.method}", given, known, noun="parameter")
        for name, value in given.items():
            if isinstance(value, list | Mapping):
                raise WeightingError(
                    f"{self.whose}: {name} is {value!r:.60}, which changes over the layers; give one for each adapter"
                )
            kind = bool if name not in ("weight", "density", "gamma", "epsilon", "lambda") else float
            if (kind is bool) != isinstance(value, bool) or not (kind is bool or is_number(value)):
                raise WeightingError(
                    f"{self.whose}: {name} is {value!r:.60}; it is {'true or false' if kind is bool else 'a number'}"
                )

    def _model(self, given: Mapping[str, Any], base: str | None) -> tuple[str | None, dict[str, Any]]:
        require_known(f"a model of {self.whose}", given, ("model", "parameters"), noun="key")
        named, own_parameters = given.get("model"), given.get("parameters") or {}
        if not isinstance(named, str):
            raise WeightingError(
                f"{self.whose} has a model {named!r:.60}; write an adapter's folder or name, or BASE+ADAPTER"
            )
        self._require_parameters(f"parameters of {named!r}", own_parameters, self._of_models)
        before, plus, after = named.partition("+")
        if plus and base not in (None, before):
            raise WeightingError(f"{self.whose}: {named!r} is an adapter of {before!r}, and base_model is {base!r}")
        adapter = None if named == base else after or before
        shared = {name: value for name, value in self.settings.items() if name in self._of_models}
        parameters = {**shared, **own_parameters}
        if "weight" not in parameters and adapter is not None:
            raise WeightingError(f"{self.whose}: {named!r} has no 'weight', which mergekit's {self.method} needs")
        return adapter, parameters

    def merge(self, find: Callable[[str], Adapter], *, seed: int = 0, **rules: Any) -> Adapter:
        """Return the merged adapter; `find` returns the adapter of a name or folder, `rules` are options of `merge`.

        Raises what `merge` raises, and WeightingError for weights and densities that mergekit's method cannot take.
        """
        # the base among the models adds nothing to itself
        used = [(find(name), parameters) for name, parameters in self.models if name is not None]
        used.sort(key=lambda pair: (pair[0].hash, pair[1]["weight"]))
        adapters, weights = [adapter for adapter, _ in used], [float(parameters["weight"]) for _, parameters in used]
        if self.method == "linear":
            return merge(adapters, self._shares(weights), method="linear", seed=seed, **rules)
        if self.method == "nuslerp":
            return merge(adapters, weights, method="nuslerp", row_wise=self._row_wise(weights), seed=seed, **rules)
        kin = KIN[self.method]
        flags = {name: bool(self.settings.get(name, getattr(kin, name))) for name in ("normalize", "rescale")}
        scale = float(self.settings.get("lambda", 1.0))
        if kin.thinning == "nothing":
            total = sum(weights)
            scale /= total if flags["normalize"] and abs(total) >= 1e-8 else 1.0
            return merge(adapters, [scale * weight for weight in weights], method="linear", seed=seed, **rules)
        name, default = kin.extra or ("", 0.0)
        # `merge` leaves out weights of zero, which change nothing
        counted = [parameters for _, parameters in used if parameters["weight"]]
        densities = [float(parameters.get("density", 1.0)) for parameters in counted]
        extras = [float(parameters.get(name, default)) for parameters in counted]
        self._require_ranges(densities, extras)
        chosen: dict[str, Any] = {"of": self.method, "densities": densities, "extras": extras, "scale": scale, **flags}
        return merge(adapters, weights, method=mergekit, seed=seed, **chosen, **rules)

    def _shares(self, weights: Sequence[float]) -> list[float]:
        """Return each adapter's share in mergekit's linear, whose divisor includes the base model's own weight.

        Raises WeightingError for weights that sum to 0, or without `normalize` to anything but 1.
        """
        base = sum(float(parameters.get("weight", 0.0)) for name, parameters in self.models if name is None)
        total = sum(weights) + base
        if self.settings.get("normalize", True):
            if total == 0.0:
                raise WeightingError(f"{self.whose}: the weights sum to 0, by which mergekit's linear divides")
            return [weight / total for weight in weights]
        if abs(total - 1.0) > 1e-6:
            raise WeightingError(
                f"{self.whose}: without normalize, mergekit's linear multiplies the base model by {total:g}, the sum of the "
                "weights, which no adapter can; let them sum to 1, or take task_arithmetic"
            )
        return list(weights)

    def _row_wise(self, weights: Sequence[float]) -> bool:
        if len(weights) != 2 or abs(sum(weights)) < 1e-6:
            raise WeightingError(f"{self.whose}: nuslerp turns between two models whose weights do not sum to 0")
        if self.settings.get("nuslerp_flatten", True):
            return False
        if self.settings.get("nuslerp_row_wise", False):
            raise WeightingError(
                f"{self.whose}: nuslerp_row_wise turns columns, which nuslerp here does not: it turns rows without"
            )
        return True

    def _require_ranges(self, densities: Sequence[float], extras: Sequence[float]) -> None:
        for density, extra in zip(densities, extras, strict=True):
            wide = KIN[self.method].thinning == "rank" and not (extra < density < 1.0 - extra)
            if not 0.0 < density <= 1.0 or (wide and density < 1.0) or extra < 0.0:
                bounds = " with epsilon less than its distance from 0 and 1" if wide else ""
                raise WeightingError(f"{self.whose}: density is {density:g}; it is above 0 and at most 1{bounds}")


# keys of the files read here, for the error about a file that no module reads
READS = "mergekit's 'merge_method' and 'models'"


def read(path: Path, said: Mapping[str, Any]) -> Recipe | None:
    """Read a file of mergekit's from its path and its parsed YAML, `said`; return None for any other file.

    Raises WeightingError, naming the key, for settings that have no meaning for adapters.
    """
    return Recipe.of(path, said) if "merge_method" in said else None
