"""Memory that was given back is used again, and no more of it is kept than asked for."""

import torch

from loraweave.composer.live.row_weights import Workspace

CPU = torch.device("cpu")


def test_what_was_given_back_is_taken_again_by_its_like_only():
    workspace = Workspace(1000)
    first = workspace.take(10, torch.float32, CPU)
    workspace.give([first])
    assert workspace.take(10, torch.float64, CPU).data_ptr() != first.data_ptr()
    assert workspace.take(11, torch.float32, CPU).data_ptr() != first.data_ptr()
    assert workspace.take(10, torch.float32, CPU) is first
    assert workspace.take(10, torch.float32, CPU) is not first
    assert workspace.num_bytes == 0


def test_the_kinds_longest_unused_go_first():
    workspace = Workspace(100)
    old, new = (workspace.take(size, torch.float32, CPU) for size in (15, 20))
    workspace.give([old])
    workspace.give([new])
    assert workspace.num_bytes == 80
    assert workspace.take(15, torch.float32, CPU) is not old
    assert workspace.take(20, torch.float32, CPU) is new
