"""PEFT's other adapter types: the factors compute what the installed peft computes, whatever the layers' sizes."""

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.lora.config import BdLoraConfig, KasaConfig

from loraweave.hub.adapter import Adapter
from loraweave.hub.conversion import to_lora
from loraweave.hub.formats.boft import _order, _rotated
from loraweave.lowrank import algebra

# peft warns about sizes it adjusts and about what it cannot look up for models that exist nowhere
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TARGETS = ["first", "inner.0", "last"]
FREE = {"target_modules": TARGETS, "init_weights": False}

# name: (config, whether sizes may be odd, whether the base model is needed, rank of the layer "inner.0" where it is exact)
EXACT = {
    "vera": (lambda: peft.VeraConfig(r=3, **FREE), True, True, 3),
    "pvera": (lambda: peft.PveraConfig(r=4, **FREE), True, True, 4),
    "adalora": (
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, lora_alpha=7, target_modules=TARGETS),
        True,
        False,
        4,
    ),
    "loha": (lambda: peft.LoHaConfig(r=2, alpha=3, **FREE), True, False, 4),
    "loha with patterns": (
        lambda: peft.LoHaConfig(r=2, alpha=3, rank_pattern={"inner.0": 3}, alpha_pattern={"^first": 5, "last": 2}, **FREE),
        True,
        False,
        9,
    ),
    "lokr": (lambda: peft.LoKrConfig(r=2, alpha=3, **FREE), False, False, 8),
    "lokr in four factors": (lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, **FREE), False, False, 1),
    "lokr with patterns": (
        lambda: peft.LoKrConfig(r=2, alpha=3, alpha_pattern={"inner.0": 1}, rank_pattern={"inner.0": 1}, **FREE),
        False,
        False,
        4,
    ),
    "lokr of primes": (lambda: peft.LoKrConfig(r=2, alpha=3, **FREE), True, False, None),
    "vblora": (
        lambda: peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=4, topk=3, target_modules=TARGETS),
        False,
        False,
        3,
    ),
    "vblora, top weights only": (
        lambda: peft.VBLoRAConfig(
            r=3, num_vectors=7, vector_length=4, topk=3, target_modules=TARGETS, save_only_topk_weights=True
        ),
        False,
        False,
        3,
    ),
    "unilora": (lambda: peft.UniLoraConfig(r=2, theta_d_length=40, save_indices=True, **FREE), True, False, 2),
    "tinylora": (lambda: peft.TinyLoraConfig(r=2, u=5, **FREE), True, True, 2),
    "tinylora, one vector": (lambda: peft.TinyLoraConfig(r=2, u=5, weight_tying=1.0, **FREE), True, False, 2),
    "tinylora, two vectors": (lambda: peft.TinyLoraConfig(r=2, u=5, weight_tying=0.4, **FREE), True, True, 2),
    "delora": (lambda: peft.DeloraConfig(r=3, **FREE), True, False, 3),
    "gralora": (lambda: peft.GraloraConfig(r=4, gralora_k=2, alpha=3, **FREE), False, False, 8),
    "gralora, hybrid": (lambda: peft.GraloraConfig(r=4, gralora_k=4, hybrid_r=3, alpha=3, **FREE), False, False, 16),
    "miss": (lambda: peft.MissConfig(r=5, **FREE), True, True, 5),
    "miss, mini": (lambda: peft.MissConfig(r=5, mini_r=4, target_modules=TARGETS, init_weights="mini"), False, True, 5),
    "beft": (lambda: peft.BeftConfig(**FREE), True, True, 0),
    "ia3 of outputs": (
        lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[], init_ia3_weights=False),
        True,
        True,
        0,
    ),
    "hra": (lambda: peft.HRAConfig(r=3, **FREE), True, True, 3),
    "hra, orthogonal": (lambda: peft.HRAConfig(r=3, apply_GS=True, **FREE), True, True, 3),
    "deft": (lambda: peft.DeftConfig(r=3, **FREE), True, True, 3),
    "deft by qr": (lambda: peft.DeftConfig(r=3, decomposition_method="qr", alpha=5, **FREE), True, True, 3),
    "deft, para": (lambda: peft.DeftConfig(r=3, para=True, **FREE), True, True, 3),
    "peanut": (lambda: peft.PeanutConfig(r=3, depth=2, scaling=0.7, **FREE), True, True, 3),
    "peanut, silu": (lambda: peft.PeanutConfig(r=3, act_fn="silu", **FREE), True, True, 3),
    "bdlora": (
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=7,
            target_modules=TARGETS,
            init_lora_weights=False,
            use_bdlora=BdLoraConfig(target_modules_bd_a=["first"], target_modules_bd_b=["0"], nblocks=2, match_strict=False),
        ),
        False,
        False,
        4,
    ),
    "kasa": (
        lambda: peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=TARGETS, kasa_config=KasaConfig()),
        True,
        True,
        6,
    ),
    "osf": (lambda: peft.OSFConfig(effective_rank=7, **FREE), True, True, None),
}

CUT = {
    "loha of high rank": (lambda: peft.LoHaConfig(r=5, alpha=3, **FREE), True, False),
    "ia3 of inputs": (
        lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS, init_ia3_weights=False),
        True,
        True,
    ),
    "fourierft": (
        lambda: peft.FourierFTConfig(n_frequency=20, n_frequency_pattern={"0": 12}, target_modules=TARGETS),
        True,
        True,
    ),
    "waveft": (lambda: peft.WaveFTConfig(n_frequency=20, **FREE), True, True),
    "waveft without a transform": (lambda: peft.WaveFTConfig(n_frequency=20, use_idwt=False, **FREE), True, True),
    "c3a": (lambda: peft.C3AConfig(block_size=4, target_modules=TARGETS, init_weights="gaussian"), False, False),
    "shira": (lambda: peft.ShiraConfig(r=1, **FREE), True, True),
    "supertuning": (lambda: peft.SupertuningConfig(sparsity=0.6, **FREE), True, True),
    "supertuning with a lora": (lambda: peft.SupertuningConfig(sparsity=0.6, r=2, lora_alpha=3, **FREE), True, True),
    "randlora": (lambda: peft.RandLoraConfig(r=3, **FREE), True, True),
    "hira": (lambda: peft.HiraConfig(r=2, **FREE), True, True),
    "oft": (lambda: peft.OFTConfig(r=0, oft_block_size=4, **FREE), False, True),
    "oft by blocks": (lambda: peft.OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, **FREE), False, True),
    "oft, 2 terms": (lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=2, **FREE), False, True),
    "oft, 3 terms": (lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=3, **FREE), False, True),
    "oft, 4 terms": (lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=4, **FREE), False, True),
    "oft, 7 terms": (lambda: peft.OFTConfig(r=0, oft_block_size=4, num_cayley_neumann_terms=7, **FREE), False, True),
    "oft, shared": (lambda: peft.OFTConfig(r=0, oft_block_size=4, block_share=True, **FREE), False, True),
    "oft, constrained": (lambda: peft.OFTConfig(r=0, oft_block_size=4, coft=True, eps=0.3, **FREE), False, True),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=4, **FREE), False, True),
    "road 1": (lambda: peft.RoadConfig(variant="road_1", group_size=4, **FREE), False, True),
    "road 2": (lambda: peft.RoadConfig(variant="road_2", group_size=8, **FREE), False, True),
    "road 4": (lambda: peft.RoadConfig(variant="road_4", group_size=2, **FREE), False, True),
    "miss, bat": (lambda: peft.MissConfig(r=4, target_modules=TARGETS, init_weights="bat"), False, True),
    "glora": (lambda: peft.GloraConfig(r=2, **FREE), True, True),
    "glora of vectors": (
        lambda: peft.GloraConfig(r=2, config_A_B="vector", config_C="vector", config_D_E="vector", **FREE),
        True,
        True,
    ),
    "glora of numbers": (lambda: peft.GloraConfig(r=2, config_A_B="constant", config_C="none", **FREE), True, True),
}

CASES = {**{name: case[:3] for name, case in EXACT.items()}, **CUT}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, foreign):
    """(name, odd sizes) -> (the base maker, folder, what peft makes of the folder), made on first use."""
    made = {}

    def make(name, odd_sizes):
        if (name, odd_sizes) not in made:
            base, folder = foreign.odd if odd_sizes else foreign.tiny, tmp_path_factory.mktemp("adapter")
            made[name, odd_sizes] = base, folder, foreign.save(CASES[name][0](), folder, base())
        return made[name, odd_sizes]

    return make


def sizes(case):
    return [False, True] if case[1] else [False]


@pytest.mark.parametrize(("name", "odd_sizes"), [(name, size) for name, case in CASES.items() for size in sizes(case)])
def test_the_factors_compute_what_peft_computes(saved, foreign, name, odd_sizes):
    base, folder, model = saved(name, odd_sizes)
    adapter = Adapter.from_pretrained(folder, model=base() if CASES[name][2] else None, max_error=1e-6)
    assert foreign.gap(model, adapter, base()) < 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_type_keeps_its_rank_and_loses_nothing(saved, name):
    base, folder, _ = saved(name, False)
    adapter = Adapter.from_pretrained(folder, model=base(), max_error=0.5)
    notes = adapter.card["conversion"]
    assert {note["relative_error"] for note in notes.values()} == {0.0}
    assert EXACT[name][3] in (None, notes["inner.0"]["rank"])


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_loses_what_the_card_says_and_no_more_than_the_bound(saved, name):
    base, folder, _ = saved(name, False)
    whole, less = (Adapter.from_pretrained(folder, model=base(), max_error=error) for error in (0.0, 0.3))
    for layer, note in less.card["conversion"].items():
        wanted = algebra.delta(whole.layers[layer]).double()
        lost = float((algebra.delta(less.layers[layer]).double() - wanted).norm() / wanted.norm())
        assert lost == pytest.approx(note["relative_error"], abs=1e-5)
        assert lost <= 0.3
        sigma = torch.linalg.svdvals(wanted).square()
        assert note["rank"] == 1 or float((sigma[note["rank"] - 1 :].sum() / sigma.sum()).sqrt()) > 0.3


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case[2]])
def test_a_type_that_needs_no_base_reads_the_same_with_it(saved, name):
    base, folder, _ = saved(name, False)
    assert Adapter.from_pretrained(folder).hash == Adapter.from_pretrained(folder, model=base()).hash


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2]])
def test_a_type_that_needs_the_base_says_so(saved, name):
    _, folder, _ = saved(name, False)
    with pytest.raises(ValueError, match=r"model=model"):
        Adapter.from_pretrained(folder)


@pytest.mark.parametrize("name", ["vera", "miss", "fourierft", "shira", "randlora"])
def test_shapes_alone_are_enough_for_types_that_do_not_read_the_weights(saved, name):
    base, folder, _ = saved(name, False)
    assert (
        Adapter.from_pretrained(folder, model=base().to("meta")).hash == Adapter.from_pretrained(folder, model=base()).hash
    )


@pytest.mark.parametrize("name", ["loha", "oft", "vera", "ia3 of outputs"])
def test_what_was_read_is_written_as_a_lora_that_peft_loads(saved, name, tmp_path):
    base, folder, model = saved(name, False)
    adapter = Adapter.from_pretrained(folder, model=base(), max_error=1e-6)
    if name == "ia3 of outputs":
        adapter = to_lora(adapter, base(), max_error=1e-6)
    adapter.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    x = torch.randn(5, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_pruned_adalora_is_scaled_by_its_first_rank(tmp_path, foreign):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, lora_alpha=7, target_modules=TARGETS)
    model = peft.get_peft_model(foreign.tiny(), config)
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
    assert foreign.gap(model.eval(), adapter) < 1e-5


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
