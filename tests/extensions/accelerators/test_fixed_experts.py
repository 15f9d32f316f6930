"""Within batch_invariant a model with fused experts has the same bits in any batch, and no updates of them."""

import pytest
import torch
from expert_families import IDS, WARNINGS, logits, make, save_families

from loraweave import Composer, CompositionError, ScopeError
from loraweave.extensions.accelerators import batch_invariant

pytestmark = WARNINGS


@pytest.fixture(scope="module")
def experts_of_mixtral(tmp_path_factory):
    return save_families(tmp_path_factory)("mixtral")[1]


def test_a_batch_invariant_call_takes_the_eager_experts_of_the_base_and_no_updates_of_them(experts_of_mixtral):
    ours = experts_of_mixtral
    model = make()
    engine = Composer(model, ours)
    with pytest.raises(CompositionError, match=r"experts_implementation='eager'"), batch_invariant(model):
        pass
    model.set_experts_implementation("eager")
    with batch_invariant(model):
        assert torch.equal(
            torch.cat([logits(model, IDS[row : row + 1]) for row in range(3)]),
            logits(model),
        )
    with batch_invariant(model), engine.activate({"a": 1.0}), pytest.raises(ScopeError, match=r"batch_invariant\(\)"):
        logits(model)
