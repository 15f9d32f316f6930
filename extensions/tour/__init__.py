"""What does it do, and does it run here? A demo on the adapters that come with the repository, and a look at this machine.

`loraweave demo` composes stored adapters for a task that none was trained for, and scores every way beside the base model;
`loraweave doctor` says what is installed, what that leaves out, and which kernels this machine gets. `load_task` reads one
of its tasks. Nothing is added to the registries.
"""

from loraweave.extend import face

_MODULES = {"demonstration": "DemoTask load_task read_rows"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
