"""The methods that a study compares, each made into a composition that answers one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

from loraweave import (
    Adapter,
    Composer,
    Composition,
    ExpertPool,
    Formula,
    FormulaError,
    Hub,
    InvalidTask,
    PackageMissing,
    Task,
    UnknownName,
    WeightingError,
    merge,
    names,
    parse,
    router,
    train_adapters,
)
from loraweave.extend import Count, Positive, brought, check_options, get, is_list, is_number, is_whole, nearest, options_of
from loraweave.extend.composing import ComposeCall, Sum
from loraweave.extend.routing import LearnedRouter, TokenRouter, router_class, router_names
from loraweave.extend.training import with_seed

OWN = ("lora", "oracle", "ensemble")
# the arguments of compose() that a method may set for itself
LIMITS = ("k", "budget", "seconds", "weights")
# the keys of a method in the study's file that are not the method's own options
SAID = ("adapters", *LIMITS, "fit", "shown", "calibrated")
KEYS = ("name", "method", "formula", "members", *SAID)
# training steps of a LoRA on the examples alone: about the processor time of a search of 40 evaluations
LORA = {"steps": 20, "lr": 1e-3, "warmup": 3}
# training steps of a router on the pool's rows, and the options that are for its training
FIT_STEPS = 20
TRAINING = {"steps": Count, "lr": Positive}
# the parameters of a merge method that merge() fills in, or that are merge()'s own
SUPPLIED = ("seeds", "statistics", "survey", "rank")
# the arguments of compose() and of trainings that the study itself sets
FIXED = ("model", "tokenizer", "hub_or_pool", "task", "tasks", "seed", "progress", "checkpoint", "inputs", "allow_licenses")


@dataclass(frozen=True, eq=False)
class Method:
    """A method with its options: `said` has the study's settings of it (`SAID`), `options` those that the method takes."""

    name: str
    method: str
    said: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    formula: Formula | None = None
    members: tuple[Method, ...] = ()

    @classmethod
    def read(cls, given: Any) -> Method:
        """Read a method from a name, a formula's text, or a mapping of `KEYS` and the method's options.

        Raises InvalidTask for another form, UnknownName or FormulaError if it is neither a name nor a formula.
        """
        match given:
            case str():
                said: Mapping[str, Any] = {"method": given}
            case Mapping() if ("method" in given) != ("formula" in given):
                said = given
            case _:
                raise InvalidTask(
                    f"a method of a study is {given!r:.60}; it takes a name, a formula, or a mapping with one of both"
                )
        text = said.get("method", said.get("formula"))
        if not isinstance(text, str):
            raise InvalidTask(f"a method of a study is called {text!r:.60}, which is not a text")
        kept = {key: value for key, value in said.items() if key in SAID}
        options = {key: value for key, value in said.items() if key not in KEYS}
        members = tuple(cls.read(member) for member in said.get("members", ()))
        name = str(said.get("name", text))
        if "formula" not in said and text in known_methods():
            return cls(name, text, kept, options, members=members)._checked()
        try:
            formula = parse(text)
        except FormulaError as error:
            # a text with brackets or signs was meant as a formula
            if "formula" in said or set(text) & set("()*+"):
                raise
            raise _unknown(text) from error
        return cls(name, text, kept, options, formula)._checked()

    @property
    def reads_hub(self) -> bool:
        """True if the method's adapters are retrieved from the hub."""
        alone = self.method in ("base", "in_context", "lora", "oracle") or self.formula is not None
        return not (alone or "adapters" in self.said or self.members) or (self.formula is not None and self.formula.is_auto)

    @property
    def reads_examples(self) -> bool:
        """True if the method's answers depend on the task's examples, so that each draw of examples needs a run."""
        if self.members:
            return any(member.reads_examples for member in self.members)
        if self.said.get("shown") or self.reads_hub:
            return True
        if self.formula is not None or self.method in ("base", "oracle", "ensemble"):
            return False
        if self.is_merge:
            return _takes(self.method, "statistics")
        if self.method in router_names():
            return router_class(self.method).learned and self.said.get("fit") != "pool"
        return True

    @property
    def reads_seed(self) -> bool:
        """True if the method draws at random, or depends on examples, which are drawn by the seed."""
        return self.reads_examples or self.said.get("fit") == "pool" or (self.is_merge and _takes(self.method, "seeds"))

    @property
    def is_merge(self) -> bool:
        return self.formula is None and self.method in names("methods")

    def applies(self, oracle: str | None) -> bool:
        """Return True if the method can answer a task whose best adapter is `oracle`: only the method "oracle" needs one."""
        return oracle is not None or "oracle" not in (self.method, *(member.method for member in self.members))

    def adapters(self, hub: Hub, oracle: str | None) -> dict[str, str]:
        """Return {name: hash} of all adapters that the method may use. Raises AdapterNotFound for an unknown name."""
        if self.reads_hub:
            return {record.name: record.hash for record in hub}
        if self.formula is not None:
            return {"formula": self.formula.identity(hub)}
        needed = [*self.said.get("adapters", ()), *([oracle] if self.method == "oracle" and oracle else [])]
        hashes = {name: hub.record(name).hash for name in needed}
        for member in self.members:
            hashes |= member.adapters(hub, oracle)
        return hashes

    def identity(self) -> dict[str, Any]:
        """Return all settings of the method but its name: equal identities give equal answers."""
        members = [member.identity() for member in self.members]
        text = self.method if self.formula is None else self.formula.canonical
        return {"method": text, "said": dict(self.said), "options": dict(self.options), "members": members}

    def check(self, hub: Hub, task: Task, limits: Mapping[str, Any]) -> None:
        """Raise the errors of the method's options and adapter names, before a model is loaded."""
        if self.formula is not None:
            try:
                self.formula.adapters(hub)
            except FormulaError as error:
                if not self.method.isidentifier():
                    raise
                raise _unknown(self.method) from error
        elif self.said.get("fit") == "pool":
            known = {**options_of(router_class(self.method), after=1), **TRAINING}
            check_options(f"method {self.name!r} of the study", self.options, known)
        elif not self.is_merge and self.method not in OWN:
            ComposeCall(_source(self, hub), task, self.arguments(limits, seed=0))
        for member in self.members:
            member.check(hub, task, limits)

    def arguments(self, limits: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
        """Return the arguments of compose() for the method; no examples are held out, which would score a substitute."""
        kept = {key: self.said[key] for key in LIMITS if key in self.said}
        shared = {key: value for key, value in limits.items() if key != "seconds" or not _routes(self.method)}
        return {"method": self.method, "folds": 0, **shared, **kept, **self.options, "seed": seed}

    def _checked(self) -> Method:
        whose = f"method {self.name!r} of the study"
        for key in ("shown", "calibrated"):
            if not isinstance(self.said.get(key, False), bool):
                raise InvalidTask(f"{whose} has {key}: {self.said[key]!r:.40}; it is true or false")
        if "k" in self.said and not is_whole(self.said["k"], 1):
            raise InvalidTask(f"{whose} has k: {self.said['k']!r:.40}; it takes a whole number of at least 1")
        if "adapters" in self.said and not is_list(self.said["adapters"], str):
            raise InvalidTask(f"{whose} has adapters: {self.said['adapters']!r:.60}; list their names")
        if taken := [key for key in FIXED if key in self.options]:
            raise InvalidTask(f"{whose} has {taken[0]!r}, which the study gives to all methods alike: leave it out here")
        if bool(self.members) != (self.method == "ensemble" and not {"adapters", "k"} & set(self.said)):
            raise InvalidTask(f"{whose}: an ensemble, and nothing else, takes 'members', or else 'adapters' or 'k'")
        if self.said.get("fit", "examples") not in ("examples", "pool"):
            raise InvalidTask(
                f"{whose} has fit: {self.said['fit']!r:.40}; a router learns from the 'examples' or the 'pool'"
            )
        if self.said.get("fit") == "pool" and (self.formula is not None or self.method not in router_names()):
            raise InvalidTask(f"{whose} has fit: pool, which is for routers of {', '.join(router_names())}")
        if self.formula is not None and (left := [*self.options, *({"k", "weights", "adapters"} & set(self.said))]):
            raise InvalidTask(f"{whose} is a formula, which has all options in itself: write {left[0]!r} into it")
        if self.is_merge:
            options = {name: value for name, value in self.options.items() if name != "rank"}
            kinds = options_of(get("methods", self.method), after=2, beside=SUPPLIED)
            check_options(f"method {self.method!r}", options, kinds)
        if self.method == "lora" and self.formula is None:
            check_options(whose, self.options, options_of(train_adapters, after=3))
        if self.method in ("oracle", "ensemble") and self.formula is None:
            check_options(whose, self.options, {})
        return self


def known_methods() -> list[str]:
    """Return the names that a study's methods may have, without formulas."""
    return sorted({*ComposeCall.methods(), *OWN, *names("methods")})


def _takes(method: str, parameter: str) -> bool:
    """Return True if a merge method has the parameter, which the caller of the method fills in and users cannot set."""
    return parameter in signature(get("methods", method)).parameters


def _routes(method: str) -> bool:
    """Return True if the method is a router, whose weights no search finds, so that a time limit has no meaning."""
    router_type = get("routers", method) if method in names("routers") else None
    return isinstance(router_type, type) and issubclass(router_type, TokenRouter)


def _unknown(text: str) -> UnknownName:
    known = known_methods()
    hint = nearest(text, known, "routers")
    return UnknownName(f"no method {text!r}{hint}; there are {', '.join(known)}, and formulas, of which {text!r} is none")


@dataclass(frozen=True)
class Case:
    """A task with the examples drawn for it, and the model and hub to answer it with.

    `rows_of` gives the training rows of an adapter of the pool; `fitted` keeps routers that learned on them.
    """

    model: Any
    tokenizer: Any
    hub: Hub
    name: str
    task: Task
    oracle: str | None
    seed: int
    limits: Mapping[str, Any]
    rows_of: Callable[[str], Task]
    allow_licenses: bool
    fitted: dict[Any, Any]


def made(method: Method, case: Case) -> Composition:
    """Return the composition with which the method answers the case's task. Raises the errors of making it."""
    shown = method.said.get("shown") or (method.method == "in_context" and method.formula is None)
    form: dict[str, Any] = {"demonstrations": True} if shown else {}
    if method.said.get("calibrated"):
        form["calibrated"] = True
    case = replace(case, task=replace(case.task, **form)) if form else case
    if method.formula is not None:
        return _of_formula(method.formula, case)
    if method.is_merge:
        return _of_adapter(_merged(method, case), case)
    match method.method:
        case "base" | "in_context":
            return _of(None, method.method, case)
        case "lora":
            settings = {**LORA, "batch_size": min(8, len(case.task.examples)), **method.options}
            tasks, how = {case.name: case.task}, {**settings, "seed": case.seed, "progress": False}
            return _of_adapter(train_adapters(case.model, case.tokenizer, tasks, **how)[case.name], case)
        case "oracle":
            assert case.oracle is not None
            return _of_adapter(case.hub[case.oracle], case)
        case "ensemble":
            return _ensemble(method, case)
    if method.said.get("fit") == "pool":
        return _fitted(method, case)
    arguments = {**method.arguments(case.limits, seed=case.seed), "allow_licenses": case.allow_licenses}
    return _composed(_source(method, case.hub), arguments, case)


def _source(method: Method, hub: Hub) -> Hub | ExpertPool:
    return hub.pool(method.said["adapters"]) if "adapters" in method.said else hub


def _pool(method: Method, case: Case) -> ExpertPool:
    """Return the adapters that the method names, or else the k that retrieval finds, as experts of the model."""
    # the base model alone has no options: only the number of adapters is checked
    call = ComposeCall(_source(method, case.hub), case.task, {"method": "base", "k": method.said.get("k", case.limits["k"])})
    return call.engine(case.model, case.tokenizer).bound_pool


def _composed(source: Hub | ExpertPool, arguments: Mapping[str, Any], case: Case) -> Composition:
    return ComposeCall(source, case.task, arguments)(case.model, case.tokenizer, progress=False)


def _of(what: Any, name: str, case: Case, pool: ExpertPool | None = None) -> Composition:
    return Composition.of(case.model, case.tokenizer, case.task, what, pool=pool, name=name, seed=case.seed)


def _of_adapter(adapter: Adapter, case: Case) -> Composition:
    return _of(adapter, adapter.name, case)


def _of_formula(formula: Formula, case: Case) -> Composition:
    if formula.is_auto:
        return _composed(case.hub, {**case.limits, "seed": case.seed}, case)
    name = str(formula)
    if formula.expand(case.hub).is_base:
        return _of(None, name, case)
    if (stored := formula.stored(case.hub)) is not None:
        with stored.unpacked() as folder:
            return replace(Composition.from_pretrained(folder, case.model, case.tokenizer), task=case.task)
    if not isinstance(formula.root, Sum):
        return _of(formula.mixture(case.hub), name, case, formula.pool(case.hub))
    merged = formula.merge(case.hub, heads="error", progress=False, allow_licenses=case.allow_licenses)
    return _of(merged, name, case)


def _merged(method: Method, case: Case) -> Adapter:
    pool, options = _pool(method, case), dict(method.options)
    if _takes(method.method, "statistics"):
        rows = [{"prompt": case.task.prompt(text), "completion": target} for text, target in case.task.examples]
        collect = partial(_collector(), case.model, case.tokenizer, texts=rows, seed=case.seed, progress=False)
        options["statistics"] = [collect(adapter) for adapter in pool.adapters.values()]
    return merge(
        list(pool.adapters.values()),
        _weights(method, list(pool.names)),
        method=method.method,
        seed=case.seed,
        progress=False,
        allow_licenses=case.allow_licenses,
        **options,
    )


def _collector() -> Callable[..., Any]:
    """Return `collect_statistics` of an installed extension with a file `collecting`. Raises PackageMissing without one."""
    modules = brought("collecting")
    if not modules:
        raise PackageMissing("no extension that is installed collects statistics; loraweave comes with one, `statistics`")
    collect: Callable[..., Any] = import_module(min(modules.values())).collect_statistics
    return collect


def _weights(method: Method, experts: Sequence[str]) -> list[float] | None:
    """Return a weight for each adapter, from the number, list or mapping `weights` of the method; None for equal shares."""
    match weights := method.said.get("weights"):
        case None:
            return None
        case Mapping():
            kinds = dict.fromkeys(experts, Any)
            check_options(f"weights of method {method.name!r}: they", weights, kinds, noun="adapter")
            return [float(weights.get(name, 0.0)) for name in experts]
        case _ if is_number(weights):
            return [float(weights)] * len(experts)
        case _ if is_list(weights) and len(weights) == len(experts):
            return list(weights)
    raise WeightingError(
        f"weights of method {method.name!r} are {weights!r:.60}, for {len(experts)} adapters: {', '.join(experts)}"
    )


def _ensemble(method: Method, case: Case) -> Composition:
    if method.members:
        members = {member.name: made(member, case) for member in method.members}
    else:
        members = {name: _of_adapter(adapter, case) for name, adapter in _pool(method, case).adapters.items()}
    return _of(members, " and ".join(members), case)


def _fitted(method: Method, case: Case) -> Composition:
    """Return the composition of a router trained on its pool's training rows; each pool and seed is trained once."""
    pool = _pool(method, case)
    key = (str(method.identity()), case.seed, tuple(pool.names))
    if key not in case.fitted:
        options = {name: value for name, value in method.options.items() if name not in TRAINING}
        # the router's first values are random
        new: Any = with_seed(case.seed, lambda: router(method.method, pool, **options))
        training: dict[str, Any] = {name: method.options[name] for name in TRAINING if name in method.options}
        if isinstance(new, LearnedRouter):
            training = {"steps": FIT_STEPS, **training, "seed": case.seed, "progress": False}
        rows = {name: case.rows_of(name) for name in pool.names}
        case.fitted[key] = new.fit(Composer(case.model, pool, tokenizer=case.tokenizer), rows, **training)
    return _of(case.fitted[key], method.method, case, pool)
