"""The weights of each expert for a text's tokens in each layer: figures, a table, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraweave.common.chat import Prompt
from loraweave.common.names import printable
from loraweave.composer.explain.plot import draw, explanation_page
from loraweave.composer.explain.shown import TokenFigures
from loraweave.composer.live.recording import Load, Trace, UsedLayer
from loraweave.composer.model.generate import encode_texts, generation_call
from loraweave.errors import CompositionError
from loraweave.routers.tokens._call import has_two_sequences, prompted

if TYPE_CHECKING:
    from loraweave.common.display import ShownTable


MAX_ROWS = 30
PAGE_SUFFIXES = (".html", ".htm")


class Explanation(TokenFigures):
    """An explanation of each token's weights by expert and layer; the figures themselves are those of `TokenFigures`."""

    def table(self) -> ShownTable:
        """Return a table of the experts by share of the weight, with where they count most; its last row may be "others"."""
        from rich.text import Text

        from loraweave.common.display import ShownTable

        total = self.total
        table = ShownTable(title=self._title(total), title_justify="left")
        effect = ("loss without it",) if self.effects else ()
        for column in ("expert", "share", "chosen", "mean weight", *effect, "most in layer", "most at tokens"):
            words = column in ("expert", "most in layer", "most at tokens")
            table.add_column(column, justify="left" if words else "right")
        order = total.share_E.argsort(descending=True, stable=True).tolist()
        for at in order[:MAX_ROWS]:
            figures = (total.share_E[at], total.chosen_E[at], self.by_layer_LE[:, at].nanmean())
            cells = [f"{figures[0]:.1%}", f"{figures[1]:.1%}", f"{figures[2]:.4g}"]
            if self.effects:
                cells.append(f"{self.effects[name]:+.4f}" if (name := self.experts[at]) in self.effects else "")
            cells += [self._layer(at), self._tokens(at)]
            # as Text, which nobody reads as markup: names are free
            table.add_row(Text(printable(self.experts[at])), *(Text(cell) for cell in cells))
        if rest := order[MAX_ROWS:]:
            table.add_row(f"{len(rest)} others", f"{total.share_E[rest].sum():.1%}", *[""] * (4 + len(effect)))
        return table

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_json(self) -> dict[str, Any]:
        """Return names, and `weights` as nested lists [token][layer][expert] to six digits, null for NaN.

        As in MixtureWeights, an axis on which nothing varies has size 1. `load` has a row for each layer, `effects` the
        known effects of the experts.
        """
        w_TLE = self.w_TLE
        for axis in (0, 1):
            first = w_TLE.narrow(axis, 0, min(1, w_TLE.shape[axis]))
            if torch.equal(first.expand_as(w_TLE), w_TLE):
                w_TLE = first
        rows = {
            layer: {
                "share": [_round(value) for value in layer_load.share_E.tolist()],
                "chosen": [_round(value) for value in layer_load.chosen_E.tolist()],
                "entropy": _round(layer_load.entropy),
                "num_tokens": layer_load.num_tokens,
            }
            for layer, layer_load in self.load.items()
        }
        weights = [[[_round(value) for value in layer_weights] for layer_weights in token] for token in w_TLE.tolist()]
        effects = {name: _round(value) for name, value in self.effects.items()}
        names = {"tokens": self.tokens, "layers": self.layers, "experts": self.experts}
        return {**names, "weights": weights, "load": rows, "effects": effects}

    def plot(self, path: str | Path) -> Path:
        """Draw weight by layer and by token, and every token with its strongest expert; return the path.

        The suffix names the format (.png, .svg, .pdf; .html is page()). Raises PackageMissing without matplotlib,
        CompositionError for another suffix, and where no expert takes part.
        """
        target = Path(path)
        if target.suffix.lower() in PAGE_SUFFIXES:
            return self.page(target)
        figure = draw(self)
        formats = figure.canvas.get_supported_filetypes()
        if target.suffix.lower().lstrip(".") not in formats:
            raise CompositionError(
                f"a picture's name ends in one of {', '.join(sorted(formats))}, but this is {str(path)!r}"
            )
        figure.savefig(target)
        return target

    def page(self, path: str | Path) -> Path:
        """Write one HTML file with every weight in it, to be looked at in a browser; return the path.

        It needs no server, no network and nothing beside it. Raises CompositionError where no expert takes part.
        """
        target = Path(path)
        text = explanation_page(self, self._title(self.total) if self.experts else "")
        target.write_text(text, encoding="utf-8")
        return target

    def _title(self, total: Load) -> str:
        if not self.experts:
            return "the base model itself: no expert takes part"
        of = f"{len(self.tokens)} tokens, {len(self.layers)} layers, {len(self.experts)} experts"
        return f"{of}; mean entropy of a token's weights {total.entropy:.3f} nats"

    def _layer(self, at: int) -> str:
        by_layer_L = self.by_layer_LE[:, at].abs().nan_to_num()
        if torch.allclose(by_layer_L, by_layer_L[:1]):
            return "all alike"
        return printable(self.layers[int(by_layer_L.argmax())])

    def _tokens(self, at: int) -> str:
        by_token_T = self.by_token_TE[:, at].abs().nan_to_num()
        if torch.allclose(by_token_T, by_token_T[:1]):
            return "all alike"
        best = by_token_T.argsort(descending=True, stable=True)[:3].tolist()
        return ", ".join(repr(self.tokens[token]) for token in best if by_token_T[token] > 0)


def _round(value: float) -> float | None:
    return float(f"{value:.6g}") if value == value else None


# what a token decodes to that is no whole character
BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Reading:
    """The arguments of one forward, and the token ids in it: of the text, and for an encoder-decoder of its answer.

    `lengths` are the numbers of tokens that a layer is called with for each part, different for each. The first `num_prompt`
    tokens are the text.
    """

    inputs: Mapping[str, Tensor]
    parts: tuple[Tensor, ...]
    lengths: tuple[int, ...]
    num_prompt: int

    def prompted(self) -> AbstractContextManager[None]:
        """Return a context for the forward, in which the text is the prompt and what follows its answer."""
        prompt_BT = self.inputs["attention_mask"].clone()
        prompt_BT[:, self.num_prompt :] = 0
        return prompted(self.inputs["input_ids"], prompt_BT)

    def explanation(self, tokenizer: Any, trace: Trace, layers: Sequence[str]) -> Explanation:
        """Return the traced forward as an Explanation of the layers, in this order."""
        num_tokens = sum(map(len, self.parts))
        w_TLE = torch.full((num_tokens, len(layers), len(trace.experts)), torch.nan)
        for at, layer in enumerate(layers):
            calls = trace.calls(layer)
            begin = 0
            for part, length in zip(self.parts, self.lengths, strict=True):
                w_TE = _mean_over_calls(calls, length, only=len(self.parts) == 1)
                if w_TE is not None:
                    w_TLE[begin : begin + len(part), at] = w_TE[: len(part)].float().cpu()
                begin += len(part)
        return Explanation(split_text(tokenizer, torch.cat(self.parts).tolist()), tuple(layers), trace.experts, w_TLE)


def plan_reading(model: nn.Module, tokenizer: Any, text: Prompt, max_new_tokens: int) -> Reading:
    """Return the forward over the text, and over all but the last of the tokens of its greedy continuation."""
    inputs, pad = encode_texts(model, tokenizer, [text])
    text_ids = inputs["input_ids"][0]
    answer_ids = text_ids[:0]
    if max_new_tokens:
        settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
        call = generation_call(model, tokenizer, [text], None, settings)
        answer_ids = call.new_tokens(call.output(model))[0, :-1]
    if not has_two_sequences(model):
        ids = torch.cat([text_ids, answer_ids])
        return Reading(
            {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}, (ids,), (len(ids),), len(text_ids)
        )
    if not max_new_tokens:
        answer_ids = torch.full_like(text_ids[:1], _start_token(model))
    decoded = answer_ids
    if len(decoded) == len(text_ids):
        # one more, which changes none before it, so that the length of a call says which part it saw
        decoded = torch.cat([decoded, torch.full_like(decoded[:1], pad)])
    return Reading(
        {**inputs, "decoder_input_ids": decoded[None]}, (text_ids, answer_ids), (len(text_ids), len(decoded)), len(text_ids)
    )


def split_text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token. Tokens that are characters only together each get the whole text of them."""
    texts: list[str] = []
    begin = 0
    while begin < len(ids):
        end = begin + 1
        text = _decode(tokenizer, ids[begin:end])
        # no character has more bytes than four
        while BROKEN in text and end < min(begin + 4, len(ids)):
            end += 1
            text = _decode(tokenizer, ids[begin:end])
        if BROKEN in text:
            end, text = begin + 1, _decode(tokenizer, ids[begin : begin + 1])
        texts += [text] * (end - begin)
        begin = end
    return tuple(texts)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _mean_over_calls(calls: Sequence[UsedLayer], length: int, *, only: bool) -> Tensor | None:
    """Return w_TE of a layer for the part of this length, the mean over several calls; None where the layer saw none.

    A layer that got some of the tokens only (an expert of the base's own) is known where all tokens share its weights.
    """
    seen = []
    for call in calls:
        num_tokens = call.num_rows * call.num_tokens
        if num_tokens == length or (only and num_tokens and num_tokens % length == 0):
            seen.append(call.spread_BTE.reshape(-1, length, call.w_BTE.shape[2]))
        elif only and call.w_BTE.shape[:2] == (1, 1):
            seen.append(call.w_BTE.expand(1, length, -1))
    return torch.cat(seen).mean(dim=0) if seen else None


def _start_token(model: Any) -> int:
    for settings in (getattr(model, "generation_config", None), model.config):
        token = getattr(settings, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise CompositionError(
        f"{type(model).__name__} names no token that its answers begin with: pass max_new_tokens, or set "
        "model.config.decoder_start_token_id"
    )
