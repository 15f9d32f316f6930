"""The names that most extensions need: kinds of options, registries, checks, rows, files, tables, workers and messages.

An extension, or another package, imports `loraweave`, this module and its kits, nothing deeper. A kit, such as
`loraweave.extend.merging`, has what one registry or one job needs beside; docs/registries.md lists them. Each name is in
one of these modules alone, and is loaded with the module that defines it on first use. Type checkers read the same names
in stubs, which `scripts/stub.py` writes.
"""

from loraweave.registry import face

_MODULES = {
    "common.chat": "Prompt prompt_ids prompt_texts",
    "common.checks": "is_list is_number is_whole one_or_many require_whole",
    "common.display": "ShownTable blank_figure progress_bar tracked",
    "common.files": "as_path cache_folder read_yaml replacing require_replaceable storage_errors sync whole_file",
    "common.names": "MAX_NAME_CHARACTERS checked_name printable text_digest unknown_expert",
    "common.options": (
        "Count Declared Fraction NonNegative Positive Range Rate Share Whole check_options options_of require_known"
    ),
    "common.process": "free_host_bytes",
    "common.rows": "GivenRows Row located read_asked read_rows",
    "common.spread": "Failed processes_here require_all spread",
    "composer.model.layers": "TargetLayer",
    "errors": "BudgetExceeded WorkersFailed",
    "hub.base": "fingerprint",
    "lowrank": "algebra",
    "lowrank.factorise": "factorise",
    "registry": "brought face get nearest traits traits_of",
    "types": "DEFAULT_TEMPLATE",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
