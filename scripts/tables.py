#!/usr/bin/env python3
"""Writes what there is by name, from the first line of each file: docs/registries.md, and the tables within other pages.

Such a table stands after a line `<!-- entries of methods -->`; it has the core's entries, and on the page of an extension
those of the extension. After `<!-- folders -->` it has the folders of all rooms, and after `<!-- extensions -->` all
extensions. No entry is imported. `scripts/pages.py` makes the site's tables of extensions with it.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from loraweave import extend, registry

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "registries.md"
WITHIN = re.compile(r"(<!-- (?:entries of )?(\w+) -->\n).*?(<!-- end of entries -->)", re.DOTALL)
ROOMS = ("serving", "composer", "routers", "retrieval", "hub")
HEAD = """# What can be asked for by name

```python
import loraweave as lw

lw.names("keys")
```

```output
['classifier', 'description', 'mean', 'outputs', 'relation', 'spectral']
```

A folder is a registry: a file in it is an entry, its first line the description below. `scripts/tables.py` writes this page,
and a test compares it with the folders.

An extension, a folder of `extensions/`, adds files to a registry by a folder of the same name; the site lists
them by extension. Another package adds a file of its own by an entry point, and is then named, checked and saved like ours:

```toml
[project.entry-points."loraweave.methods"]
my_method = "my_package.my_method"
```

The groups are `loraweave.` with the names below, and `loraweave.recipes` for `experts`. A name is that of the file. Names of
ours cannot be taken; a file that cannot be imported raises `PluginFailed` when it is asked for, and only then. What such a
file is made from is in `loraweave.extend` (kinds of options, `traits`) and in its kits (`TokenRouter`, `Recipe`, `Solver`),
[below](#what-a-file-is-made-from).

Nine registries have no entries in the core:

- `hooks`: a `LiveHook` may serve live mixtures in a way of its own (kernels for batches by row, what `torch.compile` traces,
  a mixture for each call of a pipeline);
- `writers`: a `WeightWriter` writes into weights that are not plain floats;
- `pipelines`: a subclass of `Parts` presents a pipeline of several models as one module;
- `sources`: packed files that `hub.add` reads, such as archives. An entry has `suffix(path)`, the end of a name by which it
  knows one, or "", and `unpack(path)`, a context that gives a folder with the files;
- `examiners`: what looks at adapters that are added, beside the core's refusals: `measure(prepared, blobs)` and
  `examine(catalogue, blobs, prepared, policies, model)` return the `Prepared` adapter, with its anomalies;
- `packings`: forms in which a hub stores factors in fewer bits, each the value of `stored_as` of `hub.add` by its name;
- `targets`: a subclass of `Target` of `loraweave.extensions.engines.export` writes for a program that loads adapters;
- `checks`: a function returns a check of all records for `Hub.verify(also=)`; the command line knows `signed_by`;
- `catalogues` and `blobs`: stores of a hub's rows and files outside a folder, named for the scheme of the hub's URL;
- `workers`: clusters that run pieces of work, named for the first word of joblib's backend: a class of (backend, most pieces
  or None) with `room`, `submit(call)` and `close()`.

An index whose class has a number as `default_from` is taken by searches of this many adapters or more where none is named;
of several it is the one with the largest number, and without any `flat`.

These groups are not registries. An entry point of theirs names

- `loraweave.commands`: a module with a `typer.Typer` called `app`, whose commands stand beside ours in the shell, or one
  called `hub`, whose commands are those of `loraweave hub`;
- `loraweave.pages`: by NAME, a package that has the Markdown page NAME.md, which becomes a page of the site;
- `loraweave.merge_files`: a module that reads YAML files for `loraweave merge FILE.yaml`. Its `read(path, keys)` returns an
  object with `merge(find, seed=, **rules)` and `dtype`, or None for another kind of file; `READS` names the keys of its own;
- `loraweave.router_files`: a module that opens routers which others saved, with `is_router(folder)`, `is_mixture(folder)`
  (false for what is an adapter, too), `read(folder, pool, model)`, and `FILES`, patterns of its files;
- `loraweave.trainer`: a module whose `fit(model, dataset, tokenizer, settings, same_call=)` trains an expert model, and
  `train_together(model, tokenizer, jobs, pace, judging, ..)` several; `start_from(name, base_model, pool, ..)` makes a model
  whose experts begin as adapters ([expert_training](extensions/expert_training.md));
- `loraweave.groups`: a module whose `train_in_groups(apart, judging, hub, n_jobs)` trains for `hub=` and `n_jobs=` of
  `train_adapters` ([training_at_scale](extensions/training_at_scale.md));
- `loraweave.reading`: a module that reads by workers for `n_jobs=` of a hub's `add_many` (`read_many`, and `drop` for
  what the hub then refused) and `verify` (`problems_of_blobs`; [cluster](extensions/cluster.md));
- `loraweave.scoring`: a module whose `ScoringWorkers(crew, engine, tokenizer, hub)` deals out the forward passes of a
  search for `n_jobs=` of `compose` ([cluster](extensions/cluster.md));
- `loraweave.step_memory`: a module whose `EstimatedMemory(model, tokenizer, job, allowed, share=)` is the `StepMemory` of a
  training ([training_at_scale](extensions/training_at_scale.md));
- `loraweave.index_files`: a module that keeps search indexes of large hubs in files, by `load`, `save` and `problems`
  (`IndexFiles` in `hub/search/keys.py`; [large hubs](extensions/large_hubs.md));
- `loraweave.pickles`: a module that reads files of `torch.save` on consent: `read_pickle(folder, name, integers=)` yields
  (key, dtype, tensor), and `texts_in_pickle(folder, name)` returns the names without building anything;
- `loraweave.peft_heads`: a module for PEFT's `modules_to_save`, with `take_heads(stored, listed, task, bias, folder)` and
  `saved_modules(heads, layers, recorded)`;
- `loraweave.peft_parameters`: a module that reads and writes PEFT's matrices of several experts in one parameter, with
  `experts_of(parts, config)`, `unpad(layers, layout)` and `stack_experts(layers)`;
- `loraweave.export`: a module with `export(contents, name, folder, target=, max_rank=, base=)`, which returns an
  `ExportReport`, and `require_target(target)` ([engines](extensions/engines.md));
- `loraweave.harness`: a module whose `evaluate_harness` scores for `loraweave eval --harness`
  ([study](extensions/study.md));
- `loraweave.panel`: a module whose `panel(engine, prompt, router, max_new_tokens=, title=)` draws a router's weights for the
  page over a hub ([ui](extensions/ui.md));
- `loraweave.server`: a module of what a server counts, keeps and admits: `make_metrics()` returns its `Metrics`,
  `make_prefixes(max_bytes)` its `Prefixes`, and `make_admission(model, limits, prefixes, experts)`, where a budget is set,
  its `Admission`; `observed(app)` wraps the application to log requests, and `log_config(log_format, log_level)` configures
  `logging` ([operations](extensions/operations.md));
- `loraweave.collecting`: a module with `collect_statistics` and `record_inputs` ([statistics](extensions/statistics.md)).
"""


def first_line(folder: str, name: str) -> str:
    """The first line of the entry's file, as a table cell."""
    return said(ROOT.joinpath(*registry.modules(folder)[name].split(".")[1:]).with_suffix(".py"))


def said(path: Path) -> str:
    """Return the first paragraph of a file's docstring, as a table cell."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def folders() -> list[str]:
    """Return the lines of the table of the folders within rooms."""
    packages = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*/__init__.py"))]
    rows = [f"| `{path.parent.relative_to(ROOT)}/` | {said(path)} |" for path in packages]
    return ["| folder | what it has |", "|---|---|", *rows]


def extensions() -> list[str]:
    """Return the lines of the table of extensions."""
    places = registry.extensions().items()
    rows = [f"| [{name}](extensions/{name}.md) | {said(folder / '__init__.py')} |" for name, folder in places]
    return ["| extension | what it answers |", "|---|---|", *rows]


def tables(packages: Callable[[str], bool], heading: str = "##") -> list[str]:
    """Return the table of each registry, of its files in the packages that count; a registry without one is left out."""
    parts = []
    for folder in registry.registries():
        places = {name: module.rpartition(".")[0] for name, module in sorted(registry.modules(folder).items())}
        places = {name: place for name, place in places.items() if packages(f"{place}.")}
        if places:
            kept = sorted(set(places.values()))
            shown = " and ".join(f"`{place.removeprefix('loraweave.').replace('.', '/')}/`" for place in kept)
            parts.append("\n".join([f"{heading} {folder}", f"Files of {shown}.", "", *table(folder, places), ""]))
    return parts


def table(folder: str, names: Iterable[str]) -> list[str]:
    """Return the lines of the table of entries of a registry."""
    return ["| name | what it is |", "|---|---|", *(f"| `{name}` | {first_line(folder, name)} |" for name in names)]


def filled(path: Path) -> str:
    """Return a page with the tables within it as they should be."""

    def entries(match: re.Match[str]) -> str:
        before, folder, after = match.groups()
        if "entries of" not in before:
            return "\n".join([before, *{"folders": folders, "extensions": extensions}[folder](), "", after])
        extension = f"{registry.EXTENSIONS}.{path.stem}."
        of_page = of_core if path.parent.name != "extensions" else lambda module: module.startswith(extension)
        names = [name for name, module in sorted(registry.modules(folder).items()) if of_page(module)]
        return "\n".join([before, *table(folder, names), "", after])

    return WITHIN.sub(entries, path.read_text(encoding="utf-8"))


def of_core(package: str) -> bool:
    """Return True if a package, with a dot at its end, is the core's."""
    return package.startswith("loraweave.") and not package.startswith(f"{registry.EXTENSIONS}.")


def declared() -> str:
    """Return the section on what a file may say of itself, and on the parameters that it is given."""
    traits = [
        f"| {folder} | `{word}` | {text} |" for folder, words in registry.TRAITS.items() for word, text in words.items()
    ]
    given = [
        f"| {folder} | `{name}` | {text} |" for folder, names in registry.RESERVED.items() for name, text in names.items()
    ]
    return "\n".join(
        [
            "## What an entry says of itself",
            "`@traits(..)` of `loraweave.extend` above a function or class says what its conformance suite has to know:",
            "",
            "| registry | trait | what is true of the entry |",
            "|---|---|---|",
            *traits,
            "",
            "A parameter of one of these names is no option of a user's. The entry that has it is given:",
            "",
            "| registry | parameter | what it is given |",
            "|---|---|---|",
            *given,
            "",
        ]
    )


def kits() -> list[str]:
    """Return the name of every kit of `loraweave.extend`, sorted."""
    return [kit.name for kit in pkgutil.iter_modules(extend.__path__)]


def made_from() -> str:
    """Return the section on `loraweave.extend` and its kits."""
    modules = [extend, *(importlib.import_module(f"loraweave.extend.{kit}") for kit in kits())]
    names = [f"| `{module.__name__}` | {said(Path(module.__file__ or ''))} | {len(module.__all__)} |" for module in modules]
    return "\n".join(
        [
            "## What a file is made from",
            "An extension or another package imports `loraweave`, `loraweave.extend` and its kits, nothing deeper:",
            "",
            "| module | what one writes with it | names |",
            "|---|---|---|",
            *names,
            "",
        ]
    )


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, made_from(), declared(), *tables(of_core)])


def pages() -> dict[Path, str]:
    """Return {page: its text as it should be}."""
    others = [path for path in (ROOT / "docs").rglob("*.md") if WITHIN.search(path.read_text(encoding="utf-8"))]
    return {TARGET: page(), **{path: filled(path) for path in sorted(others) if path != TARGET}}


if __name__ == "__main__":
    for path, text in pages().items():
        if path.read_text(encoding="utf-8") == text:
            continue
        if sys.argv[1:] == ["--stale"]:
            print(path.relative_to(ROOT))
        else:
            path.write_text(text, encoding="utf-8")
