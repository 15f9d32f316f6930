"""Kernels of per-row mixtures of whole experts against the formula written out row by row."""

import pytest
import torch

from loraweave.composer.live.kernels._parts import SomeRows
from loraweave.composer.live.pages import PlacedFactors
from loraweave.extensions.accelerators.kernels.gathered import Gathered
from loraweave.extensions.accelerators.kernels.segments import Segments

RANKS = (2, 1, 4)
# rows of one, two and all experts; the first and the third have the same mixture
ROWS = (((0, 0.5),), ((1, 1.0), (2, -1.5)), ((0, 0.5),), ((0, 2.0), (1, 0.3), (2, 1.0)))


def experts(i=7, o=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return [PlacedFactors(random(rank, i), random(rank, o)) for rank in RANKS]


def expected(x, parts, rows, copies=1):
    found = []
    for number, x_TI in enumerate(x):
        dense_IO = torch.zeros(x.shape[2], parts[0].b_RO.shape[1], dtype=x.dtype)
        for p, weight in rows[number // copies]:
            for a_I, b_O in zip(parts[p].a_RI, parts[p].b_RO, strict=True):
                dense_IO += weight * torch.outer(a_I, b_O)
        found.append(x_TI @ dense_IO)
    return torch.stack(found)


KERNELS = {"gathered": Gathered.of, "segments": Segments.of}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [1, 3, 0])
@pytest.mark.parametrize("copies", [1, 2])
def test_rows_get_their_own_sums_for_as_many_rows_on_end_as_the_batch_is_larger(name, tokens, copies):
    parts = experts()
    kernel = KERNELS[name](parts, ROWS, torch.float64)
    x = torch.randn(4 * copies, tokens, 7, dtype=torch.float64)
    y = torch.randn(4 * copies, tokens, 5, dtype=torch.float64)
    updates = expected(x, parts, ROWS, copies)
    assert torch.allclose(kernel.update(x), updates, rtol=1e-12, atol=1e-12)
    sums = y + updates
    kernel.add_(x, y)
    assert torch.allclose(y, sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("place", [slice(1, 5), torch.tensor([0, 2, 3, 5])], ids=["on end", "scattered"])
def test_rows_of_the_base_alone_take_no_part(name, place):
    parts = experts()
    kernel = SomeRows(KERNELS[name](parts, ROWS, torch.float64), 6, place)
    numbers = torch.arange(6)[place].tolist()
    rows = tuple(ROWS[numbers.index(number)] if number in numbers else () for number in range(6))
    # NaN would spread from any row that took part in a product
    x = torch.randn(12, 3, 7, dtype=torch.float64)
    for number in set(range(6)) - set(numbers):
        x[2 * number : 2 * number + 2] = torch.nan
    y = torch.randn(12, 3, 5, dtype=torch.float64)
    updates = expected(x.nan_to_num(), parts, rows, copies=2)
    assert torch.allclose(kernel.update(x), updates, rtol=1e-12, atol=1e-12)
    sums = y + updates
    kernel.add_(x, y)
    assert torch.allclose(y, sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_the_gradient_of_the_input_is_that_of_the_formula(name):
    parts = experts()
    kernel = SomeRows(KERNELS[name](parts, ROWS, torch.float64), 5, slice(1, 5))
    gradients = []
    for function in (kernel.update, lambda x: expected(x, parts, ((), *ROWS))):
        x = torch.linspace(-1, 1, 5 * 2 * 7, dtype=torch.float64).view(5, 2, 7).requires_grad_()
        function(x).sin().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_a_row_depends_on_no_other_by_a_bit_where_ranks_are_equal():
    parts = [part for part in experts(dtype=torch.float32) if part.a_RI.shape[0] == 4] * 3
    x = torch.randn(3, 5, 7)
    together = Gathered.of(parts, (((0, 0.5),), ((1, 2.0),), ((2, -1.0),)), torch.float32).update(x)
    alone = Gathered.of(parts, (((1, 2.0),),), torch.float32).update(x[1:2])
    assert torch.equal(together[1:2], alone)


def test_padding_to_the_largest_rank_adds_nothing_even_after_an_overflow():
    parts = [PlacedFactors(torch.full((2, 2), 6e4, dtype=torch.float16), torch.ones(2, 1, dtype=torch.float16))]
    parts.append(PlacedFactors(torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 1, dtype=torch.float16)))
    kernel = Gathered.of(parts, (((0, 1.0),), ((1, 1.0),)), torch.float16)
    assert kernel.update(torch.full((2, 1, 2), 2.0, dtype=torch.float16))[1].item() == 4.0


@pytest.mark.parametrize("name", KERNELS)
def test_factors_of_a_shorter_dtype_are_widened_and_not_rounded_again(name):
    parts = [PlacedFactors(part.a_RI.bfloat16(), part.b_RO.bfloat16()) for part in experts()]
    exact = [PlacedFactors(part.a_RI.double(), part.b_RO.double()) for part in parts]
    x = torch.randn(4, 3, 7)
    found = KERNELS[name](parts, ROWS, torch.float32).update(x)
    assert torch.allclose(found.double(), expected(x.double(), exact, ROWS), rtol=1e-5, atol=1e-5)
