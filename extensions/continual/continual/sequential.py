"""Plain sequential LoRA: one adapter that every task goes on training. The baseline of forgetting."""

from loraweave import Adapter
from loraweave.extensions.continual.course import Course, one_by_one


def sequential(course: Course) -> dict[str, Adapter]:
    """Return {task: the adapter after that task}; each task trains the same adapter further, free to forget the others."""
    return one_by_one(course, lambda name, layers: course.learned(name, start=layers or None))
