from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch

import loraweave as lw
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.types import Factors

NAMES = """
Adapter AdapterCorrupt AdapterExists AdapterNotFound AdapterQuarantined AdapterSuspicious AdapterUnsupported
AlreadyActive Anomaly BaseKey BaseModelMismatch Candidate Composer Composition CompositionError DimensionMismatch
EmptyIndex ExpertPool Factors Fingerprint Formula FormulaError Hub HubCorrupt HubError HubFull HubLocked HubReadOnly
InvalidLicense InvalidName InvalidTask LayerMismatch LoraweaveError MixtureWeights PackageMissing Record
RetrievalError Retriever Router ScopeError SearchFailed SourceUnavailable Task TrainingError UnknownExpert
UnknownName WeightingError base_key byom compose ensemble experts
extract load_base merge names order parse router to_lora
train_adapters train_experts
"""

HEAVY = ("torch", "transformers", "peft", "sklearn", "faiss", "scipy", "cma", "matplotlib")


def loaded_after(code, *arguments):
    """The heavy packages among a fresh process's modules after `code`, which must not fail."""
    report = f"\nimport json, sys\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)"
    run = subprocess.run(
        [sys.executable, "-c", code + report, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stderr.splitlines()[-1])


def test_the_public_names_are_pinned():
    assert sorted(lw.__all__) == sorted(NAMES.split())


def test_every_public_name_resolves_to_something_documented():
    assert [name for name in lw.__all__ if not getattr(lw, name).__doc__] == []


def test_a_lazy_name_is_the_object_of_its_room():
    rooms = {name: importlib.import_module(module) for name, module in lw._LAZY.items()}
    assert [name for name, room in rooms.items() if getattr(lw, name) is not getattr(room, name)] == []


def test_dir_shows_the_public_names():
    assert dir(lw) == sorted(lw.__all__)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'loraweave' has no attribute 'Compser'"):
        lw.Compser  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert lw.__version__ == version("loraweave")


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import loraweave") == []


def test_listing_names_loads_nothing_heavy():
    code = "import loraweave as lw\nassert 'linear' in lw.names('methods') and 'peft' in lw.names('formats')"
    assert loaded_after(code) == []


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder) as hub:
        layers = {"model.layers.0.self_attn.q_proj": Factors(torch.ones(2, 7), torch.ones(5, 2))}
        hub.add(Adapter("one adapter", "a/base", layers), description="does one thing")
    return folder


def test_listing_a_hub_loads_nothing_heavy(hub_folder):
    code = "import sys, loraweave as lw\nassert [r.name for r in lw.Hub(sys.argv[1])] == ['one adapter']"
    assert loaded_after(code, hub_folder) == []
