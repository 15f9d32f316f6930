"""PEFT's other adapter types: the factors compute what the installed peft computes, whatever the layers' sizes."""

import peft
import pytest
import torch
from foreign_types import free, maker, other, properties_of
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft_models import TARGETS, gap, tiny

from loraweave.extensions.adapter_types.formats.boft import _order, _rotated
from loraweave.hub.adapter import Adapter

# peft warns about sizes it adjusts and about what it cannot look up for models that exist nowhere
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BLOCKS = BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["0"], nblocks=2, match_strict=False)
BANK = {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 3}
VECTORS = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
PATTERNS = {"rank_pattern": {"inner.0": 3}, "alpha_pattern": {"^first": 5, "last": 2}}
EXACT = {
    "vera": free(peft.VeraConfig, 3, r=3),
    "adalora": other(peft.AdaLoraConfig, 4, base=False, init_r=4, target_r=2, total_step=9, lora_alpha=7),
    "loha": free(peft.LoHaConfig, 4, base=False, r=2, alpha=3),
    "loha with patterns": free(peft.LoHaConfig, 9, base=False, r=2, alpha=3, **PATTERNS),
    "lokr": free(peft.LoKrConfig, 8, odd=False, base=False, r=2, alpha=3),
    "lokr in four factors": free(peft.LoKrConfig, 1, odd=False, base=False, r=1, alpha=3, decompose_both=True),
    "lokr with patterns": free(
        peft.LoKrConfig, 4, odd=False, base=False, r=2, alpha=3, alpha_pattern={"inner.0": 1}, rank_pattern={"inner.0": 1}
    ),
    "lokr of primes": free(peft.LoKrConfig, base=False, r=2, alpha=3),
    "ia3 of outputs": other(peft.IA3Config, 0, feedforward_modules=[], init_ia3_weights=False),
    "pvera": free(peft.PveraConfig, 4, r=4),
    "vblora": other(peft.VBLoRAConfig, 3, odd=False, base=False, **BANK),
    "vblora, top weights only": other(peft.VBLoRAConfig, 3, odd=False, base=False, save_only_topk_weights=True, **BANK),
    "unilora": free(peft.UniLoraConfig, 2, base=False, r=2, theta_d_length=40, save_indices=True),
    "tinylora": free(peft.TinyLoraConfig, 2, r=2, u=5),
    "tinylora, one vector": free(peft.TinyLoraConfig, 2, base=False, r=2, u=5, weight_tying=1.0),
    "tinylora, two vectors": free(peft.TinyLoraConfig, 2, r=2, u=5, weight_tying=0.4),
    "delora": free(peft.DeloraConfig, 3, base=False, r=3),
    "gralora": free(peft.GraloraConfig, 8, odd=False, base=False, r=4, gralora_k=2, alpha=3),
    "gralora, hybrid": free(peft.GraloraConfig, 16, odd=False, base=False, r=4, gralora_k=4, hybrid_r=3, alpha=3),
    "miss": free(peft.MissConfig, 5, r=5),
    "miss, mini": other(peft.MissConfig, 5, odd=False, r=5, mini_r=4, init_weights="mini"),
    "beft": free(peft.BeftConfig, 0),
    "hra": free(peft.HRAConfig, 3, r=3),
    "hra, orthogonal": free(peft.HRAConfig, 3, r=3, apply_GS=True),
    "deft": free(peft.DeftConfig, 3, r=3),
    "deft by qr": free(peft.DeftConfig, 3, r=3, decomposition_method="qr", alpha=5),
    "deft, para": free(peft.DeftConfig, 3, r=3, para=True),
    "peanut": free(peft.PeanutConfig, 3, r=3, depth=2, scaling=0.7),
    "peanut, silu": free(peft.PeanutConfig, 3, r=3, act_fn="silu"),
    "bdlora": other(
        peft.LoraConfig, 4, odd=False, base=False, r=4, lora_alpha=7, init_lora_weights=False, use_bdlora=BLOCKS
    ),
    "kasa": other(peft.LoraConfig, 6, r=3, lora_alpha=7, use_rslora=True, kasa_config=KasaConfig()),
    "osf": free(peft.OSFConfig, effective_rank=7),
}
CUT = {
    "loha of high rank": free(peft.LoHaConfig, base=False, r=5, alpha=3),
    "ia3 of inputs": other(peft.IA3Config, feedforward_modules=TARGETS, init_ia3_weights=False),
    "fourierft": other(peft.FourierFTConfig, n_frequency=20, n_frequency_pattern={"0": 12}),
    "waveft": free(peft.WaveFTConfig, n_frequency=20),
    "waveft without a transform": free(peft.WaveFTConfig, n_frequency=20, use_idwt=False),
    "c3a": other(peft.C3AConfig, odd=False, base=False, block_size=4, init_weights="gaussian"),
    "shira": free(peft.ShiraConfig, r=1),
    "supertuning": free(peft.SupertuningConfig, sparsity=0.6),
    "supertuning with a lora": free(peft.SupertuningConfig, sparsity=0.6, r=2, lora_alpha=3),
    "randlora": free(peft.RandLoraConfig, r=3),
    "hira": free(peft.HiraConfig, r=2),
    "oft": free(peft.OFTConfig, odd=False, r=0, oft_block_size=4),
    "oft by blocks": free(peft.OFTConfig, odd=False, r=2, oft_block_size=0, use_cayley_neumann=False),
    **{
        f"oft, {terms} terms": free(peft.OFTConfig, odd=False, r=0, oft_block_size=4, num_cayley_neumann_terms=terms)
        for terms in (2, 3, 4, 7)
    },
    "oft, shared": free(peft.OFTConfig, odd=False, r=0, oft_block_size=4, block_share=True),
    "oft, constrained": free(peft.OFTConfig, odd=False, r=0, oft_block_size=4, coft=True, eps=0.3),
    "boft": free(peft.BOFTConfig, odd=False, boft_block_size=4),
    "road 1": free(peft.RoadConfig, odd=False, variant="road_1", group_size=4),
    "road 2": free(peft.RoadConfig, odd=False, variant="road_2", group_size=8),
    "road 4": free(peft.RoadConfig, odd=False, variant="road_4", group_size=2),
    "miss, bat": other(peft.MissConfig, odd=False, r=4, init_weights="bat"),
    "glora": free(peft.GloraConfig, r=2),
    "glora of vectors": free(peft.GloraConfig, r=2, **VECTORS),
    "glora of numbers": free(peft.GloraConfig, r=2, config_A_B="constant", config_C="none"),
}

PROPERTIES = properties_of(
    EXACT, CUT, shapes=["vera", "miss", "fourierft", "shira", "randlora"], written=["loha", "vera", "ia3 of outputs", "oft"]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return maker(EXACT | CUT, tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", PROPERTIES.entries)
def test_a_type_keeps_all_properties(name, request, saved):
    PROPERTIES.walk(request, name, saved=saved)


def test_a_pruned_adalora_is_scaled_by_its_first_rank(tmp_path):
    model = peft.get_peft_model(tiny(), EXACT["adalora"].make())
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    masks = {"first": [True, False, True, False], "inner.0": [True] * 4, "last": [False, False, False, True]}
    model.peft_config["default"].rank_pattern = {f"model.{layer}.lora_E.default": mask for layer, mask in masks.items()}
    model.base_model.rankallocator.mask_using_rank_pattern(
        model.base_model.model, {f"{layer}.lora_E.default": mask for layer, mask in masks.items()}
    )
    model.peft_config["default"].rank_pattern = {f"{layer}.lora_E.default": mask for layer, mask in masks.items()}
    model.save_pretrained(tmp_path)
    adapter = Adapter.from_pretrained(tmp_path)
    assert {layer: factors.rank for layer, factors in adapter.layers.items()} == {"first": 2, "inner.0": 4, "last": 1}
    assert gap(model.eval(), adapter) < 1e-5


def test_several_butterfly_factors_are_multiplied_as_the_paper_has_them():
    """BOFT with 3 factors against dense permutations of peft's, whose own forward needs CUDA for more than one."""
    torch.manual_seed(0)
    block, blocks, levels = 4, 8, 3
    size = block * blocks
    helper = BOFTLayer(torch.nn.Linear(size, 3))
    skew = torch.randn(levels, blocks, block, block, dtype=torch.float64)
    turned = torch.linalg.qr(skew)[0]
    whole = torch.eye(size, dtype=torch.float64)
    for level in range(levels):
        order = helper.block_butterfly_perm(size, blocks // 2**level, block // 2, levels - 1)
        p = helper.perm2mat(order).double()
        whole = p @ torch.block_diag(*turned[level]) @ p.T @ whole
    weight = torch.randn(5, size, dtype=torch.float64)
    found = weight
    for level in range(levels):
        found = _rotated(found, turned[level], _order(size, block, level))
    torch.testing.assert_close(found, weight @ whole.T)
