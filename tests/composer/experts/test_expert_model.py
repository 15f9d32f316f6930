"""What every gate can rely on."""

import torch

import loraweave as lw


def test_gates_weigh_in_their_own_precision_below_autocast(make_model):
    with lw.experts("mola", make_model("llama"), num_experts=(3, 4)) as made:
        seen = []
        for gate in made.gates.values():
            gate.register_forward_hook(lambda gate, args, weighing: seen.append((gate, args, weighing.w_BTE)))
        with torch.autocast("cpu", torch.bfloat16):
            made(input_ids=torch.tensor([[3, 9, 27, 20]]))
        assert len(seen) == 14
        for gate, (x_BTI, call), w_BTE in seen:
            assert w_BTE.dtype == torch.float32
            assert torch.equal(gate.forward(x_BTI, call).w_BTE, w_BTE)
