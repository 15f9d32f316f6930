"""Gates that decide once for a whole row: by its prompt, or by its task."""

import pytest
import torch

from loraweave.errors import ScopeError
from loraweave.extensions.recipes.row_gates import RowGate, TaskSwitch, of_rows, prompt_mean
from loraweave.routers.recipes._gate import Call, Weighing

X_BTI = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
REAL_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
PROMPT_BT = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()


@pytest.fixture
def gate():
    made = RowGate(3, 4)
    made.reset(torch.Generator().manual_seed(0))
    return made


def test_the_mean_is_of_the_prompt_s_tokens_alone():
    mean_BI = prompt_mean(X_BTI, Call(REAL_BT, PROMPT_BT))
    torch.testing.assert_close(mean_BI, torch.stack([X_BTI[0, :2].mean(dim=0), X_BTI[1, 2:4].mean(dim=0)]))


def test_what_padding_holds_does_not_count_whatever_it_is():
    x_BTI = X_BTI.clone()
    x_BTI[1, :2] = float("nan")
    assert torch.equal(prompt_mean(x_BTI, Call(REAL_BT, PROMPT_BT)), prompt_mean(X_BTI, Call(REAL_BT, PROMPT_BT)))


def test_padding_counts_where_it_is_asked_for():
    mean_BI = prompt_mean(X_BTI, Call(REAL_BT, PROMPT_BT), padding=True)
    torch.testing.assert_close(mean_BI, torch.stack([X_BTI[0, :2].mean(dim=0), X_BTI[1, :4].mean(dim=0)]))


def test_without_a_mask_all_tokens_count():
    torch.testing.assert_close(prompt_mean(X_BTI, Call()), X_BTI.mean(dim=1))


def test_half_precision_is_summed_in_fp32():
    x_BTI = torch.full((1, 4096, 1), 1.0 + 2**-8, dtype=torch.bfloat16)
    assert prompt_mean(x_BTI, Call()).dtype == torch.float32
    torch.testing.assert_close(prompt_mean(x_BTI, Call(None, torch.ones(1, 4096).bool())), x_BTI[:, 0].float())


def test_what_was_decided_holds_for_the_calls_that_follow(gate):
    kept = {}
    first = gate(X_BTI, Call(REAL_BT, PROMPT_BT, kept=kept))
    later = gate(torch.ones(2, 1, 3), Call(follows=True, kept=kept))
    assert torch.equal(later.w_BTE, first.w_BTE)
    # two beams of each row
    beams = gate(torch.ones(4, 1, 3), Call(follows=True, kept=kept))
    assert torch.equal(beams.w_BTE, first.w_BTE[[0, 0, 1, 1]])
    assert torch.equal(beams.scores_BTE, first.scores_BTE[[0, 0, 1, 1]])


def test_a_call_that_follows_one_without_a_decision_is_refused(gate):
    with pytest.raises(ScopeError, match="with a cache lacks"):
        gate(torch.ones(2, 1, 3), Call(follows=True))


@pytest.mark.parametrize("shape", [(2, 4, 3), (4, 5, 3), (2, 1, 3)])
def test_a_site_with_other_rows_or_tokens_than_the_call_is_refused(gate, shape):
    with pytest.raises(ScopeError, match=f"2 rows of 5 tokens, but its site sees {shape[0]} of {shape[1]}"):
        gate(torch.ones(shape), Call(REAL_BT, PROMPT_BT, num_rows=2))


def test_windows_of_images_are_no_rows(gate):
    with pytest.raises(ScopeError, match="2 rows of 5 tokens, but its site sees 8 of 5"):
        gate(torch.ones(8, 5, 3), Call(num_rows=2))


def test_a_decision_without_scores_has_none_for_beams():
    assert of_rows(Weighing(torch.ones(1, 1, 2)), 3).scores_BTE is None


USED = [[False, True, False], [True, False, True], [True, False, False]]


def test_a_row_has_the_experts_of_its_task_and_a_row_without_one_the_last():
    gate = TaskSwitch(USED, [0.5, 2.0, 3.0])
    w_BTE = gate(None, Call(task_B=torch.tensor([1, -1, 0, 1]))).w_BTE
    expected = torch.tensor([[0.5, 0.0, 3.0], [0.5, 0.0, 0.0], [0.0, 2.0, 0.0], [0.5, 0.0, 3.0]])
    assert torch.equal(w_BTE, expected[:, None])
    assert gate.most == 2


def test_a_call_without_tasks_is_of_rows_without_one():
    assert torch.equal(TaskSwitch(USED, [0.5, 2.0, 3.0])(None, Call()).w_BTE, torch.tensor([[[0.5, 0.0, 0.0]]]))


def test_a_scale_learns_from_the_rows_that_use_it_alone():
    gate = TaskSwitch(USED, [0.5, 2.0, 3.0], learned=True)
    gate(None, Call(task_B=torch.tensor([1, -1]))).w_BTE.sum().backward()
    assert torch.equal(gate.scale_E.grad, torch.tensor([2.0, 0.0, 1.0]))
    assert not list(TaskSwitch(USED, [0.5, 2.0, 3.0]).parameters())
