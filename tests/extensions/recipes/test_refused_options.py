"""Options of recipes out of their ranges, refused by the option's and the recipe's name before the model is touched."""

import pytest

import loraweave as lw
from loraweave.errors import WeightingError

# what a recipe cannot do without
NEEDED = {
    "flora": {"tasks": ("a", "b", "c")},
    "mixture_of_loras": {"tasks": ("a", "b", "c")},
    "mocle": {"embedder": "hashing"},
    "mlore": {"tasks": ("a", "b"), "ranks": (1, 4, 2, 3), "top_k": 2, "rank": 2},
    "mtlora": {"tasks": ("a", "b", "c"), "task_rank": 2},
}
# recipes for images
MODELS = {"mlore": "upernet", "mtlora": "segformer"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedms", {"queue": (0, 0)}, r"recipe 'fedms' got queue=\(0, 0\); .* each once"),
        ("fedms", {"queue": (2,)}, r"recipe 'fedms' got queue=\(2,\); the model has blocks 0 to 1"),
        ("fedms", {"capability": -1}, "recipe 'fedms' got capability=-1"),
        ("fedms", {"capability": 3}, "recipe 'fedms' got capability=3; the queue has 2 blocks"),
        ("flora", {"mode": "sum"}, "recipe 'flora' got mode='sum'; it takes one of 'multiplicative', 'additive'"),
        ("flora", {"alpha": 4.0}, "recipe 'flora' got alpha=4.0; it takes None where the experts multiply"),
        ("flora", {"dropout": 0.1}, "recipe 'flora' got dropout=0.1; it takes 0 where the experts multiply"),
        ("llava_mole", {"balance": -1.0}, r"recipe 'llava_mole' got balance=-1\.0"),
        ("loramoe", {"num_experts": 5}, "recipe 'loramoe' got num_experts=5; it takes an even number"),
        ("loramoe", {"delta": 1.0}, r"recipe 'loramoe' got delta=1\.0"),
        ("loramoe", {"balance": -0.1}, r"recipe 'loramoe' got balance=-0\.1"),
        ("mixlora", {"num_experts": 0}, "recipe 'mixlora' got num_experts=0"),
        (
            "mixlora",
            {"num_experts": 2, "top_k": 3},
            r"recipe 'mixlora' got top_k=3; .* from 1 to the number of experts, 2",
        ),
        ("mixlora", {"balance": -1.0}, "recipe 'mixlora' got balance=-1.0"),
        ("mixlora", {"routing": "top"}, "recipe 'mixlora' got routing='top'; it takes one of 'top_k', 'top_p', 'switch'"),
        ("mixlora", {"top_p": 0.0}, "recipe 'mixlora' got top_p=0.0; it takes a finite number above 0 and at most 1"),
        ("mixlora", {"capacity": 0.0}, "recipe 'mixlora' got capacity=0.0"),
        (
            "mixlora_conditional",
            {"num_experts": 3, "rank": 4},
            "recipe 'mixlora_conditional' got rank=4; .* of the 3 of num_experts",
        ),
        ("mixlora_conditional", {"num_experts": 0}, "recipe 'mixlora_conditional' got num_experts=0"),
        (
            "mixlora_conditional",
            {"a_weight": -1.0},
            "recipe 'mixlora_conditional' got a_weight=-1.0; it takes a finite number of at least 0",
        ),
        ("mixture_of_loras", {"eta": -0.1}, "recipe 'mixture_of_loras' got eta=-0.1"),
        ("mixture_of_loras", {"eta": float("nan")}, "recipe 'mixture_of_loras' got eta=nan"),
        ("mocle", {"num_experts": 0}, "recipe 'mocle' got num_experts=0"),
        ("mocle", {"num_clusters": 0}, "recipe 'mocle' got num_clusters=0"),
        ("mocle", {"num_features": 0}, "recipe 'mocle' got num_features=0"),
        ("mocle", {"temperature": 0.0}, "recipe 'mocle' got temperature=0.0"),
        ("mlore", {"top_k": 5}, r"recipe 'mlore' got top_k=5; .* from 1 to the number of experts, 4"),
        ("mlore", {"ranks": ()}, r"recipe 'mlore' got ranks=\(\)"),
        ("mlore", {"ranks": (2, 0)}, r"recipe 'mlore' got ranks=\(2, 0\)"),
        ("mlore", {"balance": -1.0}, "recipe 'mlore' got balance=-1.0"),
        ("mlore", {"alpha": 2.0}, "recipe 'mlore' got alpha=2.0"),
        ("mlore", {"tasks": ()}, r"recipe 'mlore' got tasks=\(\)"),
        ("mtlora", {"mode": "matrices"}, "got mode='matrices'; it takes one of 'matrix', 'matrixv2', 'addition'"),
        ("mtlora", {"task_rank": (1, 2)}, r"got task_rank=\(1, 2\); it takes one for all, or one for each of the 3"),
        ("mtlora", {"task_rank": 0}, "recipe 'mtlora' got task_rank=0"),
        ("mtlora", {"task_scale": (1.0, 0.0, 1.0)}, "recipe 'mtlora' got task_scale="),
        ("mtlora", {"shared_scale": float("inf")}, "recipe 'mtlora' got shared_scale=inf"),
        ("mtlora", {"alpha": 8.0}, "recipe 'mtlora' got alpha=8.0; it takes None"),
        ("mtlora", {"task_modules": ("dense",)}, r"got task_modules=\('dense',\); name endings of layers"),
        ("mtlora", {"tasks": ()}, r"recipe 'mtlora' got tasks=\(\); name those"),
        ("moral", {"top_k": 0}, r"recipe 'moral' got top_k=0; it takes a whole number of at least 1"),
        ("moral", {"balance": -0.1}, r"recipe 'moral' got balance=-0\.1"),
        ("multilora", {"num_experts": 0}, "recipe 'multilora' got num_experts=0"),
        ("octavius", {"top_k": 5}, "recipe 'octavius' got top_k=5; .* to the number of experts, 4"),
        ("octavius", {"num_experts": 0}, "recipe 'octavius' got num_experts=0"),
        ("local_and_shared", {"shared_rank": 0}, "recipe 'local_and_shared' got shared_rank=0"),
        ("local_and_shared", {"mu": 1.0}, "recipe 'local_and_shared' got mu=1.0"),
        ("local_and_shared", {"phase": 3}, "recipe 'local_and_shared' got phase=3; it takes one of 'local', 'shared'"),
        (
            "local_and_shared",
            {"phase": "locl"},
            "recipe 'local_and_shared' got phase='locl'; it takes one of 'local', 'shared', did you mean 'local'",
        ),
        ("sira", {"top_k": 17}, r"recipe 'sira' got top_k=17; .* from 1 to the number of experts, 16"),
        ("sira", {"capacity": 0.0}, r"recipe 'sira' got capacity=0\.0; it takes a finite number above 0 or None"),
        ("sira", {"expert_dropout": 1.0}, r"recipe 'sira' got expert_dropout=1\.0; .* at least 0 and below 1"),
        ("sira", {"balance": float("nan")}, "recipe 'sira' got balance=nan"),
        ("switch", {"num_experts": 0}, "recipe 'switch' got num_experts=0"),
        ("switch", {"capacity": 0}, "recipe 'switch' got capacity=0; it takes a finite number above 0 or None"),
        ("switch", {"balance": -1.0}, r"recipe 'switch' got balance=-1\.0"),
        ("switch", {"z": float("nan")}, "recipe 'switch' got z=nan"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make_model, name, options, message):
    model = make_model(MODELS.get(name, "llama"))
    with pytest.raises(WeightingError, match=message):
        lw.experts(name, model, **{**NEEDED.get(name, {}), **options})
    assert all(parameter.requires_grad for parameter in model.parameters())
