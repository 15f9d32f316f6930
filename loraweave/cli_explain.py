"""`loraweave explain`: which adapter counts where, for one text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraweave._inputs import load_model, recorded_base
from loraweave._printing import note, print_json, print_table
from loraweave.cli_hub import JsonOption

EXPLAIN_EXAMPLE = 'Example: loraweave explain composed "The king is old." --plot weights.png'
FORMATS = (".png", ".svg", ".pdf")


def explain(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A composition's folder.")],
    text: Annotated[str, typer.Argument(help="An input of its task.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Base model; the one that the composition names by default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Explain so many tokens of the answer too.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the weights by layer and token: .png, .svg or .pdf.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all weights as a page for a browser: .html.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much each adapter of a composition counts for the tokens of an input, layer by layer."""
    if plot is not None and plot.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"--plot takes a file that ends in {', '.join(FORMATS)}, not {plot.name!r}")
    if page is not None and page.suffix.lower() != ".html":
        raise typer.BadParameter(f"--page takes a file that ends in .html, not {page.name!r}")
    import loraweave as lw

    recorded = recorded_base(folder)
    model, tokenizer = load_model(base or recorded)
    composed = lw.Composition.from_pretrained(folder, model, tokenizer)
    explanation = composed.explain(text, max_new_tokens=max_new_tokens)
    if plot is not None:
        explanation.plot(plot)
    if page is not None:
        explanation.page(page)
    if as_json:
        print_json({**explanation.to_json(), "plot": plot, "page": page})
        return
    print_table(explanation.table())
    if plot is not None:
        note(f"drew {plot}")
    if page is not None:
        note(f"wrote {page}")
