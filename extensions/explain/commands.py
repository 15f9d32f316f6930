"""`loraweave explain`: show which adapter of a composition counts for which token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loraweave.extend.commands import (
    JsonOption,
    load_model,
    note,
    print_json,
    print_table,
    recorded_base,
    require_one_adapter,
)

app = typer.Typer()
PLOTS = (".png", ".svg", ".pdf")


@app.command(epilog='Example: loraweave explain composed "The king is old." --plot weights.png')
def explain(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A composition's folder.")],
    text: Annotated[str, typer.Argument(help="An input of its task.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="Base model; the one that the composition names by default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Also explain this many tokens of the answer.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the weights by layer and token: .png, .svg or .pdf.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all weights as a page for a browser: .html.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how much each adapter of a composition counts for the tokens of an input, layer by layer."""
    if plot is not None and plot.suffix.lower() not in PLOTS:
        raise typer.BadParameter(f"--plot takes a file that ends in {', '.join(PLOTS)}, not {plot.name!r}")
    if page is not None and page.suffix.lower() != ".html":
        raise typer.BadParameter(f"--page takes a file that ends in .html, not {page.name!r}")
    from loraweave import Composition
    from loraweave.extensions.explain.reading import explain as explain_text

    require_one_adapter(folder, "explain", text)
    recorded = recorded_base(folder)
    model, tokenizer = load_model(base or recorded)
    composed = Composition.from_pretrained(folder, model, tokenizer)
    explanation = explain_text(composed, text, max_new_tokens=max_new_tokens)
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
