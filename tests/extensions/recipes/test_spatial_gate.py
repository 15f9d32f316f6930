"""A router for each task, which looks at a whole image."""

import pytest
import torch
from torch.nn import functional

from loraweave.errors import ScopeError
from loraweave.extensions.recipes.recipes.mlore import Mlore, SpatialGate
from loraweave.routers.recipes._gate import Call


def made(num_tasks=3, **changes):
    recipe = Mlore(ranks=(1,) * 4, tasks=tuple("abc")[:num_tasks], **{"top_k": 2, **changes})
    gate = SpatialGate(recipe, 5).double().eval()
    generator = torch.Generator().manual_seed(0)
    gate.reset(generator)
    with torch.no_grad():
        for norm in (gate.norm1, gate.norm2):
            norm.weight_KI.normal_(generator=generator)
            norm.bias_KI.normal_(generator=generator)
    return gate


@pytest.fixture
def x_BTC():
    """Seven positions of five channels."""
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


TASKS = torch.tensor([2, 0, 1, 2])


def written_out(gate, x_TC, task):
    """(m, s, p) of one image by the modules of torch."""

    def linear(part, x):
        return functional.linear(x, part.weight_KOI[task], part.bias_KO[task])

    def norm(part, x):
        return functional.layer_norm(x, x.shape[-1:], part.weight_KI[task], part.bias_KI[task])

    each_H = sum(linear(gate.u3, functional.gelu(norm(gate.norm1, linear(gate.u1, x_C)))) for x_C in x_TC) / 7
    mean_H = linear(gate.u2, functional.gelu(norm(gate.norm2, x_TC.sum(dim=0) / 7)))
    out = linear(gate.v, torch.cat([each_H, mean_H]))
    return out[:4], out[4:8], out[8]


def test_an_image_has_the_best_experts_of_its_task_the_generic_one_and_the_tasks_own(x_BTC):
    gate = made()
    w_BTE = gate(x_BTC, Call(task_B=TASKS)).w_BTE
    assert w_BTE.shape == (4, 1, 8)
    for x_TC, w_E, task in zip(x_BTC, w_BTE[:, 0], TASKS.tolist(), strict=True):
        m_E, _, p = written_out(gate, x_TC, task)
        expected_E = torch.zeros(8, dtype=torch.float64)
        # the two lowest are left out, then softmax
        lowest_E = m_E.sort().indices[:2]
        expected_E[:4] = m_E.index_fill(0, lowest_E, -1e10).softmax(dim=0)
        expected_E[4], expected_E[5 + task] = 1, p
        torch.testing.assert_close(w_E, expected_E)


def test_without_renormalising_softmax_is_over_all_and_what_is_left_out_is_lost(x_BTC):
    gate = made(renormalised=False, generic=False)
    w_BTE = gate(x_BTC, Call(task_B=TASKS)).w_BTE
    assert w_BTE.shape == (4, 1, 7)
    m_E, _, _ = written_out(gate, x_BTC[1], 0)
    p_E = m_E.softmax(dim=0)
    torch.testing.assert_close(w_BTE[1, 0, :4], torch.where(p_E >= p_E.sort().values[2], p_E, 0))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_exactly_the_others_of_the_mixed_experts_are_inactive(x_BTC, top_k):
    w_BTE = made(top_k=top_k)(x_BTC, Call(task_B=TASKS)).w_BTE
    assert ((w_BTE[..., :4] == 0).sum(dim=-1) == 4 - top_k).all()
    assert ((w_BTE[..., 5:] != 0).sum(dim=-1) == 1).all()


def test_noise_of_the_learned_size_is_in_training_alone(x_BTC):
    gate, call = made(top_k=4), Call(task_B=TASKS[:1])
    assert torch.equal(gate(x_BTC[:1], call).w_BTE, gate(x_BTC[:1], call).w_BTE)
    m_E, s_E, _ = written_out(gate, x_BTC[0], 2)
    torch.manual_seed(3)
    noise_E = torch.randn(1, 1, 4, dtype=torch.float64)[0, 0]
    torch.manual_seed(3)
    torch.testing.assert_close(gate.train()(x_BTC[:1], call).w_BTE[0, 0, :4], (m_E + s_E * noise_E).softmax(dim=0))


def test_a_row_depends_on_no_other_row(x_BTC):
    gate = made()
    together = gate(x_BTC, Call(task_B=TASKS)).w_BTE
    for number in range(4):
        alone = gate(x_BTC[number : number + 1], Call(task_B=TASKS[number : number + 1])).w_BTE
        torch.testing.assert_close(together[number], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call(), "looks at the task of each row, and this call has none"),
        (Call(task_B=TASKS[:2]), "looks at whole images, 2 in this call, but its layer sees 4 parts"),
        (Call(task_B=TASKS, ids_BT=torch.ones(4, 7)), "for texts, take a recipe with another gate"),
    ],
)
def test_what_is_no_batch_of_whole_images_is_refused(x_BTC, call, message):
    with pytest.raises(ScopeError, match=message):
        made()(x_BTC, call)
