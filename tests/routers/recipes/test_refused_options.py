"""Options of recipes out of their ranges, refused by the option's and the recipe's name before the model is touched."""

import pytest

import loraweave as lw
from loraweave.errors import WeightingError

# what a recipe cannot do without
NEEDED = {
    "flora": {"tasks": ("a", "b", "c")},
    "mixture_of_loras": {"tasks": ("a", "b", "c")},
    "mocle": {"embedder": "hashing"},
    "moelora": {"tasks": ("a", "b", "c")},
}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedms", {"queue": (0, 0)}, r"queue of recipe 'fedms' is \(0, 0\): .* each once"),
        ("fedms", {"queue": (2,)}, r"queue of recipe 'fedms' is \(2,\): the model has blocks 0 to 1"),
        ("fedms", {"capability": -1}, "capability of recipe 'fedms' is -1"),
        ("fedms", {"capability": 3}, "capability of recipe 'fedms' is 3: the queue has 2 blocks"),
        ("flora", {"mode": "sum"}, "mode of recipe 'flora' is 'sum': it is one of 'multiplicative', 'additive'"),
        ("flora", {"alpha": 4.0}, "alpha of recipe 'flora' is 4.0: it is None where the experts multiply"),
        ("flora", {"dropout": 0.1}, "dropout of recipe 'flora' is 0.1: it is 0 where the experts multiply"),
        ("llava_mole", {"balance": -1.0}, r"balance of recipe 'llava_mole' is -1\.0"),
        ("loramoe", {"num_experts": 5}, "num_experts of recipe 'loramoe' is 5: it is an even number"),
        ("loramoe", {"delta": 1.0}, r"delta of recipe 'loramoe' is 1\.0"),
        ("loramoe", {"balance": -0.1}, r"balance of recipe 'loramoe' is -0\.1"),
        ("mixlora", {"num_experts": 0}, "num_experts of recipe 'mixlora' is 0"),
        (
            "mixlora",
            {"num_experts": 2, "top_k": 3},
            r"top_k of recipe 'mixlora' is 3: .* from 1 to the number of experts, 2",
        ),
        ("mixlora", {"balance": -1.0}, "balance of recipe 'mixlora' is -1.0"),
        ("mixlora", {"routing": "top"}, "routing of recipe 'mixlora' is 'top': it is one of 'top_k', 'top_p', 'switch'"),
        ("mixlora", {"top_p": 0.0}, "top_p of recipe 'mixlora' is 0.0: it is a share of probability"),
        ("mixlora", {"capacity": 0.0}, "capacity of recipe 'mixlora' is 0.0"),
        (
            "mixlora_conditional",
            {"num_experts": 3, "rank": 4},
            "rank of recipe 'mixlora_conditional' is 4: .* of the 3 of num_experts",
        ),
        ("mixlora_conditional", {"num_experts": 0}, "num_experts of recipe 'mixlora_conditional' is 0"),
        ("mixlora_conditional", {"a_weight": -1.0}, "a_weight of recipe 'mixlora_conditional' is -1.0: it is 0 or more"),
        ("mixtral", {"top_k": 9}, r"top_k of recipe 'mixtral' is 9: .* from 1 to the number of experts, 8"),
        ("mixtral", {"num_experts": True}, "num_experts of recipe 'mixtral' is True"),
        ("mixtral", {"balance": float("inf")}, "balance of recipe 'mixtral' is inf"),
        ("mixture_of_loras", {"eta": -0.1}, "eta of recipe 'mixture_of_loras' is -0.1"),
        ("mixture_of_loras", {"eta": float("nan")}, "eta of recipe 'mixture_of_loras' is nan"),
        ("mocle", {"num_experts": 0}, "num_experts of recipe 'mocle' is 0"),
        ("mocle", {"num_clusters": 0}, "num_clusters of recipe 'mocle' is 0"),
        ("mocle", {"num_features": 0}, "num_features of recipe 'mocle' is 0"),
        ("mocle", {"temperature": 0.0}, "temperature of recipe 'mocle' is 0.0"),
        ("moelora", {"rank": 6, "num_experts": 4}, "rank of recipe 'moelora' is 6: the 4 experts .* evenly"),
        ("moelora", {"num_experts": 0}, "num_experts of recipe 'moelora' is 0"),
        ("moelora", {"num_features": 0}, "num_features of recipe 'moelora' is 0"),
        ("moelora", {"tasks": ("ct", "ct")}, "tasks of recipe 'moelora' .* each name once"),
        ("mola", {"top_k": 3, "num_experts": (2, 4)}, r"top_k of recipe 'mola' is 3: .* from 1 to the number of experts, 2"),
        ("mola", {"num_experts": (0,)}, r"num_experts of recipe 'mola' is \(0,\)"),
        ("mola", {"rank": 0}, "rank of recipe 'mola' is 0"),
        ("mola", {"dropout": 1.0}, "dropout of recipe 'mola' is 1.0"),
        ("mola", {"balance": float("nan")}, "balance of recipe 'mola' is nan"),
        ("moral", {"top_k": 0}, r"top_k of recipe 'moral' is 0: .* from 1 to the number of experts, 8"),
        ("moral", {"balance": -0.1}, r"balance of recipe 'moral' is -0\.1"),
        ("multilora", {"num_experts": 0}, "num_experts of recipe 'multilora' is 0"),
        ("octavius", {"top_k": 5}, "top_k of recipe 'octavius' is 5: .* to the number of experts, 4"),
        ("octavius", {"num_experts": 0}, "num_experts of recipe 'octavius' is 0"),
        ("pfedlora", {"shared_rank": 0}, "shared_rank of recipe 'pfedlora' is 0"),
        ("pfedlora", {"mu": 1.0}, "mu of recipe 'pfedlora' is 1.0"),
        ("pfedlora", {"phase": 3}, "phase of recipe 'pfedlora' is 3: it is one of 'local', 'shared'"),
        (
            "pfedlora",
            {"phase": "locl"},
            "phase of recipe 'pfedlora' is 'locl': it is one of 'local', 'shared', did you mean 'local'",
        ),
        ("sira", {"top_k": 17}, r"top_k of recipe 'sira' is 17: .* from 1 to the number of experts, 16"),
        ("sira", {"capacity": 0.0}, r"capacity of recipe 'sira' is 0\.0: .* above 0, or None for no limit"),
        ("sira", {"expert_dropout": 1.0}, r"expert_dropout of recipe 'sira' is 1\.0: .* at least 0 and below 1"),
        ("sira", {"balance": float("nan")}, "balance of recipe 'sira' is nan"),
        ("switch", {"num_experts": 0}, "num_experts of recipe 'switch' is 0"),
        ("switch", {"capacity": 0}, "capacity of recipe 'switch' is 0: .* above 0, or None"),
        ("switch", {"balance": -1.0}, r"balance of recipe 'switch' is -1\.0"),
        ("switch", {"z": float("nan")}, "z of recipe 'switch' is nan"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make_model, name, options, message):
    model = make_model("llama")
    with pytest.raises(WeightingError, match=message):
        lw.experts(name, model, **{**NEEDED.get(name, {}), **options})
    assert all(parameter.requires_grad for parameter in model.parameters())
