"""The product is that of float64, by either library, for shapes and layouts of every kind."""

from __future__ import annotations

import pytest
import torch
from rounding import rounding

from loraweave.composer.fused.overwritten import added_product
from loraweave.extensions.accelerators.kernels import onednn_product as module


@pytest.mark.parametrize("library", ["the faster", "addmm"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 3, 5), (64, 16, 33), (5, 0, 4), (129, 65, 1)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_product_is_added_in_place(
    library: str, shape: tuple[int, int, int], transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "addmm":
        monkeypatch.setattr(module, "_onednn_linear", lambda: None)
    num_rows, num_inner, num_columns = shape
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        if transposed:
            return torch.randn(columns, rows, generator=generator, dtype=dtype).T
        return torch.randn(rows, columns, generator=generator, dtype=dtype)

    left, right = random(num_rows, num_inner), random(num_inner, num_columns)
    into = torch.randn(num_rows, num_columns, generator=generator, dtype=dtype)
    expected = into.double() + (left.double()[:, :, None] * right.double()[None]).sum(dim=1)
    sizes = into.abs() + left.abs() @ right.abs()
    assert added_product(into, left, right) is into
    assert bool(((into.double() - expected).abs() <= rounding(num_inner + 1, sizes, dtype)).all())


def test_an_operation_that_is_missing_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    module._onednn_linear.cache_clear()
    monkeypatch.setattr(module, "torch", type("Old", (), {"ops": None, "tensor": torch.tensor}))
    assert module._onednn_linear() is None
    module._onednn_linear.cache_clear()
