"""What looks wrong about an adapter is found, told, and dealt with as the policy says."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from loraweave.errors import AdapterNotFound, AdapterQuarantined, AdapterSuspicious, AdapterUnsupported
from loraweave.extensions.trust.examiners.anomalies import MIN_REFERENCE, against_model, against_pool
from loraweave.extensions.trust.figures import Figures
from loraweave.extensions.upkeep import rebuild
from loraweave.hub.adapter import Adapter
from loraweave.hub.adding import checked_policy
from loraweave.hub.hub import Hub
from loraweave.hub.search.search import SearchIndex
from loraweave.types import Factors

NAMES = [f"layers.{number}.q" for number in range(6)]


def adapter(seed, *, size=1.0, base="org/base", hit=(), strength=0.0):
    """Rank 4 with spectra as trained adapters have them; layers in `hit` get a direction of their own."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in NAMES:
        scale_R = torch.tensor([1.0, 0.4, 0.2, 0.1]) * size * float(1 + 0.2 * torch.rand(1, generator=generator))
        a_RI, b_OR = torch.randn(4, 40, generator=generator), torch.randn(30, 4, generator=generator) * scale_R
        if name in hit:
            left_O1, right_1I = torch.randn(30, 1, generator=generator), torch.randn(1, 40, generator=generator)
            a_RI, b_OR = torch.cat([a_RI, right_1I]), torch.cat([b_OR, strength * size * left_O1], dim=1)
        layers[name] = Factors(a_RI, b_OR)
    return Adapter(f"a{seed}", base, layers)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with Hub(folder / "hub") as hub:
        for seed in range(16):
            hub.add(adapter(seed))
    return folder / "hub"


@pytest.fixture
def hub(filled, tmp_path):
    shutil.copytree(filled, tmp_path / "hub")
    with Hub(tmp_path / "hub") as opened:
        yield opened


def kinds(record):
    return [anomaly.kind for anomaly in record.anomalies]


def test_ordinary_adapters_have_no_anomalies(hub):
    assert [kinds(record) for record in hub] == [[]] * 16


def test_an_update_much_larger_than_the_others_is_reported_with_its_factor(hub):
    record = hub.add(adapter(20, size=30.0))
    assert kinds(record) == ["norm"]
    [anomaly] = record.anomalies
    assert "times as large as the median of 16 adapters" in anomaly.detail
    assert anomaly.score > 3.5
    assert hub.record("a20") == record


def test_one_layer_much_larger_than_the_rest_is_named(hub):
    record = hub.add(adapter(20, hit=[NAMES[2]], strength=25.0))
    assert "layer_norm" in kinds(record)
    assert NAMES[2] in next(anomaly.detail for anomaly in record.anomalies if anomaly.kind == "layer_norm")


def test_a_direction_planted_everywhere_shows_in_the_spectrum(hub):
    record = hub.add(adapter(20, hit=NAMES, strength=1.0))
    assert "spectrum" in kinds(record) or "layer_spectra" in kinds(record)


@pytest.mark.parametrize("policy", ["report", {"duplicate": "report"}])
def test_nearly_the_same_update_is_a_duplicate_however_it_is_factored_and_scaled(hub, policy):
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for name, own in adapter(5).layers.items():
        noise = 0.02 * own.b_OR.norm() / own.b_OR.numel() ** 0.5 * torch.randn(own.b_OR.shape, generator=generator)
        layers[name] = Factors(1.1 * own.a_RI.flip(0), (own.b_OR + noise).flip(1))
    record = hub.add(Adapter("copy", "org/base", layers), anomalies=policy)
    [anomaly] = record.anomalies
    assert (anomaly.kind, anomaly.score > 0.99) == ("duplicate", True)
    assert "'a5'" in anomaly.detail


def test_the_same_content_under_another_name_is_a_duplicate(hub):
    record = hub.add(adapter(5), name="again")
    assert [(anomaly.kind, anomaly.detail) for anomaly in record.anomalies] == [("duplicate", "it has the content of 'a5'")]


def test_a_different_adapter_of_another_base_is_compared_with_none(hub):
    assert kinds(hub.add(adapter(20, size=30.0, base="org/other"))) == []
    assert kinds(hub.add(adapter(5, base="org/third"), name="same numbers")) == []


def test_layers_that_some_of_the_pool_leave_alone_are_measured_by_the_rest():
    rng = np.random.default_rng(0)
    norm_NL, dominance_NL = rng.standard_normal((2, 20, 5))
    norm_NL[::3, 1], dominance_NL[::3, 1], norm_NL[:, 4], dominance_NL[:, 4] = np.nan, np.nan, np.nan, np.nan
    own_L = np.array([9.0, 9.0, 9.0, 9.0, np.nan])
    figures = Figures("kin", tuple("abcde"), own_L, dominance_NL[1], b"")
    [found] = against_pool(figures, list(zip(norm_NL, dominance_NL, strict=True)))
    means_N = np.nanmean(norm_NL, axis=1)
    spread = 1.4826 * np.nanmedian(np.abs(means_N - np.nanmedian(means_N)))
    assert (found.kind, found.score) == ("norm", pytest.approx((9.0 - np.nanmedian(means_N)) / spread, abs=0.01))


def test_too_few_others_say_nothing(tmp_path):
    with Hub(tmp_path / "small") as hub:
        for seed in range(MIN_REFERENCE - 1):
            hub.add(adapter(seed))
        assert kinds(hub.add(adapter(20, size=1e6))) == []


def test_what_was_found_is_the_same_in_whatever_order_the_pool_was_filled(tmp_path):
    found = []
    for order in (range(14), reversed(range(14))):
        with Hub(tmp_path / f"{len(found)}") as hub:
            for seed in order:
                hub.add(adapter(seed), anomalies={"duplicate": "off"})
            found.append(hub.add(adapter(20, size=30.0)).anomalies)
    assert found[0] == found[1] != ()


def test_refusing_leaves_the_hub_as_it_was(hub):
    generation = hub.generation
    with pytest.raises(AdapterSuspicious, match=r"norm: its updates are .* times as large"):
        hub.add(adapter(20, size=30.0), anomalies="refuse")
    assert ("a20" in hub, hub.generation) == (False, generation)


def test_an_adapter_in_quarantine_is_stored_and_found_by_nothing(hub, caplog):
    with caplog.at_level(logging.INFO, logger="loraweave"):
        record = hub.add(adapter(20, size=30.0), description="the odd one", anomalies="quarantine")
    assert (record.quarantined, "a20" in hub, len(hub)) == (True, True, 16)
    assert [one.name for one in hub] == [f"a{seed}" for seed in range(16)]
    assert "a20" not in hub.pool().names
    assert [one.name for one in hub.similar("a3", k=99)].count("a20") == 0
    assert hub.records(quarantined=True) == [record]
    assert "a20" in caplog.text
    with pytest.raises(AdapterQuarantined, match=r"times as large .*hub\.release\('a20'\)"):
        hub["a20"]
    with pytest.raises(AdapterQuarantined):
        hub.pool(["a20"])
    assert hub.get("a20", quarantined=True).hash == adapter(20, size=30.0).hash


class Words:
    """One text, one place."""

    dim = 2
    id = "words"

    def embed(self, texts):
        return np.array([[1.0, 0.0] if "odd" in text else [0.0, 1.0] for text in texts], np.float32)


def test_a_search_finds_it_only_after_its_release(hub):
    index = SearchIndex(hub, embedder=Words(), index="flat")
    query = Words().embed(["odd"])
    hub.add(adapter(20, size=30.0), description="the odd one", anomalies="quarantine")
    assert "a20" not in [hit.record.name for hit in index.hits(query, 99)[0]]
    hub.release("a20")
    assert index.hits(query, 1)[0][0].record.name == "a20"
    hub.quarantine("a20")
    assert "a20" not in [hit.record.name for hit in index.hits(query, 99)[0]]


def test_a_release_keeps_what_was_found(hub):
    found = hub.add(adapter(20, size=30.0), anomalies="quarantine").anomalies
    record = hub.release("a20")
    assert (record.quarantined, record.anomalies, len(hub)) == (False, found, 17)
    assert hub["a20"].hash == record.hash


def test_putting_aside_by_hand_needs_no_anomaly(hub):
    hub.quarantine("a3")
    with pytest.raises(AdapterQuarantined, match="by hand"):
        hub["a3"]
    assert hub.quarantine("a3").quarantined
    hub.rename("a3", "b3")
    assert len(hub) == 15
    hub.remove("b3")
    assert (len(hub), hub.records(quarantined=True)) == (15, [])
    with pytest.raises(AdapterNotFound):
        hub.quarantine("b3")
    with pytest.raises(AdapterNotFound):
        hub.release("b3")


def test_what_is_in_quarantine_is_no_measure_for_others(hub):
    for seed in range(20, 40):
        hub.add(adapter(seed, size=30.0), anomalies="quarantine")
    assert kinds(hub.add(adapter(50, size=30.0))) == ["norm"]


def test_a_next_version_is_looked_at_and_a_rollback_leaves_quarantine(hub):
    record = hub.add(adapter(20, size=30.0), name="a3", replace=True, anomalies="quarantine")
    assert (record.version, record.quarantined, len(hub)) == (2, True, 15)
    assert hub.get("a3", version=1).hash == adapter(3).hash
    assert hub.rollback("a3", 1).quarantined is False
    assert (len(hub), hub["a3"].hash) == (16, adapter(3).hash)


def test_off_does_not_look(hub):
    record = hub.add(adapter(20, size=30.0), anomalies="off")
    assert (record.anomalies, record.quarantined) == ((), False)


def test_a_mapping_chooses_by_kind(hub):
    policy = {"norm": "refuse", "duplicate": "quarantine"}
    assert hub.add(adapter(5), name="again", anomalies=policy).quarantined
    with pytest.raises(AdapterSuspicious):
        hub.add(adapter(20, size=30.0), anomalies=policy)


@pytest.mark.parametrize("policy", ["ignore", {"norms": "refuse"}, {"norm": "maybe"}])
def test_an_unknown_policy_is_refused_with_the_known_ones(hub, policy):
    with pytest.raises(AdapterUnsupported, match="off, report, quarantine, refuse"):
        hub.add(adapter(20), anomalies=policy)
    with pytest.raises(AdapterUnsupported, match="layer_norm"):
        checked_policy(policy)


def test_content_that_is_there_already_is_not_looked_at_again(hub):
    hub.add(adapter(20, size=30.0))
    before = hub.record("a20")
    assert hub.add(adapter(20, size=30.0), anomalies="refuse") == before


def test_an_update_larger_than_the_models_weight_is_reported(hub):
    model = nn.Module()
    model.layers = nn.ModuleList()
    for _ in NAMES:
        block = nn.Module()
        block.q = nn.Linear(40, 30, bias=False)
        nn.init.constant_(block.q.weight, 0.1)
        model.layers.append(block)
    sizes = {name: float((f.b_OR @ f.a_RI).norm() / (0.1 * 1200**0.5)) for name, f in adapter(20).layers.items()}
    [anomaly] = against_model(adapter(20), model)
    assert anomaly.score == pytest.approx(max(sizes.values()), abs=0.01)
    assert max(sizes, key=sizes.get) in anomaly.detail
    assert kinds(hub.add(adapter(20), model=model)) == ["base_norm"]
    assert against_model(adapter(20, size=1e-3), model) == []


def test_verify_finds_a_mark_that_is_not_the_records(hub):
    hub.quarantine("a3")
    assert hub.verify().ok
    with hub._catalogue.writing("a test") as connection:
        connection.execute("DELETE FROM quarantine")
    assert [problem for problem in hub.verify().problems if "quarantine" in problem]


def test_a_rebuilt_catalogue_keeps_the_quarantine(hub):
    hub.add(adapter(20, size=30.0), anomalies="quarantine")
    folder = hub.path
    hub.close()
    rebuild(folder)
    with Hub(folder) as again:
        assert [record.name for record in again.records(quarantined=True)] == ["a20"]
        assert (len(again), again.verify().ok) == (16, True)


@pytest.mark.parametrize("column", ["numbers", "code"])
def test_damaged_figures_hinder_nothing(hub, column):
    with hub._catalogue.writing("a test") as connection:
        connection.execute(f"UPDATE figures SET {column} = ?", (b"\x01",))
    assert hub.add(adapter(20)).name == "a20"
