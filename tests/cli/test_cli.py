"""What every command shares, and `loraweave merge` and `train`."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from command_line import LAYERS, adapter, call, cells, process, write_rows

import loraweave as lw
from loraweave.cli import app
from loraweave.cli._application import PURPOSES
from loraweave.cli._inputs import read_pool
from loraweave.registry import EXTENSIONS

COMMANDS = ["compose", "eval", "export", "merge", "serve", "train"]
HUB_COMMANDS = ["add", "bind", "gc", "list", "remove", "save-composition", "search", "show", "verify"]
ROOT = typer.main.get_command(app)
# with those of extensions
EVERY = [name for name in ROOT.commands if name != "hub"]
HEAVY = ("torch", "transformers", "peft", "sklearn", "faiss", "scipy", "cma", "matplotlib", "numpy")


def test_neither_help_nor_the_version_nor_listing_a_hub_imports_what_is_heavy(tmp_path):
    lw.Hub(tmp_path / "adapters").close()
    calls = [["--help"], *([name, "--help"] for name in EVERY), ["--version"], ["hub", "list", "--help"], ["hub", "list"]]
    code = f"""
import sys
from loraweave.cli import app
for words in {calls}:
    app(words, prog_name="loraweave", standalone_mode=False)
    print(words, set({HEAVY}) & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"{words} set()" for words in calls]


def test_the_root_help_lists_every_command():
    shown = call("--help").stdout
    assert [name for name in [*EVERY, "hub"] if f"\n  {name} " not in shown] == []


def test_the_root_help_groups_the_commands_and_answers_to_h():
    shown = call("-h").stdout
    assert shown == call("--help").stdout
    assert "--install-completion" in shown
    assert shown.index("\nCompose:") < shown.index("  compose ") < shown.index("\nServe:") < shown.index("  serve ")
    assert {name for names in PURPOSES.values() for name in names} <= set(ROOT.commands)


@pytest.mark.parametrize("words", [*([name] for name in EVERY), *(["hub", name] for name in ROOT.commands["hub"].commands)])
def test_the_help_of_a_command_has_no_python_types(words):
    assert re.findall(r"<(?:str|list|int|float|path)[^>]*>", call(*words, "-h").stdout, re.IGNORECASE) == []


@pytest.mark.parametrize(("flags", "notes", "logs"), [((), True, False), (("-q",), False, False), (("-v",), True, True)])
def test_quiet_leaves_notes_out_and_verbose_shows_what_is_logged(tmp_path, flags, notes, logs):
    code = f"""
import logging, sys
from loraweave.cli import _application, hub, main
def gc(*_, **__):
    _application.note("a note")
    logging.getLogger("loraweave.hub").info("a log line")
    logging.getLogger("other").info("of others")
hub.hub.command("noted")(lambda: gc())
sys.argv = ["loraweave", "hub", "noted", *{flags!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (("a note" in done.stderr), ("a log line" in done.stderr), "of others" in done.stderr) == (notes, logs, False)


@pytest.mark.parametrize("value", ["-v", "-q", "--debug"])
def test_a_value_that_looks_like_a_flag_is_the_value(here, value):
    adapter("one").save_pretrained("one")
    assert call("hub", "add", "one", "--description", value, "-q").exit_code == 0
    assert json.loads(call("hub", "show", "one", "--json", "--debug").stdout)["description"] == value


@pytest.mark.parametrize("flags", [["-q"], ["--verbose"], ["-q", "-v"]])
def test_a_command_leaves_the_level_of_the_log_as_it_was(here, flags):
    log = logging.getLogger("loraweave")
    before = log.level
    assert call("hub", "list", "--hub", "nowhere", *flags).exit_code == 1
    assert log.level == before


@pytest.mark.parametrize("settings", ["", "; logging.basicConfig()"])
def test_the_log_is_silent_until_the_program_asks_for_it(settings):
    code = f"import logging, loraweave{settings}; logging.getLogger('loraweave.hub').warning('a line')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ("a line" in done.stderr) == bool(settings)


@pytest.mark.parametrize("words", [*([name] for name in EVERY), *(["hub", name] for name in ROOT.commands["hub"].commands)])
def test_every_command_teaches_by_an_example(words):
    shown = " ".join(call(*words, "--help").stdout.split())
    assert f"Example: loraweave {' '.join(words)} " in shown


@pytest.mark.parametrize("words", [[], ["hub"]])
def test_the_list_of_commands_has_the_whole_first_sentence_of_each(words):
    listed = " ".join(call(*words, "-h").stdout.split())
    group = ROOT.commands["hub"] if words else ROOT
    for command in group.commands.values():
        assert " ".join(command.help.split("\n\n")[0].split()).split(". ")[0].rstrip(".") in listed


def test_the_commands_of_the_core_are_pinned():
    def of_core(group):
        commands = group.commands.items()
        return {name for name, command in commands if not getattr(command.callback, "__module__", "").startswith(EXTENSIONS)}

    assert of_core(ROOT) == {*COMMANDS, "hub"}
    assert of_core(ROOT.commands["hub"]) == set(HUB_COMMANDS)


def test_the_module_runs_like_the_command(tmp_path):
    done = process("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"loraweave {lw.__version__}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mrege"], "UsageError: there is no command 'mrege', did you mean 'merge'?; `loraweave -h` explains"),
        (["hub", "serch"], "UsageError: there is no command 'serch', did you mean 'search'?; `loraweave hub -h` explains"),
        (["--quite"], "UsageError: there is no option --quite, did you mean '--quiet'?; `loraweave -h` explains"),
        (["merge", "a", "b", "--ot", "m"], "there is no option --ot, did you mean '--out'?; `loraweave merge -h` explains"),
        (["hub", "search", "-k", "3", "text"], "there is no option -k, did you mean '--k'?"),
        (["merge", "pool/left"], "UsageError: --out is missing; `loraweave merge -h` explains"),
        (["merge", "--out", "m"], "UsageError: ADAPTER is missing; `loraweave merge -h` explains"),
        (["merge", "pool/left", "--out"], "UsageError: the option '--out' needs a value"),
        (["hub", "show", "a", "b"], "UsageError: too many arguments (b); `loraweave hub show -h` explains"),
        (["merge", "pool/left", "--out", "m", "--rank", "two"], "UsageError: --rank must be a whole number;"),
        (["compose", "--instruction", "a", "--prune", "x"], "UsageError: --prune must be a number;"),
        (["serve", "--port", "80800"], "UsageError: --port must be less than or equal to 65535;"),
        (["serve", "--log-format", "xml"], "UsageError: --log-format: 'xml' is not one of 'text', 'json';"),
        (["eval", "nowhere"], "UsageError: FOLDER: folder 'nowhere' does not exist;"),
        (["merge", "pool/left", "--out", "m", "--rank", "0"], "--rank"),
        (["merge", "pool/left", "pool/right", "--out", "m", "--weights", "1"], "1 numbers for 2 adapters"),
        (["merge", "l", "r", "--out", "m", "--weights", "0.7", "0.3"], "commas, without blanks: --weights 0.7,0.3"),
        (["merge", "l", "r", "--out", "m", "--weights", "0.7,", "0.3"], "commas, without blanks: --weights 0.7,0.3"),
        (["merge", "pool/left", "--out", "m", "--weights", "much"], "'much' is not a number"),
        (["merge", "pool/left", "--out", "m", "--weights", "nan"], "'nan' is not finite"),
        (["merge", "pool/left", "--out", "m", "--option", "density"], "takes NAME=VALUE"),
        (["merge", "pool/left", "--out", "m", "--option", "rank=3"], "its own flag"),
        (["compose", "--examples", "missing.jsonl"], "'missing.jsonl' does not exist"),
        (["compose", "--examples", "rows.jsonl", "--weight", "0.5"], "takes NAME=NUMBER"),
        (["compose", "--examples", "rows.jsonl", "--option", "task=pick"], "its own flag"),
        (["compose", "--examples", "rows.jsonl", "--labels", "b,b"], "two or more different labels"),
        (["compose", "--examples", "rows.jsonl", "--budget", "0"], "--budget"),
        (["eval", "nowhere", "rows.jsonl"], "'nowhere' does not exist"),
        (["train", "rows.jsonl", "pool/rows.jsonl", "--out", "t"], "two files would make the adapter 'rows'"),
        (["train", "rows.jsonl", "--out", "t", "--instruction", "a", "--instruction", "b"], "2 times for 1 files"),
    ],
)
def test_wrong_usage_leaves_with_status_2_and_says_why(two, rows, words, said):
    (two / "rows.jsonl").write_text(rows.read_text())
    done = call(*words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not Path("m").exists()


def test_a_named_error_is_one_line_of_stderr_and_status_1(two):
    done = process("merge", "pool/left", "pool/nobody", "--out", "m", cwd=two.parent)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("AdapterNotFound: no folder 'pool/nobody'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("place", [0, 3])
def test_debug_lets_the_error_through_with_its_traceback_wherever_it_is_written(two, place):
    words = ["merge", "pool/left", "nobody", "--out", "m"]
    with pytest.raises(lw.AdapterNotFound, match="no folder 'nobody'"):
        call(*words[:place], "--debug", *words[place:], catch_exceptions=False)


def test_debug_shows_the_traceback(two):
    done = process("merge", "pool/left", "nobody", "--out", "m", "--debug", cwd=two.parent)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "AdapterNotFound: no folder 'nobody'" in done.stderr


def test_debug_after_two_dashes_is_an_argument_like_any_other(here):
    done = call("merge", "--out", "m", "--", "--debug")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterNotFound")


def test_an_unknown_method_names_the_nearest(two):
    done = call("merge", two / "left", two / "right", "--method", "linaer", "--out", "m")
    assert done.exit_code == 1
    assert done.stderr.startswith("UnknownName: no method 'linaer', did you mean 'linear'?")


def test_an_error_of_the_file_system_is_one_line_too(two, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(5, "Input/output error", "somewhere")

    monkeypatch.setattr("loraweave.composer.merge.merge.merge", fail)
    done = call("merge", two / "left", "--out", "m")
    assert (done.exit_code, done.stderr) == (1, "OSError: [Errno 5] Input/output error: 'somewhere'\n")


def test_a_message_of_several_lines_becomes_one_without_control_characters(two, monkeypatch):
    def fail(*_args, **_options):
        raise lw.LayerMismatch("first\nsecond \x1b[31mred")

    monkeypatch.setattr("loraweave.composer.merge.merge.merge", fail)
    assert call("merge", two / "left", "--out", "m").stderr == "LayerMismatch: first second  [31mred\n"


def test_an_interruption_is_one_line_and_status_130(two, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("loraweave.composer.merge.merge.merge", interrupt)
    done = call("merge", two / "left", "--out", "m")
    assert (done.exit_code, done.stderr, done.stdout) == (130, "interrupted\n", "")


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_from_the_keyboard_ends_a_command_with_130(tmp_path):
    lw.Hub(tmp_path / "adapters").close()
    code = (
        # a shell that runs the tests in the background lets programs ignore this signal
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import loraweave.hub.hub as module\n"
        f"module.Hub.gc = lambda self: os.kill(os.getpid(), {int(signal.SIGINT)}) or __import__('time').sleep(30)\n"
        "from loraweave.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "hub", "gc"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("words", [("hub", "gc"), ("hub", "gc", "--debug")])
def test_what_libraries_say_while_they_start_stands_above_no_error(tmp_path, words):
    lw.Hub(tmp_path / "adapters").close()
    code = """
import logging, warnings
import torch, transformers
import loraweave.hub.hub as module
from loraweave.errors import HubCorrupt

def gc(hub):
    for name in ("torchao", "torch.utils._pytree", "some.library", "loraweave.hub.search.search"):
        logging.getLogger(name).warning("said by %s", name)
    warnings.warn("it will be gone", FutureWarning)
    warnings.warn("mind the licenses")
    raise HubCorrupt("the catalogue is gone")

module.Hub.gc = gc
from loraweave.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    theirs = ("said by torchao", "said by torch.utils._pytree", "said by some.library", "it will be gone")
    assert all((text in done.stderr) is ("--debug" in words) for text in theirs)
    # what loraweave itself has to say is said
    assert "said by loraweave.hub.search.search" in done.stderr
    assert "mind the licenses" in done.stderr
    assert "HubCorrupt: the catalogue is gone" in done.stderr.splitlines()[-1]


def test_merge_writes_the_weighted_sum(two):
    done = call("merge", two / "left", two / "right", "--weights", "-0.4,0.7", "--out", "m")
    assert done.exit_code == 0, done.stderr
    merged = lw.Adapter.from_pretrained("m")
    want = -0.4 * adapter("left", 0).delta(LAYERS[1]) + 0.7 * adapter("right", 1).delta(LAYERS[1])
    torch.testing.assert_close(merged.delta(LAYERS[1]), want)
    assert merged.name == "m"


def test_merge_without_weights_takes_equal_shares(two):
    call("merge", two / "left", two / "right", "--out", "m", "--name", "half of each")
    merged = lw.Adapter.from_pretrained("m")
    want = (adapter("left", 0).delta(LAYERS[0]) + adapter("right", 1).delta(LAYERS[0])) / 2
    torch.testing.assert_close(merged.delta(LAYERS[0]), want)
    assert merged.name == "half of each"


def test_merge_reports_the_error_of_a_cut_rank_for_each_layer(two):
    done = call("merge", two / "left", two / "right", "--rank", "1", "--out", "m", "--json")
    told = json.loads(done.stdout)
    full = (adapter("left", 0).delta(LAYERS[0]) + adapter("right", 1).delta(LAYERS[0])).double()
    values = torch.linalg.svdvals(full)
    error = float(values[1:].norm() / values.norm())
    assert sorted(told["layers"]) == sorted(LAYERS)
    row = told["layers"][LAYERS[0]]
    assert (row["rank_in"], row["rank_out"], row["relative_error"]) == (4, 1, pytest.approx(error, rel=1e-4))
    assert told["adapters"] == [{"name": "left", "weight": 0.5}, {"name": "right", "weight": 0.5}]
    assert sorted(told["parents"]) == ["left", "right"]


def test_merge_lists_its_methods_with_their_options():
    told = call("merge", "--list-methods").stdout
    assert all(name in told for name in lw.names("methods"))
    assert "density" in told


def test_merge_draws_its_report(two):
    call("merge", two / "left", two / "right", "--out", "m", "--plot", "shares.svg")
    assert "<svg" in Path("shares.svg").read_text()


def test_merge_sums_its_report_up_by_module(two):
    done = call("merge", two / "left", two / "right", "--rank", "3", "--out", "m")
    row = next(line for line in done.stdout.splitlines() if "q_proj" in line)
    assert cells(row)[:4] == ["q_proj", "2", "4", "3"]


def test_merge_takes_names_of_the_hub(two):
    with lw.Hub("adapters") as opened:
        opened.add(adapter("wörds & /signs", 5))
    done = call("merge", two / "left", "wörds & /signs", "--out", "m")
    assert done.exit_code == 0, done.stderr
    want = (adapter("left", 0).delta(LAYERS[0]) + adapter("x", 5).delta(LAYERS[0])) / 2
    torch.testing.assert_close(lw.Adapter.from_pretrained("m").delta(LAYERS[0]), want)


def test_merge_names_near_misses_of_the_hub(here):
    with lw.Hub("adapters") as opened:
        opened.add(adapter("antonym"))
    done = call("merge", "antonmy", "--out", "m")
    assert (done.exit_code, "did you mean 'antonym'?" in done.stderr) == (1, True)


def test_a_word_that_is_a_folder_and_in_the_hub_is_refused(here):
    adapter("both", 1).save_pretrained("both")
    with lw.Hub("adapters") as opened:
        opened.add(adapter("both", 2))
    done = call("merge", "both", "--out", "m")
    assert (done.exit_code, "write ./both for the folder" in " ".join(done.stderr.split())) == (2, True)
    assert call("merge", "./both", "--out", "m").exit_code == 0


def test_merge_replaces_an_earlier_result_by_force_and_nothing_else(two):
    assert call("merge", two / "left", "--out", "m").exit_code == 0
    done = call("merge", two / "right", "--out", "m")
    assert (done.exit_code, done.stderr.split(":")[0], "--force" in done.stderr) == (1, "AdapterExists", True)
    assert lw.Adapter.from_pretrained("m").hash == lw.Adapter.from_pretrained(two / "left").hash
    assert call("merge", two / "right", "--out", "m", "--force").exit_code == 0
    assert lw.Adapter.from_pretrained("m").hash == lw.Adapter.from_pretrained(two / "right").hash
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear")
    done = call("merge", two / "left", "--out", "mine")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterExists")
    assert os.listdir("mine") == ["diary.txt"]


def test_train_makes_a_folder_for_each_file(here, base):
    for name in ("next", "previous"):
        write_rows(here / f"{name}.jsonl", [{"input": "a", "target": "b", "definition": f"{name} letter"}] * 4)
    words = ["next.jsonl", "previous.jsonl", "--out", "trained", "--base", base, "--rank", "2", "--steps", "3", "--json"]
    done = call("train", *words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == [
        {"name": name, "rows": 4, "rank": 2, "out": f"trained/{name}"} for name in ("next", "previous")
    ]
    card = lw.Adapter.from_pretrained("trained/next").card
    assert (card["description"], card["examples"]) == ("next letter", ["a"] * 4)
    assert list(read_pool(Path("trained"))) == ["next", "previous"]


def test_train_holds_out_a_share_of_the_rows_and_ends_by_patience(here, base, rows):
    words = ["train", rows, "--out", "trained", "--base", base, "--rank", "1", "--steps", "40", "--lr", "1"]
    assert call(*words, "--held-out", "0.5", "--patience", "1").exit_code == 0
    told = lw.Adapter.from_pretrained("trained/rows").card["training"]
    points = [loss for step, loss in told["held_out"] if step]
    assert told["steps"] == 10 * len(points) == told["best_step"] + 10
    assert points[-1] >= points[-2]
    refused = call(*words, "--patience", "1")
    assert (refused.exit_code, "patience is 1, but nothing is held out" in refused.stderr) == (1, True)


def test_train_goes_on_from_its_checkpoint(here, base, rows, monkeypatch):
    words = ["train", rows, "--out", "trained", "--base", base, "--rank", "1", "--steps", "2"]
    assert call(*words).exit_code == 0
    first = lw.Adapter.from_pretrained("trained/rows").hash
    monkeypatch.setattr("loraweave.composer.train.shared.SharedTraining._run", lambda *_, **__: pytest.fail("trained again"))
    assert call(*words).exit_code == 0
    assert lw.Adapter.from_pretrained("trained/rows").hash == first


def test_only_the_rows_of_the_split_are_used(here, base, monkeypatch):
    file = write_rows(here / "s.jsonl", [{"input": s, "target": "b", "split": s} for s in ("train", "test", "train")])
    seen = []
    monkeypatch.setattr(
        "loraweave.composer.train.adapters.train_adapters", lambda _m, _t, tasks, **_: seen.append(tasks) or {}
    )
    call("train", file, "--out", "t", "--base", base)
    call("train", file, "--out", "t", "--base", base, "--split", "test")
    assert [[text for text, _ in tasks["s"].examples] for tasks in seen] == [["train", "train"], ["test"]]
