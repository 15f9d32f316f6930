"""What a step of training knows of its tokens."""

import torch

from loraweave.routers.tokens._learned import Step

VALUES_BTE = torch.tensor([[[1.0, 0.0], [3.0, 8.0], [5.0, 4.0]], [[2.0, 2.0], [9.0, 9.0], [4.0, 6.0]]])


def test_the_means_of_rows_leave_padding_out():
    step = Step(torch.tensor([[1, 1, 1], [1, 0, 1]]), torch.tensor([-1, -1]))
    assert step.row_means(VALUES_BTE).tolist() == [[3, 4], [3, 4]]


def test_the_means_of_rows_of_tokens_that_are_not_known_are_over_all():
    step = Step(torch.ones(2, 5), torch.tensor([-1, -1]))
    assert step.row_means(VALUES_BTE).tolist() == [[3, 4], [5, VALUES_BTE[1, :, 1].mean()]]
    assert step.row_means(VALUES_BTE[:, :1]).tolist() == [[1, 0], [2, 2]]
