"""A cache keeps what each token's own weights made, also where the weights change half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import Make
from torch import Tensor, nn
from torch.nn.functional import linear

from loraweave.composer.composer import Composer
from loraweave.hub.adapter import Adapter

EARLY: list[Any] = [{"a": 1.0}, None, {"b": 0.5, "c": -0.5}]
LATE: list[Any] = [{"c": 1.0}, {"b": -1.0}, None]
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(5))


@contextmanager
def by_token(model: nn.Module, adapters: list[Adapter], rows_T: list[list[Any]]) -> Iterator[None]:
    """Token scope, densely: token t of row b goes through W + sum of w_e b_e a_e, with the weights w of rows_T[t][b]."""
    by_name = {adapter.name: adapter for adapter in adapters}

    def dense(name: str, module: nn.Module) -> Callable[..., Tensor]:
        conv1d = type(module).__name__ == "Conv1D"
        base_OI = module.weight.T if conv1d else module.weight
        weights_TBOI = torch.stack([torch.stack([_updated(base_OI, by_name, row, name) for row in rows]) for rows in rows_T])

        def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x_BTI = args[0]
            weights = weights_TBOI[: x_BTI.shape[1]]
            columns = [
                torch.stack([linear(x_I, weight_OI) for x_I, weight_OI in zip(x_BI, weights_BOI, strict=True)])
                for x_BI, weights_BOI in zip(x_BTI.unbind(1), weights, strict=True)
            ]
            found = torch.stack(columns, dim=1)
            return found if module.bias is None else found + module.bias

        return replace

    layers = {layer for adapter in adapters for layer in adapter.layers}
    handles = [model.get_submodule(n).register_forward_hook(dense(n, model.get_submodule(n))) for n in sorted(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _updated(base_OI: Tensor, adapters: dict[str, Adapter], row: Any, layer: str) -> Tensor:
    updated_OI = base_OI.detach().clone()
    for name, weight in (row or {}).items():
        if layer in adapters[name].layers:
            factors = adapters[name].layers[layer]
            updated_OI += weight * (factors.b_OR.double() @ factors.a_RI.double())
    return updated_OI


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_cache_made_under_other_weights_gives_the_token_scope_formula(
    kind: str, make_model: Make, make_adapters: Make, cache_argument: Callable[[nn.Module], str]
) -> None:
    model = make_model(kind, dtype=torch.float64)
    adapters = make_adapters(model, kind)
    engine = Composer(model, adapters)
    with engine.activate(EARLY):
        first = model(input_ids=IDS[:, :4])
    with engine.activate(LATE):
        second = model(input_ids=IDS[:, 4:7], **{cache_argument(model): first.past_key_values})
    third = model(input_ids=IDS[:, 7:], **{cache_argument(model): second.past_key_values})
    found = torch.cat([first.logits, second.logits, third.logits], dim=1)
    with by_token(model, adapters, [EARLY] * 4 + [LATE] * 3 + [[None] * 3] * 2):
        expected = model(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    with engine.activate(LATE):
        assert not torch.allclose(found[:, 6], model(input_ids=IDS[:, :7]).logits[:, 6], atol=1e-2)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@torch.no_grad()
def test_a_change_in_the_middle_of_generate_holds_from_the_next_forward_on(
    settings: dict[str, Any], make_model: Make, make_adapters: Make
) -> None:
    model = make_model("llama", dtype=torch.float64)
    adapters = make_adapters(model, "llama")
    engine = Composer(model, adapters)
    steps = 0

    class ChangeAfterThree:
        def put(self, tokens: Tensor) -> None:
            nonlocal steps
            # the prompt counts as the first
            steps += 1
            if steps == 4:
                engine.activate(LATE)

        def end(self) -> None:
            pass

    with engine.activate(EARLY):
        output = model.generate(
            IDS[:, :4],
            attention_mask=torch.ones(3, 4),
            do_sample=False,
            max_new_tokens=6,
            min_new_tokens=6,
            streamer=ChangeAfterThree(),
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    assert not engine.active
    found = torch.stack(output.logits, dim=1)
    # four tokens of the prompt and the first two new ones went through the model before the third was put
    with by_token(model, adapters, [EARLY] * 6 + [LATE] * 3):
        expected = model(input_ids=output.sequences[:, :-1], use_cache=False).logits[:, 3:]
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_a_decoder_takes_over_from_the_encoder_keeps_the_weights_of_its_first_step(
    make_model: Make, make_adapters: Make, cache_argument: Callable[[nn.Module], str]
) -> None:
    model = make_model("t5", dtype=torch.float64)
    adapters = make_adapters(model, "t5")
    engine = Composer(model, adapters)
    with engine.activate(EARLY):
        encoded = model.get_encoder()(input_ids=IDS)
        first = model(encoder_outputs=encoded, decoder_input_ids=IDS[:, :2], use_cache=True)
    with engine.activate(LATE):
        second = model(
            encoder_outputs=encoded,
            decoder_input_ids=IDS[:, 2:4],
            **{cache_argument(model): first.past_key_values},
            use_cache=True,
        )
    found = torch.cat([first.logits, second.logits], dim=1)

    # the decoder's own layers change after two tokens; what reads the encoder's output never does
    crossing = ("EncDecAttention.v", "EncDecAttention.k")
    own = [
        Adapter(a.name, a.base_model, {n: f for n, f in a.layers.items() if "decoder" in n and not n.endswith(crossing)})
        for a in adapters
    ]
    others = [
        Adapter(a.name, a.base_model, {n: f for n, f in a.layers.items() if "decoder" not in n or n.endswith(crossing)})
        for a in adapters
    ]
    with by_token(model, own, [EARLY] * 2 + [LATE] * 2), by_token(model, others, [EARLY] * 9):
        expected = model(input_ids=IDS, decoder_input_ids=IDS[:, :4], use_cache=False).logits
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
