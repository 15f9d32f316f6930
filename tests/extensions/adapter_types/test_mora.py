"""MoRA as its authors' fork of peft saves it (github.com/kongds/MoRA): the forward of each type, written out."""

import math

import pytest
import torch
from peft_models import PREFIX, Tree, edit, put
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, LayerMismatch
from loraweave.hub.adapter import Adapter

LAYER = "inner.q_proj"
# (inputs, outputs, r): sides of 10, 12, 7, 9, 12, 16 and 20, which divide both sizes, one of them or none
SIZES = [(20, 30, 2), (24, 12, 4), (17, 7, 2), (7, 17, 3), (36, 36, 2), (9, 23, 8), (10, 40, 8)]
TYPES = [1, 2, 3, 4, 6]


def side_of(num_in, num_out, rank, kind):
    """The side of the square matrix: with about as many entries as a LoRA of that rank; even for type 6."""
    side = int(math.sqrt((num_in + num_out) * rank) + 0.5)
    return side // 2 * 2 if kind == 6 else side


def saved(folder, sizes, kind, **config):
    """(folder, the square matrix) of one layer."""
    num_in, num_out, rank = sizes
    side = side_of(num_in, num_out, rank, kind)
    square = torch.randn(side, side, generator=torch.Generator().manual_seed(7))
    tensors = {f"{PREFIX}{LAYER}.lora_{factor}.weight": square.clone() for factor in "AB"}
    return put(folder, tensors, r=rank, use_mora=True, mora_type=kind, **config), square.double()


def base(num_in, num_out):
    return Tree({LAYER: nn.Linear(num_in, num_out)})


def groups(size, count):
    """The group of each of so many features, in order: the first groups have one more where `count` does not divide."""
    return [group for group in range(count) for _ in range(size // count + (group < size % count))]


def forward(square_SS, x_I, num_out, kind):
    """What MoRA adds to the output of one input."""
    side, num_in = len(square_SS), len(x_I)
    # the input is filled up with its own beginning to a multiple of the side
    filled = [x_I[place % num_in] for place in range(-(-num_in // side) * side)]
    if kind == 6:
        out = []
        for block in range(len(filled) // side):
            turned = [0.0] * side
            for pair in range(side // 2):
                angle = block * 10000.0 ** (-2 * pair / side)
                one, other = filled[block * side + pair], filled[block * side + pair + side // 2]
                turned[pair] = one * math.cos(angle) - other * math.sin(angle)
                turned[pair + side // 2] = other * math.cos(angle) + one * math.sin(angle)
            out += (square_SS @ torch.tensor(turned, dtype=torch.float64)).tolist()
        return [out[place % len(out)] for place in range(num_out)]
    compressed = torch.zeros(side, dtype=torch.float64)
    if kind in (1, 4):
        for place, value in enumerate(filled):
            compressed[place % side] += value
    else:
        for value, group in zip(x_I, groups(num_in, side), strict=True):
            compressed[group] += value
    out = (square_SS @ compressed).tolist()
    return [out[row] for row in (groups(num_out, side) if kind in (2, 4) else [i % side for i in range(num_out)])]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", TYPES)
def test_the_update_is_what_the_square_matrix_adds_between_compression_and_decompression(tmp_path, sizes, kind):
    num_in, num_out, _ = sizes
    folder, square = saved(tmp_path, sizes, kind)
    adapter = Adapter.from_pretrained(folder, model=base(num_in, num_out), max_error=1e-6)
    delta_OI = adapter.delta(LAYER).double()
    x_NI = torch.randn(4, num_in, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.tensor([forward(square, x_I, num_out, kind) for x_I in x_NI.tolist()], dtype=torch.float64)
    # fp32 factors of up to 40 terms, and at most 1e-6 of the norm cut
    assert float((x_NI @ delta_OI.T - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_types_that_share_rows_or_columns_are_exactly_of_the_square_s_rank(tmp_path, kind):
    folder, _ = saved(tmp_path, (36, 36, 2), kind)
    adapter = Adapter.from_pretrained(folder, model=base(36, 36).to("meta"))
    assert adapter.card["conversion"][LAYER] == {"rank": 12, "relative_error": 0.0}


def test_the_turned_type_has_full_rank_and_its_cut_is_reported(tmp_path):
    folder, _ = saved(tmp_path, (36, 36, 2), 6)
    whole = Adapter.from_pretrained(folder, model=base(36, 36), max_error=0.0)
    assert whole.layers[LAYER].rank == 36
    less = Adapter.from_pretrained(folder, model=base(36, 36), max_error=0.3)
    note = less.card["conversion"][LAYER]
    wanted = whole.delta(LAYER).double()
    lost = float((less.delta(LAYER).double() - wanted).norm() / wanted.norm())
    assert lost == pytest.approx(note["relative_error"], abs=1e-5)
    assert 0 < lost <= 0.3
    with pytest.raises(AdapterUnsupported, match=r"rank 4 leaves a relative error of"):
        Adapter.from_pretrained(folder, model=base(36, 36), rank=4)


def test_without_a_type_it_is_the_first_and_alpha_counts_for_nothing(tmp_path):
    folder, _ = saved(tmp_path / "a", (20, 30, 2), 1)
    other = put(
        tmp_path / "b",
        {f"{PREFIX}{LAYER}.lora_{part}.weight": saved(tmp_path / "c", (20, 30, 2), 1)[1].float() for part in "AB"},
        use_mora=True,
        lora_alpha=64,
    )
    model = base(20, 30)
    assert Adapter.from_pretrained(folder, model=model).hash == Adapter.from_pretrained(other, model=model).hash


def test_a_plain_lora_of_the_fork_is_a_plain_lora(tmp_path):
    tensors = {f"{PREFIX}{LAYER}.lora_A.weight": torch.ones(2, 6), f"{PREFIX}{LAYER}.lora_B.weight": torch.ones(4, 2)}
    adapter = Adapter.from_pretrained(put(tmp_path, tensors, use_mora=False, mora_type=1))
    assert torch.equal(adapter.delta(LAYER), torch.full((4, 6), 4.0))


REFUSED = {
    "no model": ({}, None, AdapterUnsupported, "model=model"),
    "another type": ({"mora_type": 5}, (20, 30), AdapterUnsupported, "mora_type is 5; known are 1, 2, 3, 4, 6"),
    "another rank": ({"r": 4}, (20, 30), AdapterCorrupt, r"'lora_A.weight' has shape \(10, 10\), not \(14, 14\)"),
    "DoRA": ({"use_dora": True}, (20, 30), AdapterUnsupported, "use_dora=True beside use_mora"),
    "trained biases": ({"bias": "all"}, (20, 30), AdapterUnsupported, "bias='all' beside use_mora"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_determine_the_update_is_refused(tmp_path, case):
    config, sizes, error, named = REFUSED[case]
    folder, _ = saved(tmp_path, (20, 30, 2), 1)
    edit(folder, **config)
    with pytest.raises(error, match=named):
        Adapter.from_pretrained(folder, model=None if sizes is None else base(*sizes))


def test_two_matrices_that_should_be_one_are_refused(tmp_path):
    tensors = {f"{PREFIX}{LAYER}.lora_A.weight": torch.ones(10, 10), f"{PREFIX}{LAYER}.lora_B.weight": torch.zeros(10, 10)}
    with pytest.raises(AdapterCorrupt, match="lora_A and lora_B differ"):
        Adapter.from_pretrained(put(tmp_path, tensors, use_mora=True), model=base(20, 30))


def test_a_layer_that_is_no_linear_one_is_refused(tmp_path):
    folder, _ = saved(tmp_path, (20, 30, 2), 1)
    with pytest.raises((AdapterUnsupported, LayerMismatch), match="Embedding"):
        Adapter.from_pretrained(folder, model=Tree({LAYER: nn.Embedding(20, 30)}))
