"""The page of an Explanation: one HTML file that loads nothing else, in which names and tokens are only ever text."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import torch
from torch import Tensor

from loraweave.composer.explain.shown import OTHER, Strongest, TokenFigures, block_and_kind, common_prefix, group_places

# what could end the element that the data are in, or a line of a script
ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
# how full a colour is where its expert has none, and where it has the largest share
FAINTEST, FULLEST = 0.12, 0.8


def page(shown: TokenFigures, summary: str) -> str:
    """The page. CompositionError where there is no weight to show."""
    shown.require_weights()
    script = _part("page.js")
    return Template(_part("page.html")).substitute(
        style=_part("base.css") + _part("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summary=escape(summary),
        text="".join(_tokens(shown)),
        data=json.dumps(_data(shown), ensure_ascii=False).translate(ESCAPED),
    )


def _part(name: str) -> str:
    return (files("loraweave.composer.explain") / "page_files" / name).read_text(encoding="utf-8")


def _tokens(shown: TokenFigures) -> list[str]:
    """The text with each token's strongest expert on the mean over the layers, for readers without scripts."""
    strongest = Strongest.of(shown.by_token_TE)
    highest = max(strongest.shares) or 1.0
    found = []
    for token, expert, share in zip(shown.tokens, strongest.experts, strongest.shares, strict=True):
        colour = "transparent" if expert is None else _fade(shown.colours.get(expert, OTHER), share / highest)
        number = "" if expert is None else f"<sub>{expert + 1}</sub>"
        text = escape(token.replace("\n", "↵"))
        end = "\n" if "\n" in token else ""
        found.append(f'<span class="token" style="background:{colour}"><bdi>{text}</bdi>{number}</span>{end}')
    return found


def _fade(colour: str, part: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{FAINTEST + (FULLEST - FAINTEST) * part:.3f})"


def _data(shown: TokenFigures) -> dict[str, Any]:
    blocks, kinds = zip(*map(block_and_kind, shown.layers), strict=True)
    return {
        "tokens": shown.tokens,
        "layers": shown.layers,
        "experts": shown.experts,
        "prefix": common_prefix(shown.layers),
        "blocks": list(group_places(blocks).items()),
        "kinds": list(group_places(kinds).items()),
        "colours": [shown.colours.get(expert, OTHER) for expert in range(len(shown.experts))],
        "fullness": [FAINTEST, FULLEST],
        "effects": [shown.effects.get(name) for name in shown.experts],
        "weights": _pack(shown.w_TLE),
    }


def _pack(w_TLE: Tensor) -> dict[str, Any]:
    """The weights to the last bit, in base64: all of them, or where most are 0 those that are not and their places."""
    w_N = w_TLE.float().flatten()
    # NaN, of a token that a layer never sees, is not 0
    place_P = w_N.nonzero()[:, 0]
    if 2 * len(place_P) >= len(w_N):
        return {"values": _base64(w_N), "places": None}
    return {"values": _base64(w_N[place_P]), "places": _base64(place_P.to(torch.int32))}


def _base64(values_N: Tensor) -> str:
    little_endian = values_N.numpy().astype(values_N.numpy().dtype.newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()
