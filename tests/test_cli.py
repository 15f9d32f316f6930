import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import loraweave as lw
from loraweave.cli import app
from loraweave.cli._inputs import read_pool
from loraweave.types import Factors

COMMANDS = ["compose", "demo", "eval", "explain", "export", "merge", "train"]
HUB_COMMANDS = ["add", "add-tree", "bind", "gc", "history", "list", "prune", "quarantine", "release", "remove", "rollback"]
HUB_COMMANDS += ["search", "show", "train-encoder", "verify"]
LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
PAIRS = [("a", "b"), ("c", "d"), ("e", "f")]
SETTINGS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def adapter(name, seed=0, rank=2, **fields):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.5

    layers = {layer: Factors(random(rank, 16), random(16, rank)) for layer in LAYERS}
    return lw.Adapter(name, fields.pop("base_model", "tiny"), layers, **fields)


def call(*words, **options):
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def process(*words, cwd, **options):
    command = [sys.executable, "-m", "loraweave", *map(str, words)]
    # rich and numpy would otherwise be asked for as many threads as there are cores
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, **options)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def two(here):
    for seed, name in enumerate(("left", "right")):
        adapter(name, seed).save_pretrained(here / "pool" / name)
    return here / "pool"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    known = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzIOn \n:"]
    inner = Tokenizer(WordLevel({token: index for index, token in enumerate(dict.fromkeys(known))}, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **SETTINGS, **ids)).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(here):
    return write_rows(here / "rows.jsonl", [{"input": text, "target": target} for text, target in PAIRS])


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS), ["--version"], ["hub", "list"]])
def test_neither_help_nor_listing_imports_torch(tmp_path, words):
    lw.Hub(tmp_path / "adapters").close()
    heavy = "{name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'peft', 'faiss', 'numpy'}"
    code = (
        f"import sys; sys.argv[0] = 'loraweave'\nfrom loraweave.cli import app\napp(standalone_mode=False)\nprint({heavy})"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_root_help_lists_every_command():
    shown = call("--help").stdout
    assert [name for name in [*COMMANDS, "hub"] if f"\n  {name} " not in shown] == []


@pytest.mark.parametrize("words", [*([name] for name in COMMANDS), *(["hub", name] for name in HUB_COMMANDS)])
def test_every_command_teaches_by_an_example(words):
    shown = " ".join(call(*words, "--help").stdout.split())
    assert f"Example: loraweave {' '.join(words)} " in shown


def test_the_commands_tested_here_are_all_there_are():
    root = typer.main.get_command(app)
    assert set(root.commands) == {*COMMANDS, "hub"}
    assert set(root.commands["hub"].commands) == set(HUB_COMMANDS)


def test_the_version_is_the_packages(here):
    assert (call("--version").stdout, call("--version").exit_code) == (f"loraweave {lw.__version__}\n", 0)


def test_the_module_runs_like_the_command(tmp_path):
    done = process("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"loraweave {lw.__version__}\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mrege"], "No such command 'mrege'"),
        (["merge", "pool/left"], "Missing option '--out'"),
        (["merge", "--out", "m"], "Missing argument"),
        (["merge", "pool/left", "--out", "m", "--rank", "0"], "--rank"),
        (["merge", "pool/left", "pool/right", "--out", "m", "--weights", "1"], "1 numbers for 2 adapters"),
        (["merge", "pool/left", "--out", "m", "--weights", "much"], "'much' is no number"),
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
    assert said in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert not Path("m").exists()


def test_a_named_error_is_one_line_of_stderr_and_status_1(two):
    done = process("merge", "pool/left", "pool/nobody", "--out", "m", cwd=two.parent)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("AdapterNotFound: no folder 'pool/nobody'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("place", [0, 3])
def test_debug_shows_the_traceback_wherever_it_is_written(two, place):
    words = ["merge", "pool/left", "nobody", "--out", "m"]
    done = process(*words[:place], "--debug", *words[place:], cwd=two.parent)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("loraweave.errors.AdapterNotFound: no folder 'nobody'")


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
    assert [cell.strip() for cell in row.strip("│").split("│")][:4] == ["q_proj", "2", "4", "3"]


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


def test_a_composition_is_made_scored_and_exported(two, base, rows):
    words = [
        "--base",
        base,
        "--pool",
        two,
        "--examples",
        rows,
        "--method",
        "lorahub",
        "--budget",
        "9",
        "--out",
        "c",
        "--json",
    ]
    made = process("compose", *words, cwd=two.parent)
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert {row["name"] for row in told["report"]["rows"]} >= {"base", "best_single", "uniform", "lorahub"}
    assert told["out"] == "c"

    # the base is the one that the composition names
    scored = call("eval", "c", rows, "--json")
    assert scored.exit_code == 0, scored.stderr
    model, tokenizer = lw.load_base(str(base))
    assert json.loads(scored.stdout) == pytest.approx(
        lw.Composition.from_pretrained("c", model, tokenizer).evaluate(PAIRS), rel=1e-6
    )


def test_a_composition_by_a_router_is_made_scored_and_explained_and_never_exported(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "arrow", "--out", "c"]
    made = call("compose", *words, "--option", "top_k=1")
    assert made.exit_code == 0, made.stderr
    assert "router 'arrow' weighs every adapter for each token and layer" in made.stderr
    told = json.loads(call("compose", *words, "--json").stdout)
    assert (told["weights"], told["router"], told["report"]["chosen"]) == ({}, "arrow", "arrow")
    scored = call("eval", "c", rows, "--json")
    model, tokenizer = lw.load_base(str(base))
    kept = lw.Composition.from_pretrained("c", model, tokenizer)
    assert json.loads(scored.stdout) == pytest.approx(kept.evaluate(PAIRS), rel=1e-6)
    explained = json.loads(call("explain", "c", "a text", "--json").stdout)
    assert explained["experts"] == ["left", "right"]
    exported = call("export", "c", "--out", "p")
    assert (exported.exit_code, exported.stderr.split(":")[0]) == (1, "ScopeError")
    assert not Path("p").exists()


def test_a_composition_is_pruned_tuned_and_cut_on_the_way(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--out", "c", "--method", "manual"]
    made = call(
        "compose", *words, "--weight", "left=1", "--weight", "right=1", "--prune", "100", "--tune", "2", "--rank", "1"
    )
    assert made.exit_code == 0, made.stderr
    assert "rank" in made.stdout
    model, tokenizer = lw.load_base(str(base))
    kept = lw.Composition.from_pretrained("c", model, tokenizer)
    assert [row.name for row in kept.report.rows][-3:] == ["pruned", "tuned", "cut"]
    assert (len(kept.weights), kept.adapter.rank, kept.tuned_steps) == (1, 1, 2)


def test_export_gives_the_weighted_sum_as_a_peft_folder(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--out", "c", "--method", "manual"]
    made = call("compose", *words, "--weight", "left=0.25", "--weight", "right=-1")
    assert made.exit_code == 0, made.stderr
    assert "saved to c" in made.stderr
    done = call("export", "c", "--out", "p")
    assert done.exit_code == 0, done.stderr
    want = 0.25 * adapter("left", 0).delta(LAYERS[0]) - adapter("right", 1).delta(LAYERS[0])
    torch.testing.assert_close(lw.Adapter.from_pretrained("p").delta(LAYERS[0]), want)


def test_compose_shows_its_weights_by_size(two, base, rows):
    words = ["--base", base, "--pool", two, "--examples", rows, "--method", "manual"]
    done = call("compose", *words, "--weight", "left=0.25", "--weight", "right=-1")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("│ left", "│ right"))]
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines] == [["right", "-1"], ["left", "0.25"]]


def test_compose_asks_for_licenses_before_the_base_is_loaded(here, base, rows):
    for name, license in (("left", "gpl-3.0"), ("right", "cc-by-nc-4.0")):
        adapter(name, card={"license": license}).save_pretrained(here / "pool" / name)
    words = ["compose", "--pool", "pool", "--examples", rows, "--method", "uniform", "--out", "c"]
    done = call(*words, "--base", "no/such/base")
    assert done.exit_code == 1
    assert "InvalidLicense: " in done.stderr
    with pytest.warns(UserWarning, match="this mixture may be used"):
        done = call(*words, "--base", base, "--allow-licenses")
    assert done.exit_code == 0, done.stderr
    assert "license: CC-BY-NC-4.0 AND GPL-3.0-only" in done.stderr
    assert json.loads(Path("c/composition.json").read_text())["license"] == "CC-BY-NC-4.0 AND GPL-3.0-only"


def test_compose_uses_the_hub_by_default(here, base, rows, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "loraweave.composer.compose.compose.compose", lambda *given, **options: seen.append((given, options)) or 1 / 0
    )
    lw.Hub("adapters").close()
    done = call("compose", "--base", base, "--examples", rows, "--num-examples", "2", "--instruction", "Go on.", "--k", "3")
    assert isinstance(done.exception, ZeroDivisionError)
    (_, _, source, task), options = seen[0]
    assert isinstance(source, lw.Hub)
    assert (task.examples, task.instruction) == ((("a", "b"), ("c", "d")), "Go on.")
    assert (options["method"], options["k"], options["budget"], options["seed"]) == ("auto", 3, 40, 0)


def test_compose_says_on_one_line_which_check_of_the_base_was_possible(two, base, rows):
    words = ("--base", base, "--pool", two, "--examples", rows, "--method", "manual", "--weight", "left=1", "--out", "c")
    done = call("compose", *words)
    assert done.exit_code == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "names and shapes" in line]
    assert len(told) == 1
    assert told[0].startswith(f"warning: 'left', 'right': made for 'tiny', while this model is '{base}'")


def test_a_composition_of_nothing_is_an_error_and_saves_nothing(two, base, rows):
    with lw.Hub("adapters") as hub:
        layers = {"model.layers.0.self_attn.q_proj": Factors(torch.ones(1, 8), torch.ones(8, 1))}
        hub.add(lw.Adapter("narrow", "org/narrow", layers))
    done = call("compose", "--base", base, "--examples", rows, "--out", "c")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("BaseModelMismatch: none of the hub's 1 adapters is for this base model")
    assert "1 for 'org/narrow'" in done.stderr
    assert not Path("c").exists()


def test_an_unknown_way_to_compose_names_the_nearest(two, base, rows):
    done = call("compose", "--base", base, "--pool", two, "--examples", rows, "--method", "lorahbu")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(
        "UnknownName: no method 'lorahbu' to compose with, did you mean 'lorahub'?"
    )


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--method", "lorahbu"], 1, "UnknownName: no method 'lorahbu'"),
        (["--option", "objective=entropi"], 1, "UnknownName: no objective 'entropi', did you mean 'entropy'?"),
        (["--option", "objective=labels"], 1, "InvalidTask: objective 'labels' ranks the labels of a task"),
        (["--method", "lorahub", "--option", "sigmma=1"], 1, "WeightingError: method 'lorahub' has no option 'sigmma'"),
        (["--method", "lorahub", "--option", "sigma=-1"], 1, "WeightingError: sigma is -1"),
        (["--option", "folds=1"], 1, "WeightingError: folds is 1"),
        (["--method", "similarity"], 1, "WeightingError: method 'similarity' weighs by retrieval scores"),
        (["--method", "arrow", "--rank", "2"], 2, "but 'arrow' is a router: leave them out"),
        (["--hub", "missing"], 2, "--pool and --hub both name adapters"),
    ],
)
def test_compose_looks_at_names_and_options_before_the_base_is_loaded(words, status, said, two, rows):
    done = call("compose", "--base", "no/such-base", "--pool", two, "--examples", rows, *words)
    assert (done.exit_code, said in " ".join(done.stderr.split())) == (status, True), done.stderr


def test_a_hub_of_the_environment_gives_way_to_a_pool(two, base, rows):
    words = ("compose", "--base", base, "--pool", two, "--examples", rows, "--method", "uniform")
    assert call(*words, env={"LORAWEAVE_HUB": "missing"}).exit_code == 0


@pytest.mark.parametrize(
    "words", [["eval", "broken", "rows.jsonl"], ["export", "broken", "--out", "e"], ["explain", "broken", "a"]]
)
def test_a_damaged_composition_is_named_before_the_base_is_loaded(words, here, rows):
    Path("broken").mkdir()
    Path("broken/composition.json").write_text('{"format": 2, "base_model": "no/such-base"}')
    for more in ([], ["--base", "no/such-base"]):
        done = call(*words, *more)
        assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterCorrupt"), done.stderr


def test_export_looks_at_its_target_before_the_base_is_loaded(here):
    Path("made").mkdir()
    done = call("export", "made", "--target", "vlmm", "--out", "e", "--base", "no/such-base")
    assert done.stderr.startswith("UnknownName: no export target 'vlmm', did you mean 'vllm'?")


def test_compose_looks_at_its_target_before_the_base_is_loaded(two, rows):
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("dear")
    done = call("compose", "--base", "no/such-base", "--pool", two, "--examples", rows, "--out", "mine")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "AdapterExists")


def test_compose_without_a_hub_makes_none(here, rows):
    done = call("compose", "--examples", rows)
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "HubError")
    assert not Path("adapters").exists()


def test_a_pool_without_adapters_is_refused(here, rows):
    Path("empty").mkdir()
    done = call("compose", "--examples", rows, "--pool", "empty")
    assert (done.exit_code, done.stderr.split(":")[0]) == (1, "WeightingError")


def test_eval_of_an_adapter_is_that_of_the_model_with_it(two, base, rows):
    done = call("eval", two / "left", rows, "--base", base, "--json", "--instruction", "Next letter.")
    assert done.exit_code == 0, done.stderr
    model, tokenizer = lw.load_base(str(base))
    with torch.no_grad():
        for layer in LAYERS:
            module = model.get_submodule(layer)
            module.weight += adapter("left", 0).delta(layer)
    losses = []
    for text, target in PAIRS:
        prompt = tokenizer(f"Next letter.\nInput: {text}\nOutput:")["input_ids"]
        answer = tokenizer(f" {target}")["input_ids"]
        logits = model(input_ids=torch.tensor([[*prompt, *answer, 2]])).logits[0].detach().log_softmax(dim=-1)
        wanted = [*answer, 2]
        losses.append(
            -sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(wanted)) / len(wanted)
        )
    told = json.loads(done.stdout)
    assert told["count"] == 3
    assert told["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_eval_counts_every_accepted_target(two, base, here):
    rows = [{"input": "a", "target": "a", "also_ok": ["b", "c"]}, {"input": "b", "target": ["c", "b", "a"]}]
    file = write_rows(here / "many.jsonl", rows)
    done = call("eval", two / "left", file, "--base", base, "--labels", "a,b,c", "--json")
    # every label is accepted, so whatever is ranked first is right
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["value"] == 1.0


def test_a_composition_keeps_its_own_instruction(here, rows):
    Path("c").mkdir()
    Path("c/composition.json").write_text("{}")
    assert call("eval", "c", rows, "--instruction", "other").exit_code == 2


def test_train_makes_a_folder_for_each_file(here, base):
    for name in ("next", "previous"):
        write_rows(here / f"{name}.jsonl", [{"input": "a", "target": "b", "definition": f"{name} letter"}] * 4)
    words = ["next.jsonl", "previous.jsonl", "--out", "trained", "--base", base, "--rank", "2", "--steps", "3", "--json"]
    done = process("train", *words, cwd=here)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        {"name": name, "rows": 4, "rank": 2, "out": f"trained/{name}"} for name in ("next", "previous")
    ]
    card = lw.Adapter.from_pretrained("trained/next").card
    assert (card["description"], card["examples"]) == ("next letter", ["a"] * 4)
    assert list(read_pool(Path("trained"))) == ["next", "previous"]


def test_train_holds_out_a_share_of_the_rows_and_ends_by_patience(here, base, rows):
    words = ["train", rows, "--out", "trained", "--base", base, "--rank", "1", "--steps", "40", "--lr", "0.5"]
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
    monkeypatch.setattr("loraweave.composer.train.shared.SharedTraining.run", lambda *_, **__: pytest.fail("trained again"))
    assert call(*words).exit_code == 0
    assert lw.Adapter.from_pretrained("trained/rows").hash == first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ('{"input": "a", "target": "b"}\n{"input": "a"', "line 2 is not JSON"),
        ("[1, 2]\n", "line 1 is [1, 2], not a pair of texts"),
        ('{"target": "b"}\n', "line 1 has ['target'], and no 'input'"),
        ('{"input": "a"}\n', "line 1 has ['input'], and no 'target'"),
        ('{"input": "a", "target": " "}\n', "line 1 (input 'a') has an empty target"),
        ('{"input": "a", "target": []}\n', "line 1 has [] as 'target'"),
        ('{"input": "a", "target": "b", "split": "test"}\n', "no rows of split 'train'; its splits are test"),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_file_and_line(two, text, said):
    Path("bad.jsonl").write_text(text)
    done = call("compose", "--pool", two, "--examples", "bad.jsonl")
    assert done.exit_code == 1
    assert done.stderr.startswith("InvalidTask: bad.jsonl")
    assert said in done.stderr


def test_rows_that_are_no_text_are_refused(two):
    Path("bad.jsonl").write_bytes(b'{"input": "\xff\xfe"}')
    done = call("compose", "--pool", two, "--examples", "bad.jsonl")
    assert (done.exit_code, done.stderr.startswith("InvalidTask: bad.jsonl is not UTF-8 text")) == (1, True)


def test_only_the_rows_of_the_split_are_used(here, base, monkeypatch):
    file = write_rows(here / "s.jsonl", [{"input": s, "target": "b", "split": s} for s in ("train", "test", "train")])
    seen = []
    monkeypatch.setattr(
        "loraweave.composer.train.adapters.train_adapters", lambda _m, _t, tasks, **_: seen.append(tasks) or {}
    )
    call("train", file, "--out", "t", "--base", base)
    call("train", file, "--out", "t", "--base", base, "--split", "test")
    assert [[text for text, _ in tasks["s"].examples] for tasks in seen] == [["train", "train"], ["test"]]
