"""The face for those who extend: what an extension, or another package, may import beside the public names.

Methods, routers, recipes, formats and the rest are files of a registry (docs/registries.md); what they are made from, and
what their options, files, rows and commands need, is here. A name is loaded with its module on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraweave.common.lazy import lazy

if TYPE_CHECKING:
    from loraweave.cli._application import DEFAULT_HUB, BaseOption, DtypeOption, HubOption, JsonOption, SeedOption
    from loraweave.cli._inputs import load_model, open_hub
    from loraweave.cli._printing import note, print_json, print_table
    from loraweave.common.chat import Prompt
    from loraweave.common.checks import is_list, is_number, is_whole, require_whole
    from loraweave.common.descent import Descent, descend
    from loraweave.common.display import ShownTable, progress_bar, tracked
    from loraweave.common.files import cache_folder, replacing, whole_file
    from loraweave.common.names import printable, text_digest
    from loraweave.common.options import (
        Count,
        Declared,
        Fraction,
        NonNegative,
        Positive,
        Range,
        Rate,
        Share,
        Whole,
        check_options,
        options_of,
    )
    from loraweave.common.randomness import caller_randomness, seeded, with_seed
    from loraweave.common.rows import GivenRows, Row, read_rows
    from loraweave.common.spread import Failed, spread
    from loraweave.composer.formula.nodes import Named, Sum
    from loraweave.composer.merge.updates import DenseUpdate, TruncatedUpdate
    from loraweave.composer.model.batches import end_tokens, pad_id, untouched
    from loraweave.errors import BaseModelUnverified, PluginFailed, WorkersFailed
    from loraweave.hub.base import EMBEDDED, fingerprint
    from loraweave.hub.embedders._embedder import Embedder
    from loraweave.hub.formats._contents import Contents, Reader
    from loraweave.hub.formats._files import entry
    from loraweave.hub.formats._placing import head_size
    from loraweave.hub.indexes._vectors import Index
    from loraweave.hub.targets._target import Target
    from loraweave.lowrank import algebra
    from loraweave.lowrank.factorise import factorise
    from loraweave.registry import get, nearest, traits, traits_of
    from loraweave.retrieval.keyed_search import Key
    from loraweave.routers.recipes._recipe import Recipe
    from loraweave.routers.searches._solver import Solver
    from loraweave.routers.tokens._learned import LearnedRouter
    from loraweave.routers.tokens._router import TokenRouter
    from loraweave.routers.tokens._scores import top_k_softmax
    from loraweave.types import DEFAULT_TEMPLATE

# the same names by module: a process imports what it uses, a type checker reads the imports above
_MODULES = {
    # what a registry holds
    "registry": "get nearest traits traits_of",
    "common.options": "Count Declared Fraction NonNegative Positive Range Rate Share Whole check_options options_of",
    "composer.merge.updates": "DenseUpdate TruncatedUpdate",
    "hub.embedders._embedder": "Embedder",
    "hub.formats._contents": "Contents Reader",
    "hub.indexes._vectors": "Index",
    "hub.targets._target": "Target",
    "retrieval.keyed_search": "Key",
    "routers.recipes._recipe": "Recipe",
    "routers.searches._solver": "Solver",
    "routers.tokens._learned": "LearnedRouter",
    "routers.tokens._router": "TokenRouter",
    "routers.tokens._scores": "top_k_softmax",
    # calculating
    "common.descent": "Descent descend",
    "common.randomness": "caller_randomness seeded with_seed",
    "common.spread": "Failed spread",
    "composer.formula.nodes": "Named Sum",
    "composer.model.batches": "end_tokens pad_id untouched",
    "hub.base": "EMBEDDED fingerprint",
    "hub.formats._placing": "head_size",
    "lowrank": "algebra",
    "lowrank.factorise": "factorise",
    # reading, writing and showing
    "common.chat": "Prompt",
    "common.checks": "is_list is_number is_whole require_whole",
    "common.display": "ShownTable progress_bar tracked",
    "common.files": "cache_folder replacing whole_file",
    "common.names": "printable text_digest",
    "common.rows": "GivenRows Row read_rows",
    "errors": "BaseModelUnverified PluginFailed WorkersFailed",
    "hub.formats._files": "entry",
    "types": "DEFAULT_TEMPLATE",
    # the command line
    "cli._application": "DEFAULT_HUB BaseOption DtypeOption HubOption JsonOption SeedOption",
    "cli._inputs": "load_model open_hub",
    "cli._printing": "note print_json print_table",
}

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, {f"loraweave.{module}": names for module, names in _MODULES.items()})


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "DEFAULT_HUB",
    "DEFAULT_TEMPLATE",
    "EMBEDDED",
    "BaseModelUnverified",
    "BaseOption",
    "Contents",
    "Count",
    "Declared",
    "DenseUpdate",
    "Descent",
    "DtypeOption",
    "Embedder",
    "Failed",
    "Fraction",
    "GivenRows",
    "HubOption",
    "Index",
    "JsonOption",
    "Key",
    "LearnedRouter",
    "Named",
    "NonNegative",
    "PluginFailed",
    "Positive",
    "Prompt",
    "Range",
    "Rate",
    "Reader",
    "Recipe",
    "Row",
    "SeedOption",
    "Share",
    "ShownTable",
    "Solver",
    "Sum",
    "Target",
    "TokenRouter",
    "TruncatedUpdate",
    "Whole",
    "WorkersFailed",
    "algebra",
    "cache_folder",
    "caller_randomness",
    "check_options",
    "descend",
    "end_tokens",
    "entry",
    "factorise",
    "fingerprint",
    "get",
    "head_size",
    "is_list",
    "is_number",
    "is_whole",
    "lazy",
    "load_model",
    "nearest",
    "note",
    "open_hub",
    "options_of",
    "pad_id",
    "print_json",
    "print_table",
    "printable",
    "progress_bar",
    "read_rows",
    "replacing",
    "require_whole",
    "seeded",
    "spread",
    "text_digest",
    "top_k_softmax",
    "tracked",
    "traits",
    "traits_of",
    "untouched",
    "whole_file",
    "with_seed",
]
