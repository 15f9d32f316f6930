"""Commands of the shell (a file `commands.py`): options, hubs and models they open, and what they print."""

from loraweave.registry import face

_MODULES = {
    "cli._application": (
        "DEFAULT_HUB AnomaliesOption BaseOption BlobsOption DtypeOption HubOption JsonOption ManyTagsOption SeedOption "
        "WorkersOption composition_row note print_json print_rows print_table record_row"
    ),
    "cli._inputs": "load_model open_hub recorded_base require_dtype require_one_adapter",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
