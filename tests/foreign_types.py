"""Types of PEFT that are read into factors: one config a case, and what must hold of each, whatever format reads it."""

from dataclasses import dataclass
from functools import partial

import peft
import pytest
import torch
from peft_models import FREE, TARGETS, gap, odd, save, tiny
from properties import Properties

from loraweave.hub.adapter import Adapter
from loraweave.hub.conversion import to_lora
from loraweave.lowrank import algebra

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


def maker(cases, new_folder):
    """(name, odd sizes) -> (the base maker, folder, what peft makes of the folder), made on first use."""
    made = {}

    def make(name, odd_sizes):
        if (name, odd_sizes) not in made:
            base, folder = odd if odd_sizes else tiny, new_folder("adapter")
            made[name, odd_sizes] = base, folder, save(cases[name].make(), folder, base())
        return made[name, odd_sizes]

    return make


def properties_of(exact, cut, *, shapes, written):
    """What must hold of the cases; those of `shapes` need no weights, and those of `written` are LoRAs that PEFT loads."""
    cases = exact | cut
    properties = Properties(cases)

    @properties.add(odd_sizes=[False])
    @properties.add(of=[name for name, case in cases.items() if case.odd], odd_sizes=[True])
    def the_factors_compute_what_peft_computes(saved, name, odd_sizes):
        base, folder, model = saved(name, odd_sizes)
        adapter = Adapter.from_pretrained(folder, model=base() if cases[name].base else None, max_error=1e-6)
        assert gap(model, adapter, base()) < 1e-5

    @properties.add(of=exact)
    def an_exact_type_keeps_its_rank_and_loses_nothing(saved, name):
        base, folder, _ = saved(name, False)
        adapter = Adapter.from_pretrained(folder, model=base(), max_error=0.5)
        notes = adapter.card["conversion"]
        assert {note["relative_error"] for note in notes.values()} == {0.0}
        assert exact[name].rank in (None, notes["inner.0"]["rank"])

    @properties.add(of=cut)
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

    @properties.add(of=[name for name, case in cases.items() if not case.base])
    def a_type_that_needs_no_base_reads_the_same_with_it(saved, name):
        base, folder, _ = saved(name, False)
        assert Adapter.from_pretrained(folder).hash == Adapter.from_pretrained(folder, model=base()).hash

    @properties.add(of=[name for name, case in cases.items() if case.base])
    def a_type_that_needs_the_base_says_so(saved, name):
        _, folder, _ = saved(name, False)
        with pytest.raises(ValueError, match=r"model=model"):
            Adapter.from_pretrained(folder)

    @properties.add(of=shapes)
    def shapes_alone_are_enough_for_types_that_do_not_read_the_weights(saved, name):
        base, folder, _ = saved(name, False)
        shapes, whole = (Adapter.from_pretrained(folder, model=model) for model in (base().to("meta"), base()))
        assert shapes.hash == whole.hash

    @properties.add(of=written)
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

    return properties
