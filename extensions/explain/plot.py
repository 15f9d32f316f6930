"""The picture and the page of an explanation.

The picture has experts by layers, experts by tokens, and the text with each token's strongest expert. The page is one HTML
file that loads nothing else, in which names and tokens are only ever text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import torch
from torch import Tensor

from loraweave.extend import blank_figure
from loraweave.extensions.explain.figures import (
    OTHER,
    Strongest,
    TokenFigures,
    block_and_kind,
    common_prefix,
    group_places,
    last_parts,
)

# the most experts shown, those with the largest share
MAX_EXPERTS = 30
# with more layers than these, means over the layers of a block are shown
MAX_LAYERS = 40
# with more columns than these, only some of their names are written
MAX_NAMED = 48
NAME_WIDTH, TOKEN_WIDTH, LAYER_WIDTH = 30, 14, 36
INCHES = 8.5
ROW_INCHES = 0.155
# one column of the strip's font, and one of its lines
STRIP_POINTS = 7.0
COLUMN_INCHES = STRIP_POINTS * 0.602 / 72
LINE_INCHES = 0.31
# the width of about one character of an axis
LABEL_INCHES = 0.055
MAX_LINES = 14
STRIP_MARGIN = 0.55


@dataclass(frozen=True, eq=False)
class _Map:
    """A heat map: its values w_EC (experts by columns), the columns' names, and the labels of axis and figure."""

    w_EC: Tensor
    names: list[str]
    axis: str
    title: str
    wide: int


def draw(figures: TokenFigures) -> Any:
    """Return the picture as a matplotlib Figure. Raises PackageMissing, and CompositionError without a weight to show."""
    figures.require_weights()
    share_E = figures.total.share_E
    # in their own order, so that pictures of one pool can be laid side by side
    shown = share_E.argsort(descending=True, stable=True)[:MAX_EXPERTS].sort().values
    strip = _Strip(figures)
    rows = _Rows(figures, shown)
    maps = _layer_maps(figures.layers, figures.by_layer_LE.T[shown])
    named = len(figures.tokens) <= MAX_NAMED
    names = [token.strip(" ") or "␣" for token in figures.tokens if named]
    axis = "token" if named else "position of the token"
    maps.append(_Map(figures.by_token_TE.T[shown], names, axis, "weight by token, mean over layers", 1))
    top = 2 * (ROW_INCHES * max(len(shown), 4) + 1.05)
    bottom = strip.num_lines * LINE_INCHES + 0.45
    figure = blank_figure("plots need matplotlib", figsize=(INCHES, top + bottom), layout="constrained", dpi=150)
    parts: Any = figure.subfigures(2, 1, height_ratios=(top, bottom))
    _draw_maps(parts[0], maps, rows)
    strip.draw(parts[1], "abcd"[len(maps)], bottom)
    return figure


def _layer_maps(layers: tuple[str, ...], w_EL: Tensor) -> list[_Map]:
    """Return one heat map by layer, or, beyond MAX_LAYERS layers, two of means: by block and by kind of layer."""
    blocks = [block_and_kind(layer) for layer in layers]
    if len(layers) <= MAX_LAYERS or len({block for block, _ in blocks}) == len(layers):
        prefix = common_prefix(layers)
        names = [layer.removeprefix(prefix) for layer in layers]
        return [_Map(w_EL, names, f"layer of {prefix[:-1]}" if prefix else "layer", "weight by layer, mean over tokens", 1)]
    whole, kinds = (group_places(groups) for groups in zip(*blocks, strict=True))
    prefix = common_prefix(tuple(whole))
    names = [name.removeprefix(prefix) for name in whole]
    axis = f"block of {prefix[:-1]} (mean of its layers)" if prefix else "block (mean of its layers)"
    by_block = names, axis, "weight by block, mean over tokens", max(len(whole), 10)
    by_kind = last_parts(list(kinds)), "kind of layer", "by kind, mean over blocks", max(len(kinds), len(whole) // 3)
    return [
        _Map(torch.stack([w_EL[:, members].nanmean(dim=1) for members in groups.values()], dim=1), *labels)
        for groups, labels in ((whole, by_block), (kinds, by_kind))
    ]


class _Rows:
    """The shown experts' names, numbers and colours, as the rows of every map."""

    def __init__(self, figures: TokenFigures, shown: Tensor) -> None:
        self.glyphs = Glyphs([*figures.experts, *figures.layers, *figures.tokens])
        self._places = shown.tolist()
        self._names = [self.glyphs.show(figures.experts[at], NAME_WIDTH) for at in self._places]
        for row, at in enumerate(self._places):
            if (effect := figures.effects.get(figures.experts[at])) is not None:
                self._names[row] += f"  {effect:+.3f}"
        self._colours = [figures.colours.get(at) for at in self._places]
        self._title = "expert"
        if len(self._places) < len(figures.experts):
            share = float(figures.total.share_E[shown].sum())
            self._title = f"expert (the {len(shown)} with {share:.0%} of the weight, of {len(figures.experts):,})"
        if figures.effects:
            self._title += ", rise of the loss without it"

    def name(self, axes: Any) -> None:
        """Write the experts' names, numbers and colours beside the axes."""
        families = self.glyphs.families
        axes.set_yticks(range(len(self._names)), self._names, fontsize=6.5, parse_math=False, family=families)
        axes.tick_params(axis="y", length=0, pad=15 + 5 * len(str(max(self._places) + 1)))
        beside = axes.get_yaxis_transform()
        for row, (at, colour) in enumerate(zip(self._places, self._colours, strict=True)):
            # separate from the name, which may be a right-to-left script
            place = {"xytext": (-11, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate(str(at + 1), (0, row), xycoords=beside, fontsize=6.5, weight="bold", **place)
            if colour is not None:
                axes.plot(-0.009, row, marker="s", color=colour, markersize=4.5, clip_on=False, transform=beside)
        axes.set_ylabel(self._title, fontsize=7)


def _draw_maps(figure: Any, maps: list[_Map], rows: _Rows) -> None:
    grid = figure.add_gridspec(2, len(maps) - 1, width_ratios=[part.wide for part in maps[:-1]], hspace=0.06)
    layer_axes = [figure.add_subplot(grid[0, at]) for at in range(len(maps) - 1)]
    lines = [(maps[:-1], layer_axes), (maps[-1:], [figure.add_subplot(grid[1, :])])]
    letters = iter("abc")
    for shown, axes_of in lines:
        high = max(float(part.w_EC.nan_to_num().abs().max()) for part in shown) or 1.0
        signed = any(bool((part.w_EC < 0).any()) for part in shown)
        colours = {"cmap": "PuOr_r" if signed else "Blues", "vmin": -high if signed else 0.0, "vmax": high}
        for heat_map, axes in zip(shown, axes_of, strict=True):
            image = axes.imshow(heat_map.w_EC.numpy(), aspect="auto", **colours)
            # layers that no token passed
            axes.set_facecolor("0.85")
            axes.set_title(f"({next(letters)}) {heat_map.title}", fontsize=8, loc="left")
            axes.set_xlabel(heat_map.axis, fontsize=7, parse_math=False)
            _name_columns(axes, heat_map, rows.glyphs, INCHES * 0.7 * heat_map.wide / sum(other.wide for other in shown))
            axes.set_yticks([])
        rows.name(axes_of[0])
        bar = figure.colorbar(image, ax=axes_of, fraction=0.03, pad=0.01, aspect=30)
        bar.set_label("mean weight", fontsize=7)
        bar.ax.tick_params(labelsize=6)


def _name_columns(axes: Any, shown: _Map, glyphs: Glyphs, inches: float) -> None:
    axes.tick_params(axis="x", labelsize=6, length=2)
    if not shown.names:
        return
    step = -(-len(shown.names) // MAX_NAMED)
    named = range(0, len(shown.names), step)
    labels = [glyphs.show(shown.names[at], TOKEN_WIDTH if shown.axis == "token" else LAYER_WIDTH) for at in named]
    level = (max(map(width, labels)) + 0.5) * LABEL_INCHES < inches / len(named)
    rotation = 0 if level else 90
    axes.set_xticks(named, labels, rotation=rotation, fontsize=6, parse_math=False, family=glyphs.families)


class _Strip:
    """The text in lines: each token on its strongest expert's colour, with that expert's number below it."""

    def __init__(self, figures: TokenFigures) -> None:
        self._figures = figures
        self._glyphs = Glyphs(figures.tokens, "mono")
        self._strongest = Strongest.of(figures.by_token_TE)
        self._boxes = self._laid_out()
        self.num_lines = max(line for _, line, _, _ in self._boxes) + 1

    def _laid_out(self) -> list[tuple[int, int, int, str]]:
        """Return (token, line, column, shown text) of the tokens that fit."""
        num_columns = int((INCHES - STRIP_MARGIN - 0.15) / COLUMN_INCHES)
        boxes, line, column = [], 0, 0
        for at, token in enumerate(self._figures.tokens):
            text = self._glyphs.show(token if token.strip(" ") else "␣" * max(len(token), 1), 2 * TOKEN_WIDTH)
            # an expert's number needs its place too
            size = max(width(text), len(str((self._strongest.experts[at] or 0) + 1)))
            if column and column + size > num_columns:
                line, column = line + 1, 0
            if line == MAX_LINES:
                break
            boxes.append((at, line, column, text))
            column += size
        return boxes

    def draw(self, figure: Any, letter: str, inches: float) -> None:
        from matplotlib.colors import to_rgb
        from matplotlib.patches import Rectangle

        tokens = self._figures.tokens
        cut = f", the first {len(self._boxes):,} of {len(tokens):,} tokens" if len(self._boxes) < len(tokens) else ""
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, INCHES), ylim=(inches, 0))
        axes.axis("off")
        highest = max(self._strongest.shares) or 1.0
        said = f"each token's strongest expert (number, colour) and its share of the weight (fullness, up to {highest:.0%})"
        axes.text(0.1, 0.18, f"({letter}) {said}{cut}", fontsize=8)
        begun = -1
        for at, line, column, text in self._boxes:
            x, y = STRIP_MARGIN + column * COLUMN_INCHES, 0.30 + line * LINE_INCHES
            if line != begun:
                axes.text(STRIP_MARGIN - 0.08, y + 0.075, str(at), fontsize=5.5, color="0.4", ha="right", va="center")
                begun = line
            best = self._strongest.experts[at]
            colour: Any = "white"
            if best is not None:
                fullness = 0.15 + 0.75 * self._strongest.shares[at] / highest
                base = to_rgb(self._figures.colours.get(best, OTHER))
                colour = tuple(1 - fullness * (1 - part) for part in base)
                size = max(width(text), len(str(best + 1))) * COLUMN_INCHES
                axes.text(x + size / 2, y + 0.205, str(best + 1), fontsize=5, ha="center", va="center", color="0.25")
            box = (max(width(text), 1) * COLUMN_INCHES, 0.15)
            axes.add_patch(Rectangle((x, y), *box, facecolor=colour, edgecolor="white", linewidth=0.6))
            axes.text(x, y + 0.08, text, fontsize=STRIP_POINTS, va="center", parse_math=False, family=self._glyphs.families)


FAMILIES = {"sans": "DejaVu Sans", "mono": "DejaVu Sans Mono"}
# this font has no real glyphs: it draws every character as a box
PLACEHOLDER = "Last Resort"


class Glyphs:
    """The fonts needed for some texts, and the texts in characters that these fonts have. Needs matplotlib.

    matplotlib's default font comes first, then installed ones for characters that it lacks. A character in no font becomes
    its number, such as \u7684, so that two names never look the same.
    """

    def __init__(self, texts: Iterable[str], kind: str = "sans") -> None:
        from matplotlib import font_manager

        wanted = {ord(character) for text in texts for character in _visible(text)}
        self.families = [FAMILIES[kind]]
        self._known = _characters(font_manager.findfont(FAMILIES[kind]))
        for font in font_manager.fontManager.ttflist:
            missing = wanted - self._known
            if not missing:
                break
            if font.name in self.families or font.name.startswith(PLACEHOLDER):
                continue
            # a family is asked for by name, and the file that then opens must be this one
            if missing & _characters(font.fname) and font_manager.findfont(font.name) == font.fname:
                self.families.append(font.name)
                self._known |= _characters(font.fname)

    def show(self, text: str, max_width: int) -> str:
        """Return the text, with characters that no font has as codes, and shortened in its middle to `max_width` columns."""
        shown = "".join(
            character if ord(character) in self._known else character.encode("unicode_escape").decode()
            for character in _visible(text)
        )
        if width(shown) <= max_width:
            return shown
        head, tail = "", ""
        while width(head + tail) < max_width - 1:
            head, tail = (shown[: len(head) + 1], tail) if len(head) <= len(tail) else (head, shown[-len(tail) - 1 :])
        return f"{head}…{tail}"


def width(text: str) -> int:
    """Return the columns of a fixed-width font that the text takes: two for a wide character, none for a combining one."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _visible(text: str) -> str:
    marked = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in marked)


def _characters(path: str) -> set[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return set(FT2Font(path).get_charmap())
    except (RuntimeError, OSError):
        # matplotlib, too, skips a listed file that it cannot open
        return set()


# characters that could end the element that holds the data, or a line of a script
ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
# the opacity of a colour at no share and at the largest share
FAINTEST, FULLEST = 0.12, 0.8


def page(shown: TokenFigures, summary: str) -> str:
    """Return the page as HTML, with `summary` above the text. Raises CompositionError if there is no weight to show."""
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
    return (files("loraweave.extensions.explain") / "page_files" / name).read_text(encoding="utf-8")


def _tokens(shown: TokenFigures) -> list[str]:
    """Return HTML of the text with each token's strongest expert by the mean over layers, for browsers without scripts."""
    strongest = Strongest.of(shown.by_token_TE)
    highest = max(strongest.shares) or 1.0
    spans = []
    for token, expert, share in zip(shown.tokens, strongest.experts, strongest.shares, strict=True):
        colour = "transparent" if expert is None else _fade(shown.colours.get(expert, OTHER), share / highest)
        number = "" if expert is None else f"<sub>{expert + 1}</sub>"
        text = escape(token.replace("\n", "↵"))
        end = "\n" if "\n" in token else ""
        spans.append(f'<span class="token" style="background:{colour}"><bdi>{text}</bdi>{number}</span>{end}')
    return spans


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
    """Return the weights, bit for bit, in base64: all of them, or if most are 0 the others with their places."""
    w_N = w_TLE.float().flatten()
    # a NaN (a token that a layer never sees) counts as not 0
    place_P = w_N.nonzero()[:, 0]
    if 2 * len(place_P) >= len(w_N):
        return {"values": _base64(w_N), "places": None}
    return {"values": _base64(w_N[place_P]), "places": _base64(place_P.to(torch.int32))}


def _base64(values_N: Tensor) -> str:
    little_endian = values_N.numpy().astype(values_N.numpy().dtype.newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()
