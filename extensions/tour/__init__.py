"""What does it do, and does it run here? A demo on the adapters that come with the repository, and a look at this machine.

`loraweave demo` composes stored adapters for a task that none was trained for, and scores every way beside the base model;
`loraweave doctor` says what is installed, what that leaves out, and which kernels this machine gets. `load_task` reads one
of its tasks. Nothing is added to the registries.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.tour.demonstration import DemoTask, load_task, read_rows
else:
    __getattr__ = lazy(__name__, {f"{__name__}.demonstration": "DemoTask load_task read_rows"})

__all__ = ["DemoTask", "load_task", "read_rows"]
