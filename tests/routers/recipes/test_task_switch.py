"""Each task's own experts, at their scales."""

import torch

from loraweave.routers.recipes._gate import Call
from loraweave.routers.recipes._row_gates import TaskSwitch

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
