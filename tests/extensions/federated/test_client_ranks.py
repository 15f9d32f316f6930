"""The mean of clients at the rank of each, against a dense decomposition."""

from __future__ import annotations

import pytest
import torch
from tiny_models import dense, random_factors
from torch import Tensor

import loraweave as lw
from loraweave.extensions.federated import flexlora_clients

SHAPES = {"one": (5, 7), "two": (6, 4)}


def adapter(name: str, seed: int, rank: int, layers: tuple[str, ...] = ("one", "two")) -> lw.Adapter:
    draw = torch.Generator().manual_seed(seed)
    return lw.Adapter(name, "base", {layer: random_factors(draw, rank, *SHAPES[layer]) for layer in layers})


CLIENTS = [adapter("a", 1, 1), adapter("b", 2, 3), adapter("c", 3, 2, ("one",))]
SIZES = [2.0, 3.0, 5.0]


def decomposed(layer: str) -> tuple[Tensor, Tensor, Tensor]:
    mean = sum(w / 10 * dense(c.layers[layer]) for w, c in zip(SIZES, CLIENTS, strict=True) if layer in c.layers)
    return torch.linalg.svd(mean, full_matrices=False)


@pytest.mark.parametrize("ranks", [[1, 2, 3], [5, 2], [1]])
def test_each_client_gets_the_best_update_of_its_rank(ranks: list[int]) -> None:
    found = flexlora_clients(CLIENTS, SIZES, ranks)
    for client, rank in zip(found, ranks, strict=True):
        for layer in ("one", "two"):
            u, sigma, vh = decomposed(layer)
            factors = client.layers[layer]
            assert factors.rank <= rank
            assert torch.allclose(dense(factors), u[:, :rank] * sigma[:rank] @ vh[:rank], rtol=1e-5, atol=1e-5)
            # a zero singular value has no direction of its own
            norms_R = factors.a_RI.norm(dim=1)[: int((sigma[:rank] > 1e-6).sum())]
            assert torch.allclose(norms_R, torch.ones_like(norms_R), atol=1e-5)


def test_the_report_has_the_error_of_each_clients_cut() -> None:
    for client, rank in zip(flexlora_clients(CLIENTS, SIZES, [1, 2, 5]), [1, 2, 5], strict=True):
        for layer in ("one", "two"):
            _, sigma, _ = decomposed(layer)
            lost = float((sigma[rank:].square().sum() / sigma.square().sum()).sqrt())
            assert client.report[layer].relative_error == pytest.approx(lost, rel=1e-4, abs=1e-6)
            assert client.report[layer].rank_out == client.layers[layer].rank


def test_a_smaller_client_has_the_first_rows_of_a_larger_one() -> None:
    small, large = flexlora_clients(CLIENTS, SIZES, [1, 3])
    assert torch.equal(small.layers["one"].a_RI, large.layers["one"].a_RI[:1])


def test_clients_are_named_and_carry_the_recipe() -> None:
    found = flexlora_clients(CLIENTS, SIZES, [1, 3], names=["phone", "server"])
    assert [client.name for client in found] == ["phone", "server"]
    assert [client.card["recipe"]["rank"] for client in found] == [1, 3]
    assert [client.name for client in flexlora_clients(CLIENTS, SIZES, [1, 3])] == ["flexlora-r1", "flexlora-r3"]


@pytest.mark.parametrize(
    ("ranks", "options", "word"),
    [
        ([], {}, "none"),
        ([2, 0], {}, "rank 0 of client 2"),
        (["a", 1], {}, "rank 'a' of client 1 is not a whole number"),
        ([1, 2.5], {}, "rank 2.5 of client 2"),
        ([1, 9], {}, "rank=9"),
        ([1, 2], {"names": ["x"]}, "2 ranks and 1 names"),
    ],
)
def test_ranks_and_names_that_do_not_fit_are_refused(ranks: list[int], options: dict, word: str) -> None:
    with pytest.raises(lw.WeightingError, match=word):
        flexlora_clients(CLIENTS, SIZES, ranks, **options)
