"""Hooks of mkdocs: the pages of the site that are made when it is built, and links to files outside of docs/.

The reference has an entry for every public name, by the room that it comes from, for those of each extension and of
`loraweave.extend` and its kits, and one for every command. Notebooks become tutorials. Pages of extensions are
docs/extensions/*.md and, of other packages, NAME.md in the package that the entry point NAME of `loraweave.pages` names. A
file of the repository that a page links to is on the site, below repository/.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import posixpath
import re
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import tables
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

import loraweave as lw
from loraweave import extend, registry
from loraweave.cli import app

ROOT = Path(__file__).resolve().parents[1]
LINK = r"(?:\]\(|\b(?:src|srcset)=\")([^)#:\"\s]+)(?:#[^)]*)?[)\"]"

# pages of the reference, and where their names are defined; of several that fit, the longest beginning counts
REFERENCE = {
    "Adapters and merging": ("hub.adapter", "hub.conversion", "composer.merge", "types.Factors", "registry"),
    "Hub and retrieval": ("hub", "retrieval", "types"),
    "The running model": ("hub.base", "hub.pool", "composer", "routers.weights", "types.BaseKey"),
    "Composing for a task": ("composer.compose", "composer.formula", "types.Task"),
    "Routers and experts": ("routers", "composer.experts.make", "routers.weights.Router"),
    "Training": ("composer.train", "composer.experts"),
    "Errors": ("errors",),
}


def on_config(config: MkDocsConfig) -> None:
    """Add the pages of extensions and of other packages to the part of the navigation that is for them."""
    [pages] = [entry["Extensions"] for entry in config.nav or () if "Extensions" in entry]
    names = {path.stem for path in (ROOT / "docs" / "extensions").glob("*.md")} | set(registry.brought("pages"))
    pages.extend(f"extensions/{name}.md" for name in sorted(names))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the reference, the tutorials, and the files of the repository that pages link to."""
    made = {f"reference/{slug(title)}.md": reference(title) for title in REFERENCE} | {"reference/commands.md": commands()}
    made |= {f"tutorials/{path.stem}.md": tutorial(path) for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    made |= {"reference/extensions.md": extensions(), "reference/extending.md": extending()}
    made |= {
        f"extensions/{name}.md": (resources(module) / f"{name}.md").read_text(encoding="utf-8")
        for name, module in registry.brought("pages").items()
        if f"extensions/{name}.md" not in files.src_uris
    }
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    pages = [source for file in files.documentation_pages() if (source := source_of(file))]
    for page in pages:  # which grows
        for target in re.findall(LINK, page.read_text(encoding="utf-8")):
            found = linked(page, target)
            if found and place(found) not in files.src_uris:
                files.append(File.generated(config, place(found), abs_src_path=str(found)))
                if found.suffix == ".md":
                    pages.append(found)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page, its links to files leading to their places on the site."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]  # columns with this page alone
    source = source_of(page.file)
    if not page.file.src_uri.startswith(("reference/", "repository/")):
        page.meta["search"] = {"boost": 4}  # a page that explains comes before entries and tables of the same words
    if source is None:
        return markdown

    def moved(match: re.Match[str]) -> str:
        if (found := linked(source, match[1])) is None:
            return match[0]
        return match[0].replace(match[1], posixpath.relpath(place(found), posixpath.dirname(page.file.src_uri)), 1)

    return re.sub(LINK, moved, markdown)


def source_of(file: File) -> Path | None:
    """The file of the repository that a page is; None for one that is made here."""
    return Path(file.abs_src_path) if file.abs_src_path else None


def linked(page: Path, target: str) -> Path | None:
    """The file of the repository that a page's link leads to; None where there is none, which mkdocs reports."""
    file = Path(os.path.normpath(page.parent / target))
    return file if file.is_file() and file.is_relative_to(ROOT) else None


def place(file: Path) -> str:
    """Where on the site a file of the repository is."""
    name = file.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def slug(title: str) -> str:
    """A title as a file's name."""
    return title.lower().replace(" ", "-")


def reference(title: str) -> str:
    """The page with an entry of mkdocstrings for each public name of the group."""
    names = [name for name in lw.__all__ if group(name) == title]
    return "\n\n".join([f"# {title}", *(f"::: loraweave.{name}" for name in names)])


def extensions() -> str:
    """Return the page with the public names and the registered ones of each extension."""
    parts = ["# Extensions", "Each answers a question that some users have; the rest works without it."]
    for name, folder in registry.extensions().items():
        package = f"{registry.EXTENSIONS}.{name}"
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        more = f"\n\nMore on [its page](../extensions/{name}.md)." if (ROOT / f"docs/extensions/{name}.md").is_file() else ""
        parts += [f"## {name}", said + more]
        for public in importlib.import_module(package).__all__:
            parts.append(f"::: {package}.{public}\n    options: {{heading_level: 3}}")
        parts += tables.tables(lambda place, package=package: place.startswith(f"{package}."), heading="###")
    return "\n\n".join(parts)


def extending() -> str:
    """Return the page with the names of `loraweave.extend` and of its kits."""
    parts = ["# Extending", extend.__doc__ or "", *(f"::: loraweave.extend.{name}" for name in extend.__all__)]
    for kit in tables.kits():
        package = importlib.import_module(f"loraweave.extend.{kit}")
        parts += [f"## {kit}", package.__doc__ or ""]
        parts += [f"::: {package.__name__}.{name}\n    options: {{heading_level: 3}}" for name in package.__all__]
    return "\n\n".join(parts)


def group(name: str) -> str:
    """The title of the reference's page that a public name is on."""
    module = lw._LAZY.get(name) or vars(lw)[name].__module__
    own = f"{module}.{name}.".removeprefix("loraweave.")
    fits = {start: title for title, starts in REFERENCE.items() for start in starts if own.startswith(f"{start}.")}
    if not fits:
        raise LookupError(f"lw.{name} of {module} has no page: give it one in REFERENCE of scripts/pages.py")
    return fits[max(fits, key=len)]


def commands() -> str:
    """The page of the command line, as typer describes it."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="loraweave", title="Commands")
    text = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n", "", text)  # each of them follows
    text = re.sub(r"(?<=\w)\*(?=\w)", r"\\*", text)  # a product in a formula is not emphasis
    return re.sub(r"^Examples?: (.+)$", r"```sh\n\1\n```", text, flags=re.MULTILINE)


def tutorial(notebook: Path) -> str:
    """A notebook as a page: its texts, its code in blocks, and below each block what it shows."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    name = notebook.relative_to(ROOT).as_posix()
    start = f"This page is the notebook `{name}`."
    body = []
    for cell in cells:
        text = "".join(cell["source"])
        body.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
        body.extend(map(output, cell.get("outputs", ())))
    return "\n\n".join([body[0], start, *body[1:]])


def output(made: dict[str, Any]) -> str:
    """What a cell of a notebook shows, as a part of a page: a picture, a table, or a block of text."""
    data = made.get("data", {})
    if "image/png" in data:
        return f"![What the cell draws](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/html" in data:
        return "".join(data["text/html"])
    text = "".join(made.get("text", data.get("text/plain", "")))
    return f"```output\n{text.rstrip()}\n```"
