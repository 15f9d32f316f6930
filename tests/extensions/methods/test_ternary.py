"""ComPEFT against the definition written out, and what comes back from a hub."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from installed import needs_entry
from tiny_models import random_factors

from loraweave.errors import AdapterUnsupported, WeightingError
from loraweave.extensions.methods import compeft
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.types import Factors

factors = partial(random_factors, rank=4, num_out=9, num_in=11)


def adapter(**layers):
    layers = layers or {"x": factors(0), "y": factors(1, rank=2)}
    return Adapter("one", "base", layers, card={"tags": ["t"], "report": {}})


def tensors(one):
    return [tensor for layer in sorted(one.layers) for tensor in (one.layers[layer].a_RI, one.layers[layer].b_OR)]


def flat(one):
    return np.concatenate([tensor.double().numpy().ravel() for tensor in tensors(one)])


def by_definition(tau, density, alpha):
    """sort all magnitudes, keep the first floor(density n), replace them by alpha * std(tau) * sign."""
    kept = sorted(range(len(tau)), key=lambda place: (-abs(tau[place]), place))[: math.floor(density * len(tau) + 1e-9)]
    result = np.zeros_like(tau)
    result[kept] = alpha * tau.std() * np.sign(tau[kept])
    return result


@pytest.mark.parametrize(("density", "alpha"), [(0.05, 1.0), (0.2, 1.0), (0.29, 4.0), (1.0, 0.5)])
def test_compeft_over_the_adapter_is_the_paper_s_definition(density, alpha):
    given = adapter()
    found = compeft(given, density=density, scale=alpha)
    assert np.allclose(flat(found), by_definition(flat(given), density, alpha), rtol=1e-6, atol=0)
    assert np.count_nonzero(flat(found)) == math.floor(density * len(flat(given)) + 1e-9)
    assert len(np.unique(np.abs(flat(found)[flat(found) != 0]))) == 1


def test_compeft_by_tensor_is_the_definition_for_each():
    given = adapter()
    found = compeft(given, density=0.3, per="tensor")
    for one, two in zip(tensors(found), tensors(given), strict=True):
        expected = by_definition(two.double().numpy().ravel(), 0.3, 1.0)
        assert np.allclose(one.double().numpy().ravel(), expected, rtol=1e-6, atol=0)


def test_a_density_counts_as_the_decimal_number_that_was_written():
    given = adapter(x=Factors(torch.randn(1, 50), torch.randn(50, 1)))
    assert np.count_nonzero(flat(compeft(given, density=0.29))) == 29


def test_least_squares_gives_the_scale_with_the_least_error():
    given = adapter()
    tau, best = flat(given), flat(compeft(given, scale="least_squares"))
    c = np.abs(best).max()
    assert c == pytest.approx(np.abs(tau[best != 0]).mean(), rel=1e-6)
    for other in (0.9, 1.1):
        assert np.linalg.norm(tau - best) < np.linalg.norm(tau - other * best)
    error = compeft(given, scale="least_squares").card["compression"]["relative_error"]
    assert error == pytest.approx(np.linalg.norm(tau - best) / np.linalg.norm(tau), rel=1e-6)


def test_ternary_input_comes_back_when_the_scale_is_its_own():
    given = adapter(x=Factors(factors(0).a_RI.sign() * 0.25, factors(0).b_OR.sign() * 0.25))
    found = compeft(given, density=1.0, scale="least_squares")
    assert found.hash == given.hash


def test_equal_magnitudes_are_cut_to_the_number_and_zeros_never_kept():
    given = adapter(x=Factors(torch.ones(2, 10), torch.cat([torch.ones(5, 2), torch.zeros(5, 2)])))
    found = compeft(given, density=0.6, scale="least_squares")
    assert flat(found)[:24].all()
    assert not flat(found)[24:].any()
    assert np.count_nonzero(flat(compeft(given, density=1.0))) == 30


def test_what_is_no_factor_stays_and_so_does_the_adapter_given():
    given = Adapter("one", "base", {"x": factors(0, bias_O=torch.ones(9), gain_O=torch.ones(9))}, heads={"h": torch.ones(2)})
    before = given.hash, flat(given)
    found = compeft(given)
    assert torch.equal(found.layers["x"].bias_O, torch.ones(9))
    assert torch.equal(found.layers["x"].gain_O, torch.ones(9))
    assert torch.equal(found.heads["h"], torch.ones(2))
    assert np.array_equal(flat(given), before[1])
    assert Adapter("one", "base", given.layers, heads=given.heads).hash == before[0]


def test_the_card_names_parent_options_and_error_and_drops_the_parent_s_report():
    given = adapter()
    card = compeft(given, density=0.5).card
    assert card["recipe"]["method"] == "compeft"
    assert card["recipe"]["options"] == {"density": 0.5, "scale": 1.0, "per": "adapter"}
    assert card["recipe"]["parents"] == [{"hash": given.hash, "name": "one"}]
    assert 0.0 < card["compression"]["relative_error"] < 1.0
    assert card["tags"] == ["t"]
    assert "report" not in card


def test_an_adapter_that_would_be_left_without_effect_is_refused():
    given = adapter(x=Factors(torch.randn(4, 50), 1e-4 * torch.randn(50, 4)))
    with pytest.raises(AdapterUnsupported, match="per='tensor'"):
        compeft(given, density=0.2)
    assert compeft(given, density=0.2, per="tensor").layers["x"].b_OR.any()


def test_a_standard_deviation_of_zero_is_refused():
    with pytest.raises(AdapterUnsupported, match="scale='least_squares'"):
        compeft(adapter(x=Factors(torch.ones(1, 3), torch.ones(2, 1))))


@needs_entry("packings", "compeft")
@pytest.mark.parametrize("per", ["adapter", "tensor"])
def test_a_hub_stores_it_in_few_bits_and_gives_it_back_bit_for_bit(tmp_path, per):
    big = adapter(**{f"layer {n}": factors(n, rank=8, num_out=96, num_in=160) for n in range(6)})
    found = compeft(big, density=0.2, per=per)
    with Hub(tmp_path / "hub") as hub:
        plain_bytes = hub.add(big, name="whole").size_bytes
        record = hub.add(found, stored_as="compeft")
        assert record.hash == found.hash
        assert record.size_bytes < plain_bytes / 12
        assert hub["one"].hash == found.hash
        assert hub.verify().ok


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: compeft(adapter(), density=0.0), "density=0.0"),
        (lambda: compeft(adapter(), density=1.1), "density=1.1"),
        (lambda: compeft(adapter(), density=math.nan), "density=nan"),
        (lambda: compeft(adapter(), scale=0), "scale=0"),
        (lambda: compeft(adapter(), scale="best"), "scale='best'"),
        (lambda: compeft(adapter(), per="layer"), "per='layer'"),
    ],
)
def test_numbers_out_of_range_are_refused(call, word):
    with pytest.raises(WeightingError, match=word):
        call()
