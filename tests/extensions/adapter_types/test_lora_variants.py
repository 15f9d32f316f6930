"""LoRA with one field, matrix or file more: BD-LoRA, KaSA, LoRA-XS and parts of fused projections.

What of them peft computes is compared in test_other_types.py; here is what it has no longer, or never had.
"""

import peft
import pytest
import torch
from peft_models import PREFIX, TARGETS, Tree, lora, put, save
from safetensors.torch import load_file, save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.extensions.adapter_types.formats.merged_linear import MergedLinear
from loraweave.hub.adapter import Adapter

FUSED = "transformer.h.0.self_attention.query_key_value"
NUM_IN = 7

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def put_blocks(folder, config, *, a=(4, 3), b=(10, 4), **extra):
    held = lora("inner.q_proj", a=torch.ones(a), b=torch.ones(b))
    held |= {f"{PREFIX}inner.q_proj.{name}": tensor for name, tensor in extra.items()}
    return put(folder, held, **{"r": 4, "lora_alpha": 8, **config})


def blocks(**fields):
    return {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2, **fields}}


def test_a_blocked_factor_is_widened_and_scaled_and_the_other_left(tmp_path):
    delta = Adapter.from_pretrained(put_blocks(tmp_path, blocks())).delta("inner.q_proj")
    assert torch.equal(delta, torch.full((10, 6), 4.0))


REFUSED = {
    "no object": ({"use_bdlora": True}, {}, AdapterCorrupt, "not an object"),
    "an unknown field": (blocks(new=1), {}, AdapterUnsupported, "'new'"),
    "no count": (blocks(nblocks=0), {}, AdapterCorrupt, "nblocks is 0"),
    "no list": (blocks(target_modules_bd_b="q_proj"), {}, AdapterCorrupt, "target_modules_bd_b is 'q_proj', not a list"),
    "both factors": (blocks(target_modules_bd_b=["q"]), {}, AdapterCorrupt, "both factors"),
    "rows that do not divide": (blocks(nblocks=3), {}, AdapterCorrupt, r"\(4, 3\) does not divide into 3"),
    "another rank": ({**blocks(), "r": 2}, {}, AdapterCorrupt, "rank 4 in the file and rank 2"),
    "DoRA": ({**blocks(), "use_dora": True}, {}, AdapterUnsupported, "use_dora=True beside use_bdlora"),
    "trained biases": ({**blocks(), "bias": "all"}, {}, AdapterUnsupported, "bias='all'"),
    "invocation tokens": (
        {**blocks(), "alora_invocation_tokens": [5, 6]},
        {},
        AdapterUnsupported,
        "alora_invocation_tokens beside use_bdlora",
    ),
    "two variants": ({**blocks(), "kasa_config": {"beta": 1}}, {}, AdapterUnsupported, "kasa_config"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_blocks_that_are_not_understood_are_refused(tmp_path, case):
    config, options, error, named = REFUSED[case]
    with pytest.raises(error, match=named):
        Adapter.from_pretrained(put_blocks(tmp_path, config, **options))


def test_kasa_needs_the_weights_and_its_own_diagonal(tmp_path):
    def base(num_in):
        return Tree({"inner.q_proj": nn.Linear(num_in, 10)})

    kasa = {"kasa_config": {"beta": 1e-4}}
    put_blocks(tmp_path, kasa, a=(4, 6), lora_diag=torch.ones(4))
    assert Adapter.from_pretrained(tmp_path, model=base(6)).rank == 6
    with pytest.raises(AdapterUnsupported, match="model=model"):
        Adapter.from_pretrained(tmp_path)
    put_blocks(tmp_path, kasa, a=(4, 4), lora_diag=torch.ones(4))
    with pytest.raises(AdapterCorrupt, match=r"rank 4 .* does not fit the base's \(O, I\) = \(10, 4\)"):
        Adapter.from_pretrained(tmp_path, model=base(4))
    put_blocks(tmp_path, kasa, a=(4, 6))
    with pytest.raises(AdapterCorrupt, match="lacks the tensor 'lora_diag'"):
        Adapter.from_pretrained(tmp_path, model=base(6))


def put_merged(folder, enable, *, part=5, rank=2, groups=None, flat=False, config=None):
    """A file as PEFT 0.2 writes it, whose B is a convolution in groups, as loralib has it; gives A and B."""
    used = sum(enable)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rank * used, NUM_IN, generator=generator)
    b = torch.randn(part * used, rank * used // (groups or used), 1, generator=generator)
    fields = {"r": rank, "lora_alpha": 3, "enable_lora": enable, "fan_in_fan_out": True, "bias": "none", **(config or {})}
    put(folder, lora(FUSED, a=a, b=b[..., 0].contiguous() if flat else b), **fields)
    return a, b


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("enable", [[True, False, True], [True, True, True], [False, True, False], [True, True], [True]])
def test_the_update_is_the_convolution_in_groups_at_the_places_of_the_parts(tmp_path, enable, flat):
    a, b = put_merged(tmp_path, enable, flat=flat)
    x = torch.randn(4, NUM_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner = torch.nn.functional.conv1d((x @ a.double().T)[..., None], b.double(), groups=sum(enable))[..., 0]
    places = torch.tensor(enable).repeat_interleave(5)
    expected = torch.zeros(4, 5 * len(enable), dtype=torch.float64)
    expected[:, places] = inner * 3 / 2
    update = Adapter.from_pretrained(tmp_path).delta(FUSED).double()
    torch.testing.assert_close(x @ update.T, expected, rtol=1e-6, atol=1e-6)


def test_one_part_with_the_two_groups_that_peft_always_took(tmp_path):
    a, b = put_merged(tmp_path, [True, False], part=6, rank=4, groups=2)
    x = torch.randn(3, NUM_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner = torch.nn.functional.conv1d((x @ a.double().T)[..., None], b.double(), groups=2)[..., 0]
    expected = torch.cat([inner * 3 / 4, torch.zeros(3, 6)], dim=1)
    torch.testing.assert_close(x @ Adapter.from_pretrained(tmp_path).delta(FUSED).double().T, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [[], [False, False], [1, 0], "q", [True, None]])
def test_a_list_without_a_part_in_use_is_refused(tmp_path, value):
    put_merged(tmp_path, [True, True], config={"enable_lora": value})
    with pytest.raises((AdapterCorrupt, AdapterUnsupported)):
        MergedLinear.read(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"enable_lora": [True, False, True, True]}, {"r": 3}, {"use_rslora": True}, {"bias": "all"}, {"use_dora": True}],
)
def test_what_does_not_fit_the_tensors_or_the_age_is_refused(tmp_path, config):
    put_merged(tmp_path, [True, False, True], config=config)
    with pytest.raises((AdapterCorrupt, AdapterUnsupported)):
        Adapter.from_pretrained(tmp_path)


# LoRA-XS as its authors' code saves it (github.com/MohammadrezaBanaei/LoRA-XS): a linear layer between A and B,
# in both spellings that versions of peft write
@pytest.fixture(params=[".default_lora_latent_mapping.weight", "_lora_latent_mapping.weight"])
def stored(request, tmp_path):
    """(folder, middle matrices, the LoRA without them)."""
    save(peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, rank_pattern={"last": 2}), tmp_path)
    plain = Adapter.from_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    middles = {name: torch.randn(factors.rank, factors.rank) for name, factors in plain.layers.items()}
    extra = {f"{PREFIX}{name}{request.param}": middle for name, middle in middles.items()}
    save_file({**load_file(path), **extra}, path)
    return tmp_path, middles, plain


def test_the_middle_matrix_stands_between_a_and_b(stored):
    folder, middles, plain = stored
    adapter = Adapter.from_pretrained(folder)
    for name, factors in plain.layers.items():
        wanted = factors.b_OR @ middles[name] @ factors.a_RI
        torch.testing.assert_close(adapter.delta(name), wanted)
        assert adapter.layers[name].rank == factors.rank


def test_a_layer_without_its_middle_matrix_is_refused(stored):
    folder, _, _ = stored
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if "first" not in key or "latent" not in key}, path)
    with pytest.raises(AdapterCorrupt, match="'first' lacks the tensor 'default_lora_latent_mapping"):
        Adapter.from_pretrained(folder)
