"""Options of recipes out of their ranges, refused by the option's and the recipe's name before the model is touched."""

import pytest

import loraweave as lw
from loraweave.errors import WeightingError

# what a recipe cannot do without
NEEDED = {"moelora": {"tasks": ("a", "b", "c")}}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixtral", {"top_k": 9}, r"recipe 'mixtral' got top_k=9; .* from 1 to the number of experts, 8"),
        ("mixtral", {"num_experts": True}, "recipe 'mixtral' got num_experts=True"),
        ("mixtral", {"balance": float("inf")}, "recipe 'mixtral' got balance=inf"),
        ("moelora", {"rank": 6, "num_experts": 4}, "recipe 'moelora' got rank=6; the 4 experts .* evenly"),
        ("moelora", {"num_experts": 0}, "recipe 'moelora' got num_experts=0"),
        ("moelora", {"num_features": 0}, "recipe 'moelora' got num_features=0"),
        ("moelora", {"tasks": ("ct", "ct")}, "recipe 'moelora' got tasks=.* each name once"),
        ("mola", {"top_k": 3, "num_experts": (2, 4)}, r"recipe 'mola' got top_k=3; .* from 1 to the number of experts, 2"),
        ("mola", {"num_experts": (0,)}, r"recipe 'mola' got num_experts=\(0,\)"),
        ("mola", {"rank": 0}, "recipe 'mola' got rank=0"),
        ("mola", {"dropout": 1.0}, "recipe 'mola' got dropout=1.0"),
        ("mola", {"balance": float("nan")}, "recipe 'mola' got balance=nan"),
        ("mola", {"num_experts": (2,) * 5}, r"recipe 'mola' got num_experts=\(2, 2, 2, 2, 2\); .* the model has 2 blocks"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make_model, name, options, message):
    model = make_model("llama")
    with pytest.raises(WeightingError, match=message):
        lw.experts(name, model, **{**NEEDED.get(name, {}), **options})
    assert all(parameter.requires_grad for parameter in model.parameters())
