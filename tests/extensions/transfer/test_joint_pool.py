"""Pools in shared bases: what is kept is what is computed, live and as plain adapters, and nothing damaged is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Make
from torch import nn

from loraweave import parse
from loraweave.composer.composer import Composer
from loraweave.errors import (
    AdapterCorrupt,
    AdapterUnsupported,
    AlreadyActive,
    BaseModelMismatch,
    CompositionError,
    LayerMismatch,
    ScopeError,
    UnknownExpert,
    WeightingError,
)
from loraweave.extensions.transfer import JointPool
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.types import Factors, Fingerprint

IDS = torch.arange(3, 24).view(3, 7)


@pytest.fixture
def adapters(tiny_llama: nn.Module, make_adapter: Make) -> list[Adapter]:
    return [make_adapter(tiny_llama, name, targets=("q_proj", "down_proj"), seed=seed) for seed, name in enumerate("abcde")]


@pytest.fixture
def pool(adapters: list[Adapter]) -> JointPool:
    return JointPool.fit(adapters, rank=3, clusters=2, progress=False)


def difference(own: Adapter, other: Adapter) -> float:
    size = sum(float(own.delta(layer).double().norm()) ** 2 for layer in own.layers)
    apart = sum(float((own.delta(layer) - other.delta(layer)).double().norm()) ** 2 for layer in own.layers)
    return (apart / size) ** 0.5


@pytest.mark.parametrize("middle", ["full", "diagonal"])
def test_each_adapters_error_is_that_of_the_adapter_that_comes_back(middle: str, adapters: list[Adapter]) -> None:
    pool = JointPool.fit(adapters, rank=3, middle=middle, progress=False)  # type: ignore[arg-type]
    assert pool.names == tuple("abcde")
    for adapter in adapters:
        assert pool.errors[adapter.name] == pytest.approx(difference(adapter, pool.adapter(adapter.name)), rel=1e-3)
    assert pool.report.largest_error == max(pool.errors.values())


def test_likes_are_clustered_and_then_exact(adapters: list[Adapter]) -> None:
    generator = torch.Generator().manual_seed(0)
    copies = {
        f"{one.name}{number}": replace(
            one,
            layers={
                layer: Factors(each.a_RI + 1e-3 * torch.randn(each.a_RI.shape, generator=generator), each.b_OR)
                for layer, each in one.layers.items()
            },
        )
        for number in range(4)
        for one in adapters[:3]
    }
    pool = JointPool.fit(copies, rank=adapters[0].rank, clusters=3, progress=False)
    cluster_of = {name: pool.members[name].cluster for name in pool.names}
    assert len(set(cluster_of.values())) == 3
    assert all(cluster_of[name] == cluster_of[f"{name[0]}0"] for name in cluster_of)
    assert pool.report.largest_error < 0.01


@pytest.mark.parametrize("middle", ["full", "diagonal"])
@torch.no_grad()
def test_live_is_the_composer_on_the_adapters_that_come_back(
    middle: str, tiny_llama: nn.Module, adapters: list[Adapter]
) -> None:
    pool = JointPool.fit(adapters, rank=3, clusters=2, middle=middle, progress=False)  # type: ignore[arg-type]
    rows = [{"a": 0.7, "b": -0.4, "e": 1.0}, None, {"c": 1.3}]
    base = tiny_llama(IDS).logits
    for mixture in (rows, {"a": 1.0, "d": 0.5}):
        with Composer(tiny_llama, pool.pool()).activate(mixture):
            expected = tiny_llama(IDS).logits
        with pool.activate(tiny_llama, mixture):  # type: ignore[arg-type]
            found = tiny_llama(IDS).logits
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    with pool.activate(tiny_llama, rows):  # type: ignore[arg-type]
        # two beams of each row
        twice = tiny_llama(IDS.repeat_interleave(2, dim=0)).logits[::2]
        alone = tiny_llama(IDS).logits
        with pytest.raises(ScopeError, match="3 rows"):
            tiny_llama(IDS[:2])
    assert torch.allclose(twice, alone, atol=1e-5)
    assert torch.equal(alone[1], base[1])
    assert torch.equal(tiny_llama(IDS).logits, base)


def test_a_pool_grows_without_a_change_to_what_is_there(pool: JointPool, adapters: list[Adapter]) -> None:
    again = replace(pool.adapter("a"), name="again")
    grown = pool.including(again)
    assert grown.errors["again"] == pytest.approx(0, abs=1e-4)
    assert grown.clusters is pool.clusters
    assert all(grown.members[name] is member for name, member in pool.members.items())
    with pytest.raises(WeightingError, match="'a' already"):
        pool.including(adapters[0])
    turned = {layer: Factors(part.a_RI.flip(1), part.b_OR.flip(0)) for layer, part in adapters[0].layers.items()}
    strange = replace(adapters[0], name="f", layers=turned)
    with pytest.raises(WeightingError, match=r"error of 0\.\d+, above 0.1"):
        pool.including(strange, max_error=0.1)
    known, strange = (
        replace(pool, fingerprint=Fingerprint("one")),
        replace(adapters[0], name="g", fingerprint=Fingerprint("two")),
    )
    with pytest.raises(BaseModelMismatch):
        known.including(strange)


def test_few_adapters_are_said_not_to_pay(adapters: list[Adapter], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pool = JointPool.fit(adapters, rank=2, progress=False)
    assert "does not pay" in caplog.text
    assert not pool.report.pays
    kept = sum(2 * (part.b_OR.shape[0] + part.a_RI.shape[1]) for part in adapters[0].layers.values())
    kept += len(adapters) * len(adapters[0].layers) * 4
    assert pool.report.share == pytest.approx(kept / sum(each.num_values for each in adapters))


def test_saved_and_kept_by_a_hub_it_is_the_same_to_the_bit(pool: JointPool, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    hub.save_composition("shared", pool)
    grown = pool.including(replace(pool.adapter("a"), name="again"))
    blobs = {path.name for path in (tmp_path / "hub").rglob("*.safetensors")}
    stored = hub.save_composition("shared", grown, replace=True)
    with stored.unpacked() as folder:
        found = JointPool.from_pretrained(folder)
    assert found.names == grown.names
    assert found.errors == grown.errors
    for name in grown.names:
        assert found.adapter(name).hash == grown.adapter(name).hash
    # the bases were there
    assert len(list((tmp_path / "hub").rglob("*.safetensors"))) == len(blobs) + 2


def _cut(folder: Path) -> None:
    (folder / "bases.safetensors").write_bytes((folder / "bases.safetensors").read_bytes()[:-8])


def _without_a_middle(folder: Path) -> None:
    tensors = load_file(folder / "middles.safetensors")
    tensors.pop("0.0")
    save_file(tensors, folder / "middles.safetensors")


def _another_shape(folder: Path) -> None:
    tensors = load_file(folder / "middles.safetensors")
    tensors["0.0"] = torch.zeros(1, 1)
    save_file(tensors, folder / "middles.safetensors")


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "middles.safetensors")
    tensors["0.0"][0] = torch.nan
    save_file(tensors, folder / "middles.safetensors")


def _said(**changes: object) -> object:
    def change(folder: Path) -> None:
        said = json.loads((folder / "joint.json").read_text())
        (folder / "joint.json").write_text(json.dumps({**said, **changes}))

    return change


DAMAGES = {
    "cut": _cut,
    "a middle is missing": _without_a_middle,
    "another shape": _another_shape,
    "not a number": _not_finite,
    "no members": _said(members=[]),
    "a cluster that is not there": _said(clusters=1),
    "another middle": _said(middle="none"),
    "no list": _said(layers=3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named(damage: str, pool: JointPool, tmp_path: Path) -> None:
    pool.save_pretrained(tmp_path / "p")
    DAMAGES[damage](tmp_path / "p")  # type: ignore[operator]
    with pytest.raises(AdapterCorrupt):
        JointPool.from_pretrained(tmp_path / "p")
    (tmp_path / "p" / "joint.json").write_text('{"format": 9}')
    with pytest.raises(CompositionError, match="format 9"):
        JointPool.from_pretrained(tmp_path / "p")


@pytest.fixture
def untouched(tiny_llama: nn.Module) -> Iterator[nn.Module]:
    yield tiny_llama
    assert not any(module._forward_hooks for module in tiny_llama.modules())


def test_what_does_not_fit_is_refused_and_nothing_is_left(
    pool: JointPool, adapters: list[Adapter], untouched: nn.Module, make_model: Make, make_adapter: Make
) -> None:
    with pytest.raises(UnknownExpert, match="'z'"), pool.activate(untouched, {"z": 1.0}):
        pass
    with pytest.raises(WeightingError, match="finite"), pool.activate(untouched, {"a": float("nan")}):
        pass
    with pytest.raises((LayerMismatch, BaseModelMismatch)), pool.activate(make_model("gpt2"), {"a": 1.0}):
        pass
    with (
        Composer(untouched, adapters).activate({"a": 1.0}),
        pytest.raises(AlreadyActive),
        pool.activate(untouched, {"a": 1.0}),
    ):
        pass
    with pool.activate(untouched, {"a": 1.0}), pytest.raises(AlreadyActive):
        Composer(untouched, adapters).activate({"a": 1.0})
    with pytest.raises(RuntimeError, match="mine"), pool.activate(untouched, {"a": 1.0}):
        raise RuntimeError("mine")
    for settings in ({"rank": 0}, {"clusters": 6}, {"clusters": 0}, {"middle": "none"}):
        with pytest.raises(WeightingError, match=next(iter(settings))):
            JointPool.fit(adapters, **settings)  # type: ignore[arg-type]
    with pytest.raises(AdapterUnsupported, match=r"'b'.*plain LoRA"):
        JointPool.fit([adapters[0], make_adapter(untouched, "b", targets=("q_proj", "down_proj"), bias=True)])
    with pytest.raises(AdapterUnsupported, match=r"'b'.*differ in layer.*down_proj"):
        JointPool.fit([adapters[0], make_adapter(untouched, "b", targets=("q_proj",))])
    wide = {layer: Factors(part.a_RI, part.b_OR.repeat(2, 1)) for layer, part in adapters[0].layers.items()}
    with pytest.raises(AdapterUnsupported, match=r"'wide'.*differ in layer"):
        pool.including(Adapter("wide", adapters[0].base_model, wide))


def test_a_stored_pool_in_shared_bases_is_no_adapter_of_a_formula(
    pool: JointPool, adapters: list[Adapter], tmp_path: Path
) -> None:
    with Hub(tmp_path / "hub") as hub:
        hub.add(adapters[0], name="a")
        hub.save_composition("users", pool)
        with pytest.raises(ScopeError, match="@users is a pool in shared bases"):
            parse("a + @users").merge(hub, progress=False)
