"""A gate for the whole model that looks at the embeddings of a row's prompt."""

from __future__ import annotations

import torch
from torch import nn

from loraweave.errors import ScopeError
from loraweave.routers.gates.call import Call
from loraweave.routers.gates.gate import Weighing
from loraweave.routers.gates.row_gate import ModelGate, prompt_mean
from loraweave.routers.routing.choosing import top_k_softmax


class EmbeddingGate(ModelGate):
    """w = softmax over the `top_k` highest of r mean(x), x the input embeddings of the prompt's tokens, with r_EH.

    `normal` draws r_EH from the normal distribution instead of uniformly, and `padding` counts the prompt's padding in its
    mean.
    """

    def __init__(
        self, num_features: int, num_experts: int, *, top_k: int, normal: bool = False, padding: bool = False
    ) -> None:
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.normal = normal
        self.padding = padding
        self.r_EH = nn.Parameter(torch.empty(num_experts, num_features))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """r_EH uniform between -1/sqrt(H) and 1/sqrt(H), as torch draws a linear layer; or normal."""
        bound = self.r_EH.shape[1] ** -0.5
        if self.normal:
            self.r_EH.normal_(generator=generator)
        else:
            self.r_EH.uniform_(-bound, bound, generator=generator)

    def of_prompts(self, call: Call) -> Weighing:
        """Raises ScopeError for a call whose tokens are not known."""
        if call.embed is None:
            raise ScopeError(
                "the gate decides by the embeddings of a row's prompt, and this call has no tokens: call the model with "
                "input_ids or inputs_embeds"
            )
        mean_BH = prompt_mean(call.embed(), call, padding=self.padding)
        scores_B1E = (mean_BH.to(self.r_EH.dtype) @ self.r_EH.T)[:, None]
        return Weighing(top_k_softmax(scores_B1E, self.top_k), scores_B1E)
