"""MethodCall: options checked by the method's own signature, and what a method asks for beyond them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from tiny_models import random_factors

from loraweave.composer.merge.merge import merge
from loraweave.composer.merge.method_call import MethodCall, layer_seeds, surveys
from loraweave.errors import WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

seen: list[object] = []


def survey(layers: Iterable[Sequence[Factors | None]], weights: Sequence[float], *, density: float = 1.0) -> object:
    return [[None if f is None else f.rank for f in experts] for experts in layers], list(weights), density


@surveys(survey)
def spy(
    experts: Sequence[Factors],
    weights: Sequence[float],
    *,
    density: float = 1.0,
    seeds: Sequence[int],
    survey: object = None,
) -> Factors:
    seen.append((density, tuple(seeds), survey))
    return Factors(torch.ones(1, 7), torch.ones(5, 1))


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr("loraweave.registry.get", lambda folder, name: spy)
    seen.clear()
    return seen


def adapter(name: str, seed: int, layers: tuple[str, ...] = ("q", "v"), rank: int = 2) -> Adapter:
    return Adapter(name, "tiny", dict.fromkeys(layers, random_factors(seed, rank)))


def test_what_merge_supplies_is_no_option_of_the_user(spied: list[object]) -> None:
    assert MethodCall("spy").own_options == ["density"]
    with pytest.raises(WeightingError, match="'spy' has no option 'seeds'"):
        MethodCall("spy", {"seeds": [1]})
    with pytest.raises(WeightingError, match="did you mean 'density'"):
        MethodCall("spy", {"densty": 0.5})


def test_a_survey_sees_every_layer_once_and_reaches_every_call(spied: list[object]) -> None:
    merge([adapter("a", 0), adapter("b", 1, ("q",), 3)], [0.5, 2.0], method="spy", density=0.25)
    (first, second) = (entry[2] for entry in spied)  # type: ignore[index]
    assert first is second
    ranks, weights, density = first
    assert sorted(map(sorted, [[r or 0 for r in row] for row in ranks])) == [[0, 2], [2, 3]]
    assert sorted(weights) == [0.5, 2.0]
    assert density == 0.25


def test_seeds_follow_the_adapters_content_and_not_its_name_or_place(spied: list[object]) -> None:
    merge([adapter("a", 0), adapter("b", 1)], [1.0, 1.0], method="spy", seed=7)
    merge([adapter("other", 1), adapter("name", 0)], [1.0, 1.0], method="spy", seed=7)
    once = [set(entry[1]) for entry in spied]  # type: ignore[index]
    assert once[:2] == once[2:]
    assert len(once[0] | once[1]) == 4


def test_seeds_differ_by_layer_by_adapter_and_by_seed() -> None:
    drawn = {s for layer in ("q", "v") for seed in (0, 1) for s in layer_seeds(seed, ["h1", "h2"], layer)}
    assert len(drawn) == 8
    assert all(0 <= s < 2**63 for s in drawn)


def test_a_method_that_takes_a_survey_and_declares_none_is_refused() -> None:
    def blind(experts: Sequence[Factors], weights: Sequence[float], *, survey: object) -> Factors:
        return Factors(torch.ones(1, 7), torch.ones(5, 1))

    with pytest.raises(WeightingError, match="'blind' takes a survey, and nothing says how to make it"):
        merge([adapter("a", 0)], [0.5], method=blind)
