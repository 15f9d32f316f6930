"""The rules of extensions: who imports whom, what goes when one goes, and that a stranger's package does what ours do."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from import_statements import MODULES, ROOT, imported, parsed

import loraweave as lw
from loraweave import registry

NAMES = sorted(registry.extensions())
PREFIX = f"{registry.EXTENSIONS}."
CORE = {name: path for name, path in MODULES.items() if not f"{name}.".startswith(PREFIX)}
FACE = {name for name in MODULES if f"{name}.".startswith("loraweave.extend.")}
HEAVY = ("torch", "transformers", "peft", "sklearn", "faiss", "scipy", "cma", "matplotlib", "numpy", "starlette")


def of_extension(name):
    """{module: path} of an extension."""
    package = f"{PREFIX}{name}"
    return {module: path for module, path in MODULES.items() if f"{module}.".startswith(f"{package}.")}


def texts(path):
    """Every text in a file that is no docstring or other statement of its own."""
    apart = {id(node.value) for node in ast.walk(parsed(path)) if isinstance(node, ast.Expr)}
    nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant) and id(node) not in apart]
    return {node.value for node in nodes if isinstance(node.value, str)}


def test_each_folder_with_an_init_file_is_an_extension():
    assert {path.parent.name for path in (ROOT / "extensions").glob("*/__init__.py")} == set(NAMES)


# who may import what


def test_the_core_names_no_extension_in_an_import_or_a_text_but_where_they_are_looked_for():
    naming = {name for name, path in CORE.items() if registry.EXTENSIONS in path.read_text(encoding="utf-8")}
    assert naming == {"loraweave.registry"}
    assert [text for text in texts(CORE["loraweave.registry"]) if text.startswith(PREFIX)] == []


@pytest.mark.parametrize("name", NAMES)
def test_no_public_name_of_an_extension_is_a_module_that_would_take_its_place_once_imported(name):
    public = importlib.import_module(PREFIX + name).__all__
    assert [word for word in public if f"{PREFIX}{name}.{word}" in MODULES] == []


@pytest.mark.parametrize("name", NAMES)
def test_an_extension_imports_the_public_names_the_face_for_those_who_extend_and_itself(name):
    allowed = {"loraweave", *FACE, *of_extension(name)}
    wrong = set()
    for module, path in of_extension(name).items():
        ours = {other for other in imported(path, MODULES) if other.split(".")[0] == "loraweave"}
        wrong |= {(module, other) for other in (ours | texts(path) & set(MODULES)) - allowed}
    assert wrong == set()


def test_the_core_does_not_import_its_own_face_for_those_who_extend():
    assert {name for name, path in CORE.items() if FACE & imported(path, MODULES)} == set()


@pytest.mark.parametrize("face", sorted(FACE))
def test_every_name_for_those_who_extend_is_that_of_its_module_and_documented_unless_it_is_a_value(face):
    kit = importlib.import_module(face)
    assert dir(kit) == kit.__all__ == sorted(set(kit.__all__))
    assert {name for names in kit._MODULES.values() for name in names.split()} == set(kit.__all__)
    for module, names in kit._MODULES.items():
        for name in names.split():
            value = getattr(kit, name)
            origin = importlib.import_module(f"loraweave.{module}")
            assert value is getattr(origin, name)
            if callable(value) and getattr(value, "__module__", "").startswith("loraweave"):
                assert value.__doc__, name
    with pytest.raises(AttributeError, match=f"'{re.escape(face)}' has no attribute 'Nothing'"):
        kit.Nothing  # noqa: B018


def test_a_name_for_those_who_extend_stands_in_one_kit_alone_and_is_used_by_an_extension_a_test_or_a_page():
    names = [name for face in FACE for name in importlib.import_module(face).__all__]
    assert sorted(names) == sorted(set(names))
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    shown = re.findall(r"^from loraweave\.extend[.\w]* import (.+)$", pages, re.MULTILINE)
    used = {name for line in shown for name in line.split(", ")}
    for path in (*(ROOT / "extensions").rglob("*.py"), *(ROOT / "tests").rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module in FACE:
                used |= {alias.name for alias in node.names}
    assert set(names) - used == set()


def test_the_face_for_those_who_extend_and_its_kits_load_no_other_package_until_a_name_is_used(tmp_path):
    told = run(ROOT, f"import sys, {', '.join(sorted(FACE))}; print([name for name in {HEAVY} if name in sys.modules])")
    assert told.strip() == "[]"


def test_the_stubs_by_which_type_checkers_see_the_names_that_a_process_loads_are_up_to_date():
    words = [sys.executable, ROOT / "scripts" / "stub.py", "--stale"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize("name", NAMES)
def test_the_public_names_of_an_extension_are_documented(name):
    package = importlib.import_module(PREFIX + name)
    assert package.__doc__
    assert package.__all__ == sorted(package.__all__) != []
    assert [public for public in package.__all__ if not getattr(package, public).__doc__] == []


# what an extension adds to the core


@pytest.mark.parametrize("folder", registry.registries())
def test_no_extension_takes_a_name_that_the_core_or_another_extension_has(folder):
    taken = set()
    for package, paths in registry._places(folder, registry.FOLDERS.get(folder, ()), tuple(sys.path)).items():
        files = {path.stem for place in paths for path in Path(place).glob("[!_]*.py")}
        assert not package.startswith(PREFIX) or files & taken == set()
        taken |= files


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_an_extension_is_a_registry_and_its_page_names_every_entry(name):
    page = ROOT / "docs" / "extensions" / f"{name}.md"
    entries = [
        entry
        for folder in registry.registries()
        for entry, module in registry.modules(folder).items()
        if module.startswith(f"{PREFIX}{name}.")
    ]
    assert [entry for entry in entries if f"`{entry}`" not in page.read_text(encoding="utf-8")] == []
    assert (ROOT / "tests" / "extensions" / name).is_dir()


def test_an_entry_in_a_folder_of_an_extension_is_one_of_the_registry_and_none_is_imported_to_list_it(tmp_path):
    add(tmp_path, "loraweave/extensions/mine/__init__.py", "raise RuntimeError('imported')")
    add(tmp_path, "loraweave/extensions/mine/methods/__init__.py")
    add(tmp_path, "loraweave/extensions/mine/methods/newcomer.py", "def newcomer(): 'Nothing yet.'")
    add(tmp_path, "loraweave/extensions/mine/methods/ties.py", "def ties(): 'Not ours.'")
    add(tmp_path, "loraweave/extensions/mine/recipes/__init__.py")
    add(tmp_path, "loraweave/extensions/mine/recipes/guest.py", "class Guest: 'A recipe.'")
    add(tmp_path, "loraweave/extensions/mine/spells/__init__.py")
    add(tmp_path, "loraweave/extensions/mine/spells/charm.py", "def charm(): 'A registry of its own.'")
    mirror(tmp_path)
    told = run(
        tmp_path,
        """
import json, pathlib, sys
from loraweave import registry
names = {folder: registry.names(folder) for folder in ("methods", "experts", "spells")}
ties = registry.get("methods", "ties").__module__
pathlib.Path(registry.extensions()["mine"], "__init__.py").write_text("")
got = [registry.get(*pair).__module__ for pair in (("methods", "newcomer"), ("experts", "guest"), ("spells", "charm"))]
print(json.dumps([names, registry.registries(), ties, got]))
""",
    )
    names, registries, ties, got = json.loads(told)
    assert set(names["methods"]) - set(lw.names("methods")) == {"newcomer"}
    assert set(names["experts"]) - set(lw.names("experts")) == {"guest"}
    assert names["spells"] == ["charm"]
    assert registries == [*registry.FOLDERS, "spells"]
    assert ties == "loraweave.composer.merge.methods.ties"
    assert got == [f"{PREFIX}mine.{rest}" for rest in ("methods.newcomer", "recipes.guest", "spells.charm")]


def test_neither_an_extension_nor_its_commands_import_what_is_heavy():
    modules = [*(PREFIX + name for name in NAMES), *registry.brought("commands").values()]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    print(module, set({HEAVY}) & set(sys.modules))
"""
    assert run(ROOT, code).splitlines() == [f"{module} set()" for module in modules]


# what is left when one is taken away

EVERYTHING = """
import contextlib, io, json, os, sys
# what is imported here is not ours, so that each of the processes below need not
import numpy, peft, torch, transformers
for hidden in sys.argv[1:]:
    sys.stdout.flush()
    if os.fork():
        assert os.wait()[1] == 0, hidden
        continue
    sys.path.insert(0, hidden)
    import loraweave as lw
    from loraweave import registry
    entries = {folder: registry.modules(folder) for folder in registry.registries()}
    for name in lw.__all__:
        getattr(lw, name)
    from loraweave.cli import app
    with contextlib.redirect_stdout(io.StringIO()) as told:
        app(["--help"], prog_name="loraweave", standalone_mode=False)
    # the sections after the options are those of commands
    _, *sections = told.getvalue().partition("Options:")[2].split("\\n\\n")
    listed = [line for section in sections for line in section.splitlines()[1:]]
    commands = [line.split()[0] for line in listed if line[2:3].strip()]
    print(json.dumps([lw.__file__, sorted(registry.extensions()), entries, commands, sorted(sys.modules)]))
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """{extension: what a process that has all but this one says}, and under "" one that has none."""
    folders = {}
    for name in ("", *NAMES):
        folders[name] = tmp_path_factory.mktemp("without")
        mirror(folders[name], [other for other in NAMES if name and other != name])
    lines = run(ROOT, EVERYTHING, *folders.values()).splitlines()
    told = {name: json.loads(line) for name, line in zip(folders, lines, strict=True)}
    assert {name: Path(file).parents[1] for name, (file, *_) in told.items()} == folders
    return told


@pytest.mark.parametrize("name", ["", *NAMES])
def test_without_an_extension_everything_else_is_there(name, without):
    _, extensions, entries, commands, modules = without[name]
    gone = [other for other in NAMES if name in ("", other)]
    prefixes = tuple(f"{PREFIX}{other}." for other in gone)
    assert extensions == [other for other in NAMES if other not in gone]
    everything = {folder: registry.modules(folder) for folder in registry.registries()}
    kept = {
        folder: {entry: module for entry, module in held.items() if not module.startswith(prefixes)}
        for folder, held in everything.items()
    }
    assert entries == {folder: held for folder, held in kept.items() if held or folder in registry.FOLDERS}
    assert set(commands) == set(all_commands()) - {command for other in gone for command in commands_of(other)}
    assert [module for module in modules if f"{module}.".startswith(prefixes)] == []


def all_commands():
    import typer.main

    from loraweave.cli import app

    return typer.main.get_command(app).commands


def commands_of(name):
    module = f"{PREFIX}{name}.commands"
    return [called for called, command in all_commands().items() if getattr(command.callback, "__module__", "") == module]


# a package from elsewhere

STRANGER = {
    "methods/half_sum.py": """
        from loraweave.extend import Share, algebra, get
        def half_sum(experts, weights, *, share: Share = 0.5):
            "A share of the sum."
            return get("methods", "linear")(experts, [share * weight for weight in weights])
    """,
    "routers/even.py": """
        import torch
        from loraweave.extend import NonNegative
        from loraweave.extend.routing import TokenRouter
        class Even(TokenRouter):
            "The same weight for every expert."
            def __init__(self, pool, *, height: NonNegative = 0.5):
                super().__init__(pool)
                self.height = height
            def weights(self, x_BTI, layer):
                return torch.full((*x_BTI.shape[:2], len(self.experts)), self.height)
    """,
    "recipes/narrow.py": """
        from dataclasses import dataclass
        from loraweave.extend import get
        @dataclass(frozen=True, kw_only=True)
        class Narrow(get("experts", "mixtral")):
            "One expert a token."
            top_k: int = 1
    """,
    "verbs.py": """
        import typer
        from loraweave.extend.commands import DEFAULT_HUB, HubOption, JsonOption, open_hub, print_json
        app, hub = typer.Typer(), typer.Typer()
        @app.command("count", epilog="Example: loraweave count --hub adapters")
        def count(hub: HubOption = DEFAULT_HUB, as_json: JsonOption = False):
            "Count the adapters of a hub."
            with open_hub(hub) as opened:
                print_json(len(opened)) if as_json else typer.echo(f"{len(opened)} adapters")
        @app.command("merge")
        def merge():
            "Not ours."
        @hub.command("names")
        def names(hub: HubOption = DEFAULT_HUB):
            "List names."
            with open_hub(hub) as opened:
                typer.echo(" ".join(record.name for record in opened))
    """,
    "broken_verbs.py": "raise RuntimeError('no luck')",
    "stranger.md": "# A page of a stranger's",
}
POINTS = """
[loraweave.methods]
half_sum = stranger.methods.half_sum
[loraweave.routers]
even = stranger.routers.even
[loraweave.recipes]
narrow = stranger.recipes.narrow
[loraweave.commands]
stranger = stranger.verbs
unlucky = stranger.broken_verbs
[loraweave.pages]
stranger = stranger
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """The package `stranger`, as pip would have put it on the path."""
    for name, text in STRANGER.items():
        add(tmp_path, f"stranger/{name}", re.sub(r"^ {8}", "", text, flags=re.MULTILINE))
    for folder in ("", "methods/", "routers/", "recipes/"):
        add(tmp_path, f"stranger/{folder}__init__.py")
    add(tmp_path, "stranger-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    add(tmp_path, "stranger-1.0.dist-info/entry_points.txt", POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "stranger"]:
        del sys.modules[name]


def test_a_stranger_has_a_method_a_router_and_a_recipe_made_from_the_face_alone(stranger, make_adapter, tiny_llama):
    assert "half_sum" in lw.names("methods")
    assert not any(name.startswith("stranger") for name in sys.modules)
    a, b = adapters = [make_adapter(tiny_llama, name, seed=seed) for seed, name in enumerate("ab")]
    merged, layer = lw.merge([a, b], [1.0, 1.0], method="half_sum", share=0.25, progress=False), next(iter(a.layers))
    assert torch.allclose(merged.delta(layer), 0.25 * (a.delta(layer) + b.delta(layer)), atol=1e-6)
    with pytest.raises(lw.WeightingError, match="share"):
        lw.merge([a, b], method="half_sum", share=0.0)
    assert lw.router("even", lw.ExpertPool(adapters), height=0.25).height == 0.25
    with lw.experts("narrow", tiny_llama, num_experts=2) as model:
        assert (model.recipe.name, model.recipe.top_k) == ("narrow", 1)


def test_a_stranger_has_commands_beside_ours_and_in_the_group_of_the_hub(stranger, here, capsys):
    from command_line import adapter, call

    with lw.Hub(here / "adapters") as hub:
        for seed, name in enumerate(("left", "right")):
            hub.add(adapter(name, seed))
    done = call("count", "--hub", here / "adapters")
    assert (done.exit_code, done.stdout) == (0, "2 adapters\n")
    unlucky = "'unlucky' (stranger.broken_verbs) cannot be used: RuntimeError: no luck\n"
    assert capsys.readouterr().err == f"warning: the commands of {unlucky}"
    assert call("count", "--json").stdout == "2\n"
    assert call("hub", "names").stdout == "left right\n"
    assert "Not ours" not in call("merge", "--help").stdout
    missing = call("count", "--hub", here / "none")
    assert (missing.exit_code, "no hub in" in missing.stderr) == (1, True)


def test_a_stranger_has_a_page_of_the_site_and_extensions_have_theirs(stranger, monkeypatch):
    pytest.importorskip("mkdocs")
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

    monkeypatch.syspath_prepend(ROOT / "scripts")
    pages = importlib.import_module("pages")
    config = MkDocsConfig()
    config.nav, config.plugins = [{"Extensions": []}], SimpleNamespace(_current_plugin=None)
    pages.on_config(config)
    written = {path.stem for path in (ROOT / "docs" / "extensions").glob("*.md")}
    assert config.nav[0]["Extensions"] == [f"extensions/{name}.md" for name in sorted({*written, "stranger"})]
    made = pages.on_files(Files([]), config)
    assert made.get_file_from_path("extensions/stranger.md").content_string == STRANGER["stranger.md"]
    reference = made.get_file_from_path("reference/extensions.md").content_string
    for name in NAMES:
        for public in importlib.import_module(PREFIX + name).__all__:
            assert f"::: {PREFIX}{name}.{public}\n" in reference


# helpers


def add(folder, name, text=""):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def mirror(folder, extensions=()):
    """Fill `folder` with links to the product, so that it can be put on the path: the core, and these extensions."""
    package = folder / "loraweave"
    package.mkdir(exist_ok=True)
    for path in (ROOT / "loraweave").iterdir():
        if path.name != "extensions":
            (package / path.name).symlink_to(path.resolve())
    (package / "extensions").mkdir(exist_ok=True)
    for name in ("__init__.py", *extensions):
        (package / "extensions" / name).symlink_to(ROOT / "extensions" / name)


def run(first, code, *arguments):
    """Return what a process prints in which `first` is at the start of the path."""
    environment = {**os.environ, "PYTHONPATH": str(first), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    words = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(words, cwd=first, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
