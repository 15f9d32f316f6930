"""Compiled rows against the formula in float64, with and without a compiler; nothing half-made is ever loaded."""

from __future__ import annotations

import logging
import platform
import shutil
from dataclasses import replace

import pytest
import torch
from rounding import rounding, unit
from torch.fx.experimental.proxy_tensor import make_fx

from loraweave.common import compute
from loraweave.composer.composer import Composer
from loraweave.composer.live.kernels._parts import Workload, choose
from loraweave.composer.live.kernels.dense import Dense, Stack
from loraweave.composer.live.pages import PlacedFactors
from loraweave.extensions.accelerators.kernels import native_rows
from loraweave.extensions.accelerators.kernels.native_rows import NativeRows, row_by_row
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
RANKS = (8, 3, 16, 1)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is compiled or loaded yet."""
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path))
    forget()
    yield tmp_path / "native"
    forget()


def forget():
    native_rows.library.cache_clear()


def mixtures(dtype, inputs, outputs, ranks=RANKS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        PlacedFactors(
            torch.randn(r, inputs, generator=generator).to(dtype), torch.randn(r, outputs, generator=generator).to(dtype)
        )
        for r in ranks
    ]
    # a row of several, one of one, one without any, and one that another has too
    rows = (((0, 0.5), (1, -2.0), (2, 0.25)), ((3, 1.0),), (), ((0, 0.5), (1, -2.0), (2, 0.25)))
    return parts, rows


def formula(parts, rows, x, y):
    """The sums in float64, and what they may be off in fp32: their terms are the inputs, the rank rows and y."""
    wanted, reach = y.double(), y.double().abs()
    for row, mixture in enumerate(rows):
        for place, weight in mixture:
            a, b = parts[place].a_RI.double(), parts[place].b_RO.double()
            wanted[row] += weight * (x[row].double() @ a.T) @ b
            reach[row] += abs(weight) * (x[row].double().abs() @ a.abs().T) @ b.abs()
    return wanted, rounding(x.shape[-1] + sum(RANKS) + 1, reach)


@needs_a_compiler
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("sizes", [(1, 1), (31, 33), (64, 100), (577, 193)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_formula_rounded_once(dtype, sizes, tokens):
    parts, rows = mixtures(dtype, *sizes)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(len(rows), tokens, size, generator=generator).to(dtype) for size in sizes)
    wanted, off = formula(parts, rows, x, y)
    found = y.clone()
    kernel = NativeRows.of(parts, rows, dtype)
    assert native_rows.function(dtype, dtype) is not None
    kernel.adder(dtype, x.shape)(x, found)
    # sums in fp32, and the result rounded once
    assert bool(((found.double() - wanted).abs() <= off + unit(dtype) * wanted.abs()).all())
    # the twin rounds the update, too
    twin = y.double() + kernel._formula(x).double()
    assert bool(((twin - wanted).abs() <= off + unit(dtype) * (wanted - y.double()).abs()).all())
    assert torch.equal(found[2], y[2])


@needs_a_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(dtype):
    parts, rows = mixtures(dtype, 65, 40)
    x, y = torch.randn(4, 1, 65).to(dtype), torch.randn(4, 1, 40).to(dtype)
    together = y.clone()
    NativeRows.of(parts, rows, dtype).adder(dtype, x.shape)(x, together)
    for row in range(4):
        alone = y[row : row + 1].clone()
        if rows[row]:
            NativeRows.of(parts, (rows[row],), dtype).adder(dtype, alone.shape)(x[row : row + 1], alone)
        assert torch.equal(alone[0], together[row])


@needs_a_compiler
@pytest.mark.parametrize(("stored", "scale"), [(torch.float16, 1.0), (torch.bfloat16, 1e-6)])
def test_factors_in_fp32_are_read_in_16_bits_where_these_hold_them_and_no_bit_changes(monkeypatch, stored, scale):
    if native_rows.function(torch.float32, stored) is None:
        pytest.skip(f"this processor does not read {stored}")
    parts, rows = mixtures(torch.float32, 80, 48)
    short = [PlacedFactors(*((scale * each).to(stored).float() for each in (part.a_RI, part.b_RO))) for part in parts]
    x, y = torch.randn(4, 2, 80), torch.randn(4, 2, 48)

    def added(parts, rows=rows):
        kernel, found = NativeRows.of(parts, rows, torch.float32), y[: len(rows)].clone()
        kernel.adder(torch.float32, x[: len(rows)].shape)(x[: len(rows)], found)
        wanted, off = formula(parts, rows, x, y[: len(rows)])
        assert bool(((found.double() - wanted).abs() <= off).all())
        return kernel.a_DI.dtype, kernel.b_DO.dtype, kernel.dtype, found

    *dtypes, found = added(short)
    assert dtypes == [stored, stored, torch.float32]
    # beside one that has more bits all are in fp32
    *dtypes, beside = added([*short[:3], parts[3]])
    assert dtypes == [torch.float32] * 3
    assert torch.equal(beside[::2], found[::2])
    assert added(short, rows[:1])[-1].equal(found[:1])
    monkeypatch.setattr(native_rows, "shorten", lambda *_: None)
    assert torch.equal(added(short)[-1], found)


@needs_a_compiler
@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (1 + 2.0**-10, torch.float16),
        (2.0**-24, torch.float16),
        (-65504.0, torch.float16),
        (2.0**-25, torch.bfloat16),
        (65536.0, torch.bfloat16),
        (1 + 2.0**-11, None),
        (1 + 2.0**-23, None),
        (float("nan"), None),
    ],
)
def test_numbers_are_shortened_only_where_all_stay_what_they_are(value, stored):
    numbers = torch.tensor([0.0, -0.0, 1.0, -3.0]).repeat(8, 4)
    numbers[5, 7] = value
    if stored is not None and native_rows.function(torch.float32, stored) is None:
        pytest.skip(f"this processor does not read {stored}")
    found = native_rows.shorten(torch.ones(1, 16), numbers)
    if stored is None:
        assert found is None
        return
    assert [each.dtype for each in found] == [stored, stored]
    assert torch.equal(found[1].float(), numbers)
    assert torch.equal(found[1].signbit(), numbers.signbit())
    assert native_rows.shorten(numbers[:, :15]) is None
    assert native_rows.shorten(numbers.double()) is None


@needs_a_compiler
def test_numbers_that_are_not_finite_and_half_way_are_rounded_as_torch_rounds_them():
    part = PlacedFactors(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16))
    values = [1.0, 2.0**-9, -(2.0**-8), 3 * 2.0**-9, float("inf"), float("-inf"), float("nan"), 3.3e38, 2.0**-130]
    for value in values:
        x = torch.tensor([[[value]]], dtype=torch.bfloat16)
        y = torch.ones(1, 1, 1, dtype=torch.bfloat16)
        wanted = (y.float() + x.float()).bfloat16()
        NativeRows.of([part], (((0, 1.0),),), torch.bfloat16).adder(torch.bfloat16, x.shape)(x, y)
        assert torch.equal(y, wanted) or bool(y.isnan() & wanted.isnan()), value


@needs_a_compiler
def test_it_is_compiled_once_with_a_line_in_the_log_and_nothing_unfinished_beside_it(fresh, caplog):
    with caplog.at_level(logging.INFO, logger=compute.__name__):
        assert native_rows.library() is not None
        forget()
        assert native_rows.library() is not None
    assert [record.message.split(" ")[0] for record in caplog.records] == ["compiling"]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@needs_a_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its processors have other names")
def test_an_older_processor_to_compile_for_can_be_named(fresh, monkeypatch, caplog):
    for name, reads_float16 in (("x86-64", False), ("x86-64-v3", True)):
        monkeypatch.setenv("LORAWEAVE_NATIVE", name)
        forget()
        assert (native_rows.function(torch.float32, torch.float16) is not None) == reads_float16
    for same in ("", "1"):
        monkeypatch.setenv("LORAWEAVE_NATIVE", same)
        forget()
        assert native_rows.library() is not None
    assert len(list(fresh.iterdir())) == 3
    monkeypatch.setenv("LORAWEAVE_NATIVE", "x87")
    forget()
    with caplog.at_level(logging.INFO, logger=compute.__name__):
        assert native_rows.library() is None
    assert "x87" in caplog.text


@needs_a_compiler
def test_no_library_is_loaded_from_a_folder_that_others_may_write_to(fresh, caplog):
    fresh.mkdir(mode=0o700)
    fresh.chmod(0o777)
    with caplog.at_level(logging.INFO, logger=compute.__name__):
        assert not NativeRows.runs(torch.device("cpu"), torch.float32)
    assert f"others may write to {fresh}" in caplog.text
    forget()
    fresh.chmod(0o700)
    assert NativeRows.runs(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("why", ["no compiler", "it fails", "asked not to"])
def test_without_the_library_the_kernels_of_torch_are_taken_and_the_log_says_why(fresh, monkeypatch, caplog, why):
    if why == "no compiler":
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CC", raising=False)
    elif why == "it fails":
        monkeypatch.setenv("CC", "false")
    else:
        monkeypatch.setenv("LORAWEAVE_NATIVE", "0")
    with caplog.at_level(logging.INFO, logger=compute.__name__):
        assert not NativeRows.runs(torch.device("cpu"), torch.float32)
    told = {"no compiler": "no C compiler", "it fails": "non-zero exit status", "asked not to": ""}[why]
    assert told in caplog.text
    assert not fresh.exists() or list(fresh.iterdir()) == []
    parts, rows = mixtures(torch.float32, 5, 7)
    x, y = torch.randn(4, 1, 5), torch.zeros(4, 1, 7)
    kernel = NativeRows.of(parts, rows, torch.float32)
    kernel.adder(torch.float32, x.shape)(x, y)
    assert torch.equal(y, kernel._formula(x))


def test_it_is_chosen_for_few_tokens_where_it_runs_and_left_where_torch_has_many_threads():
    work = Workload(8, 32, 256, 8, 256, 256, num_inputs=576, num_outputs=576, native=1)
    for itemsize in (4, 2):
        one = Workload(**{**vars(work), "itemsize": itemsize})
        assert choose(one).path == "native_rows"
        for other in ({"native": 0}, {"tokens": 64}, {"native": 64}):
            assert choose(Workload(**{**vars(one), **other})).path != "native_rows"


# four tokens of a mixture of four adapters of rank 16, or of two: 49 and 57 us by torch with AVX2, 36 and 47 by this
@pytest.mark.parametrize(
    "work",
    [
        Workload(1, 64, 64, 1, 64, 64, tokens=4, num_inputs=576, num_outputs=1536, native=1),
        Workload(2, 64, 128, 2, 128, 128, tokens=4, num_inputs=576, num_outputs=576, native=1),
    ],
)
@pytest.mark.parametrize("itemsize", [4, 2])
def test_it_is_chosen_for_a_few_tokens_of_each_row_too(work, itemsize):
    assert choose(replace(work, itemsize=itemsize)).path == "native_rows"


@needs_a_compiler
@pytest.mark.parametrize("known", ["nothing", "hidden values", "one mixture for all"])
@pytest.mark.parametrize("sizes", [(65, 33), (64, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_by_token_are_the_formula_and_zero_adds_nothing_of_what_has_overflowed(dtype, sizes, known):
    ranks, (inputs, outputs) = (8, 3, 1), sizes
    parts, _ = mixtures(dtype, inputs, outputs, ranks)
    if inputs == 64:
        parts = [PlacedFactors(part.a_RI.bfloat16().to(dtype), part.b_RO.bfloat16().to(dtype)) for part in parts]
    stack = Stack.of(parts, dtype)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, 2, size, generator=generator).to(dtype) for size in (inputs, outputs))
    shape = (1, 1, 3) if known == "one mixture for all" else (3, 2, 3)
    w = torch.randn(*shape, generator=generator)
    w[..., 1] = 0
    hidden = torch.cat([x @ stack.a_SI.T, x], dim=2)[..., : sum(ranks)].flatten(0, 1)
    hidden[:, 8:11] = float("inf")
    kernel = Dense(stack, w, hidden if known == "hidden values" else None)
    assert (row_by_row(kernel, only_b=False)[0].dtype is not dtype) == (dtype is torch.float32 and inputs == 64)
    wanted, reach = y.double(), y.double().abs()
    for place in (0, 2):
        a, b = parts[place].a_RI.double(), parts[place].b_RO.double()
        wanted += w[..., place, None].double() * ((x.double() @ a.T) @ b)
        reach += w[..., place, None].double().abs() * ((x.double().abs() @ a.abs().T) @ b.abs())
    found = y.clone()
    assert NativeRows.add_dense(kernel, x, y.clone())
    kernel.add_(x, found)
    # the hidden values are rounded to the dtype, as a layer's are
    bound = rounding(inputs + sum(ranks) + 1, reach) + unit(dtype) * (reach + wanted.abs())
    assert bool(((found.double() - wanted).abs() <= bound).all())


@needs_a_compiler
def test_what_is_traced_of_a_warm_layer_has_the_mixture_in_torchs_own_operations():
    factors = {name: Factors(torch.randn(4, 16), torch.randn(16, 4)) for name in "abc"}
    model = torch.nn.Sequential(torch.nn.Linear(16, 16)).requires_grad_(False)
    engine = Composer(model, {name: Adapter(name, "tiny", {"0": each}) for name, each in factors.items()})
    x = torch.randn(3, 1, 16)
    with torch.no_grad(), engine.activate([{name: 1.0} for name in factors]):
        wanted = model(x)
        traced = make_fx(model)(x)
    assert torch.allclose(traced(x), wanted, atol=1e-5)
    assert not torch.allclose(model(x), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_stack_keeps_row_by_row_is_counted_once_it_is_there(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = [
        PlacedFactors(torch.randn(r, 7, generator=generator), torch.randn(r, 5, generator=generator)) for r in (2, 1, 4)
    ]
    stack = Stack.of([PlacedFactors(part.a_RI.to(dtype), part.b_RO.to(dtype)) for part in parts], dtype)
    factors, dense = stack.a_SI.nbytes + stack.b_SO.nbytes, Dense(stack, torch.ones(1, 1, 3))
    assert stack.num_bytes == factors
    # in random numbers nothing is short: b is the stack's own, a is copied
    assert row_by_row(dense, only_b=True)[0] is stack.b_SO
    assert stack.num_bytes == factors
    assert torch.equal(row_by_row(dense, only_b=False)[0], stack.a_SI)
    assert stack.num_bytes == factors + stack.a_SI.nbytes
