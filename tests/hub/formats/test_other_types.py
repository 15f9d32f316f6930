"""PEFT's other adapter types: the factors compute what the installed peft computes, whatever the layers' sizes."""

from dataclasses import dataclass
from functools import partial

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from peft_models import FREE, TARGETS, gap, odd, save, tiny
from properties import Properties

from loraweave.hub.adapter import Adapter
from loraweave.hub.conversion import to_lora
from loraweave.hub.formats.boft import _order, _rotated
from loraweave.lowrank import algebra

# peft warns about sizes it adjusts and about what it cannot look up for models that exist nowhere
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ANY = {"target_modules": TARGETS}


@dataclass(frozen=True)
class Case:
    """A config; whether sizes may be odd, whether the base model is needed, and the rank of "inner.0" where it is exact."""

    make: partial
    odd: bool
    base: bool
    rank: int | None


def free(kind, rank=None, *, odd=True, base=True, **options):
    """A config of a type that begins with random values."""
    return Case(partial(kind, **FREE, **options), odd, base, rank)


def other(kind, rank=None, *, odd=True, base=True, **options):
    return Case(partial(kind, **ANY, **options), odd, base, rank)


BLOCKS = BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["0"], nblocks=2, match_strict=False)
BANK = {"r": 3, "num_vectors": 7, "vector_length": 4, "topk": 3}
PATTERNS = {"rank_pattern": {"inner.0": 3}, "alpha_pattern": {"^first": 5, "last": 2}}
EXACT = {
    "vera": free(peft.VeraConfig, 3, r=3),
    "pvera": free(peft.PveraConfig, 4, r=4),
    "adalora": other(peft.AdaLoraConfig, 4, base=False, init_r=4, target_r=2, total_step=9, lora_alpha=7),
    "loha": free(peft.LoHaConfig, 4, base=False, r=2, alpha=3),
    "loha with patterns": free(peft.LoHaConfig, 9, base=False, r=2, alpha=3, **PATTERNS),
    "lokr": free(peft.LoKrConfig, 8, odd=False, base=False, r=2, alpha=3),
    "lokr in four factors": free(peft.LoKrConfig, 1, odd=False, base=False, r=1, alpha=3, decompose_both=True),
    "lokr with patterns": free(
        peft.LoKrConfig, 4, odd=False, base=False, r=2, alpha=3, alpha_pattern={"inner.0": 1}, rank_pattern={"inner.0": 1}
    ),
    "lokr of primes": free(peft.LoKrConfig, base=False, r=2, alpha=3),
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
    "ia3 of outputs": other(peft.IA3Config, 0, feedforward_modules=[], init_ia3_weights=False),
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

VECTORS = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
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

CASES = EXACT | CUT
PROPERTIES = Properties(CASES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(name, odd sizes) -> (the base maker, folder, what peft makes of the folder), made on first use."""
    made = {}

    def make(name, odd_sizes):
        if (name, odd_sizes) not in made:
            base, folder = odd if odd_sizes else tiny, tmp_path_factory.mktemp("adapter")
            made[name, odd_sizes] = base, folder, save(CASES[name].make(), folder, base())
        return made[name, odd_sizes]

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_type_keeps_all_properties(name, request, saved):
    PROPERTIES.walk(request, name, saved=saved)


@PROPERTIES.add(odd_sizes=[False])
@PROPERTIES.add(of=[name for name, case in CASES.items() if case.odd], odd_sizes=[True])
def the_factors_compute_what_peft_computes(saved, name, odd_sizes):
    base, folder, model = saved(name, odd_sizes)
    adapter = Adapter.from_pretrained(folder, model=base() if CASES[name].base else None, max_error=1e-6)
    assert gap(model, adapter, base()) < 1e-5


@PROPERTIES.add(of=EXACT)
def an_exact_type_keeps_its_rank_and_loses_nothing(saved, name):
    base, folder, _ = saved(name, False)
    adapter = Adapter.from_pretrained(folder, model=base(), max_error=0.5)
    notes = adapter.card["conversion"]
    assert {note["relative_error"] for note in notes.values()} == {0.0}
    assert EXACT[name].rank in (None, notes["inner.0"]["rank"])


@PROPERTIES.add(of=CUT)
def what_is_cut_loses_what_the_card_says_and_no_more_than_the_bound(saved, name):
    base, folder, _ = saved(name, False)
    whole, less = (Adapter.from_pretrained(folder, model=base(), max_error=error) for error in (0.0, 0.3))
    for layer, note in less.card["conversion"].items():
        wanted = algebra.delta(whole.layers[layer]).double()
        lost = float((algebra.delta(less.layers[layer]).double() - wanted).norm() / wanted.norm())
        assert lost == pytest.approx(note["relative_error"], abs=1e-5)
        assert lost <= 0.3
        sigma = torch.linalg.svdvals(wanted).square()
        assert note["rank"] == 1 or float((sigma[note["rank"] - 1 :].sum() / sigma.sum()).sqrt()) > 0.3


@PROPERTIES.add(of=[name for name, case in CASES.items() if not case.base])
def a_type_that_needs_no_base_reads_the_same_with_it(saved, name):
    base, folder, _ = saved(name, False)
    assert Adapter.from_pretrained(folder).hash == Adapter.from_pretrained(folder, model=base()).hash


@PROPERTIES.add(of=[name for name, case in CASES.items() if case.base])
def a_type_that_needs_the_base_says_so(saved, name):
    _, folder, _ = saved(name, False)
    with pytest.raises(ValueError, match=r"model=model"):
        Adapter.from_pretrained(folder)


@PROPERTIES.add(of=["vera", "miss", "fourierft", "shira", "randlora"])
def shapes_alone_are_enough_for_types_that_do_not_read_the_weights(saved, name):
    base, folder, _ = saved(name, False)
    shapes, whole = (Adapter.from_pretrained(folder, model=model) for model in (base().to("meta"), base()))
    assert shapes.hash == whole.hash


@PROPERTIES.add(of=["loha", "oft", "vera", "ia3 of outputs"])
def what_was_read_is_written_as_a_lora_that_peft_loads(saved, name, tmp_path):
    base, folder, model = saved(name, False)
    adapter = Adapter.from_pretrained(folder, model=base(), max_error=1e-6)
    if name == "ia3 of outputs":
        adapter = to_lora(adapter, base(), max_error=1e-6)
    adapter.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)


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
