"""Gates whose weights hold for a whole row: by its prompt, by its task, or the same for all rows.

What a gate decides while a row's prompt runs stays in `Call.kept`, so that the tokens that follow get the same weights. Base
classes of recipes with an expert for each task, or with experts that do not learn, stand below the gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from loraweave import LayerMismatch, ScopeError
from loraweave.extend.recipes import Call, ExpertShape, Gate, Recipe, Site, Weighing, draw_linear
from loraweave.extend.routing import best_of, current_prompts, top_k_softmax

# in Call.kept: True once every row is known to have a prompt
_HAVE_PROMPTS = "every row has a prompt"


class RowGate(Gate):
    """A gate with w = softmax(r mean(x)), with r_EI, x the site's input at the real tokens of a row's prompt.

    A row's weights also hold for the tokens that follow its prompt. With `padding` the mean includes the prompt's padding. A
    subclass may have other `weights` of the scores r mean(x).
    """

    padding = False

    def __init__(self, num_inputs: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw r_EI uniformly between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        draw_linear(self.r_EI, generator)

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        """Return w_B1E: by default the softmax of the scores, one set of weights for each row."""
        return scores_B1E.softmax(dim=-1)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Return the weights by the rows' prompts. Raises ScopeError where the site does not see the call's prompts."""
        # a site that runs twice in a pass sees other inputs the second time
        place = (self, call.run_of(self))
        # in a backward pass, layers run again must compute again, not take kept weights
        if place in call.kept and torch._C._current_graph_task_id() == -1:
            return of_rows(call.kept[place], len(x_BTI))
        self._require_prompts(x_BTI, call)
        mean_BI = prompt_mean(x_BTI, call, padding=self.padding)
        scores_B1E = (mean_BI.to(self.r_EI.dtype) @ self.r_EI.T)[:, None]
        weighing = Weighing(self.weights(scores_B1E, call), scores_B1E)
        call.kept[place] = weighing
        return weighing

    def _require_prompts(self, x_BTI: Tensor, call: Call) -> None:
        if call.two_sequences:
            raise ScopeError(
                "a gate that each site has for its rows looks at one sequence, and this model has an encoder and a decoder, "
                "whose tokens differ: take a recipe with one gate for the whole model, or with a gate for each token"
            )
        require_beginning(call)
        tokens = next((values.shape[:2] for values in (call.prompt_BT, call.ids_BT) if values is not None), x_BTI.shape[:2])
        known = current_prompts()
        num_tokens = tokens[1] if known is None else known.mask_BT.shape[1]
        num_rows = tokens[0] if call.num_rows is None else call.num_rows
        if x_BTI.shape[:2] != tokens or x_BTI.shape[1] < num_tokens or len(x_BTI) != num_rows:
            raise ScopeError(
                f"the gate decides by the prompt of a row, {num_rows} rows of {num_tokens} tokens, but its site sees "
                f"{x_BTI.shape[0]} of {x_BTI.shape[1]}: leave such layers out of target_modules, and generate without "
                "prefill_chunk_size"
            )


class DomainGate(RowGate):
    """A gate with w = 1 for the expert of the highest r mean(x), 0 for others, and the gradient of softmax(r mean(x)); r_EI.

    With `oracle` a row whose domain the call knows has the expert of that place instead.
    """

    def __init__(self, num_inputs: int, num_experts: int, *, oracle: bool = False) -> None:
        super().__init__(num_inputs, num_experts)
        self.oracle = oracle

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        w_B1E = best_of(scores_B1E, scores_B1E.softmax(dim=-1))
        if self.oracle and call.task_B is not None:
            own_B1E = nn.functional.one_hot(call.task_B.clamp(min=0), self.num_experts).to(w_B1E)[:, None]
            w_B1E = torch.where((call.task_B >= 0)[:, None, None], own_B1E, w_B1E)
        return w_B1E


class FactorGate(RowGate):
    """A gate of E factors a and E factors b: w = [softmax(r_a h), softmax(r_b h)] with h = mean(x) over a row's prompt.

    The weights are scores: the form `selected_factors` chooses the best. r_EI has E rows for the factors a, then E for b.
    """

    def __init__(self, num_inputs: int, num_factors: int, *, padding: bool = False) -> None:
        super().__init__(num_inputs, 2 * num_factors)
        self.padding = padding

    def weights(self, scores_B1E: Tensor, call: Call) -> Tensor:
        of_a, of_b = scores_B1E.chunk(2, dim=-1)
        return torch.cat([of_a.softmax(dim=-1), of_b.softmax(dim=-1)], dim=-1)


class EmbeddingGate(Gate):
    """A gate with w = softmax over the `top_k` highest of r mean(x), with r_EH and x the prompt's input embeddings.

    All sites that share it have these weights, which are decided before the model has read the prompt.

    `normal` draws r_EH from the normal distribution instead of uniformly, `padding` counts the prompt's padding in its mean.
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
        """Draw r_EH as torch draws a linear layer, uniformly between -1/sqrt(H) and 1/sqrt(H), or from N(0, 1)."""
        if self.normal:
            self.r_EH.normal_(generator=generator)
        else:
            draw_linear(self.r_EH, generator)

    def begin(self, call: Call) -> None:
        """Store the weights of a call in `call.kept`. Raises ScopeError for a call that continues another call's cache."""
        if self not in call.kept:
            require_beginning(call)
            call.kept[self] = self.of_prompts(call)

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Return the weights decided for the call. Raises ScopeError where no call of the whole model has begun."""
        if self not in call.kept:
            raise ScopeError(
                "the gate decides by the prompts of the whole model's call, and this layer runs outside of one: call the "
                "model with token ids, or generate() from them"
            )
        return of_rows(call.kept[self], len(x_BTI))

    def of_prompts(self, call: Call) -> Weighing:
        """Return the weights for the call's prompts. Raises ScopeError for a call whose tokens are not known."""
        if call.embed is None:
            raise ScopeError(
                "the gate decides by the embeddings of a row's prompt, and this call has no tokens: call the model with "
                "input_ids or inputs_embeds"
            )
        mean_BH = prompt_mean(call.embed(), call, padding=self.padding)
        scores_B1E = (mean_BH.to(self.r_EH.dtype) @ self.r_EH.T)[:, None]
        return Weighing(top_k_softmax(scores_B1E, self.top_k), scores_B1E)


class TaskSwitch(Gate):
    """A gate with w_e = scale_e for the experts of the row's task, and 0 for the others.

    `used` has, for each task and at last for rows without one, E booleans: which experts take part. `scales` has one number
    per expert; with `learned` they are trained.
    """

    static = True
    used_KE: Tensor
    scale_E: Tensor

    def __init__(self, used: Sequence[Sequence[bool]], scales: Sequence[float], *, learned: bool = False) -> None:
        super().__init__(len(scales), most=max(sum(row) for row in used))
        self.register_buffer("used_KE", torch.tensor(used), persistent=False)
        if learned:
            self.scale_E = nn.Parameter(torch.tensor(scales))
        else:
            self.register_buffer("scale_E", torch.tensor(scales), persistent=False)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        # the last one is for rows of no task, whose number is -1
        used_BE = self.used_KE[-1:] if call.task_B is None else self.used_KE[call.task_B]
        return Weighing((used_BE * self.scale_E)[:, None])


class ConstantGate(Gate):
    """A gate with the same w_E for everything, which does not learn."""

    static = True
    w_E: Tensor

    def __init__(self, w_E: Sequence[float]) -> None:
        super().__init__(len(w_E))
        self.given = tuple(w_E)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        w_E = torch.tensor(self.given, dtype=torch.float64)
        return Weighing(
            (w_E if x_BTI is None else w_E.to(x_BTI.device, torch.promote_types(x_BTI.dtype, torch.float32)))[None, None]
        )


def embedding_size(recipe: Recipe, site: Site) -> int:
    """Return the size of the model's input embeddings. Raises LayerMismatch if it has none."""
    if not site.num_features:
        raise LayerMismatch(
            f"the gate of recipe {recipe.name!r} looks at embeddings of tokens, and this model has none: "
            "take a recipe whose gates look at the layers' inputs"
        )
    return site.num_features


def prompt_mean(x_BTI: Tensor, call: Call, *, padding: bool = False) -> Tensor:
    """Return the mean_BI of x over the real tokens of each row's prompt, in fp32 or better; `padding` counts padding, too.

    Raises ScopeError for a row that has no such token.
    """
    x_BTI = x_BTI.to(torch.promote_types(x_BTI.dtype, torch.float32))
    counts_BT = call.prompt_BT
    if counts_BT is None:
        return x_BTI.mean(dim=1)
    # one check of the values is enough for all sites
    if _HAVE_PROMPTS not in call.kept:
        if not (has_B := counts_BT.any(dim=1)).all():
            row = has_B.tolist().index(False)
            raise ScopeError(
                f"the gate decides by the prompt of a row, and row {row} has none, as all its tokens have labels: set the "
                "labels of the prompt's tokens to -100"
            )
        call.kept[_HAVE_PROMPTS] = True
    if padding and call.real_BT is not None:
        counts_BT = counts_BT | ~call.real_BT
    counts_BT1 = counts_BT[..., None]
    # padding may hold NaN
    return torch.where(counts_BT1, x_BTI, 0).sum(dim=1) / counts_BT1.sum(dim=1)


def require_beginning(call: Call) -> None:
    """Raise ScopeError for a call that continues from a cache, so that its rows' prompts are not among its tokens."""
    if call.follows:
        raise ScopeError(
            "the gate decides by the prompt of a row, which this call with a cache lacks: use the model's own generate(), "
            "which keeps what was decided, or call the model with the whole rows"
        )


def of_rows(weighing: Weighing, num_rows: int) -> Weighing:
    """Return weights for `num_rows` rows, each row's repeated for its consecutive copies, such as a prompt's beams."""
    w_BTE, scores_BTE, _ = weighing
    copies = num_rows // len(w_BTE)
    if copies <= 1:
        return weighing
    scores_BTE = None if scores_BTE is None else scores_BTE.repeat_interleave(copies, dim=0)
    return Weighing(w_BTE.repeat_interleave(copies, dim=0), scores_BTE)


@dataclass(frozen=True, kw_only=True)
class TaskRecipe(Recipe):
    """A base class of recipes with a LoRA for each task: y = y0 + alpha / rank * B_e A_e dropout(x), e the row's task."""

    needs_tasks = True

    def shape(self, site: Site) -> ExpertShape:
        # until fit() knows the tasks there is one expert
        return ExpertShape((self.rank,) * max(len(self.tasks), 1))

    def gate(self, site: Site, num_experts: int) -> TaskSwitch:
        one_hot = [[expert == task for expert in range(num_experts)] for task in range(num_experts)]
        return TaskSwitch([*one_hot, [False] * num_experts], [1.0] * num_experts)


@dataclass(frozen=True, kw_only=True)
class Frozen(Recipe):
    """A base class of recipes with experts that do not learn."""

    form: ClassVar[str] = "partly_frozen"

    @property
    def frozen(self) -> tuple[int, ...]:
        """The indices of the experts that do not learn."""
        raise NotImplementedError
