"""The weights of each expert for a text's tokens in each layer, as figures, a table, a picture and a page."""

from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from loraweave import CompositionError
from loraweave.extend import ShownTable, printable
from loraweave.extensions.explain.figures import TokenFigures
from loraweave.extensions.explain.plot import draw, page
from loraweave.extensions.explain.used import Load

MAX_ROWS = 30
PAGE_SUFFIXES = (".html", ".htm")


class Explanation(TokenFigures):
    """The weights of each expert for each token of a text in each layer, with a table, a picture and a page."""

    def table(self) -> ShownTable:
        """Return a table of the experts, largest share of the weight first, with the layer and tokens where it is largest.

        Its last row may be "others".
        """
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
            # as Text, so that rich does not read names, which are arbitrary, as markup
            table.add_row(Text(printable(self.experts[at])), *(Text(cell) for cell in cells))
        if rest := order[MAX_ROWS:]:
            table.add_row(f"{len(rest)} others", f"{total.share_E[rest].sum():.1%}", *[""] * (4 + len(effect)))
        return table

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def to_json(self) -> dict[str, Any]:
        """Return the names, and `weights` as lists by token, layer and expert, to six digits, None for NaN.

        As in MixtureWeights, an axis along which nothing varies has size 1. `load` has the figures of each layer, `effects`
        the known effects of the experts.
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
        """Write one HTML file with every weight in it, for a browser; return the path.

        It needs no server, no network and nothing beside it. Raises CompositionError where no expert takes part.
        """
        target = Path(path)
        text = page(self, self._title(self.total) if self.experts else "")
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
