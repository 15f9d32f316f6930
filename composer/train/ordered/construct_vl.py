"""ConStruct-VL's prefix composition: an adapter for each task, over those of all earlier ones (Smith et al., CVPR 2023)."""

from __future__ import annotations

from loraweave.composer.train.ordered._course import Course, by_prefix
from loraweave.hub.adapter import Adapter


def construct_vl(course: Course) -> dict[str, Adapter]:
    """{task t: the sum of the adapters of tasks 0 to t}, each trained while the earlier ones are in the model and frozen.

    b begins at 0, so a task begins as the model that the one before left; every past model is that prefix of the sum, to
    the bit (`own_parts` takes it apart). Ranks add up: task t has (t + 1) * rank. The paper's learnable weight for each pair
    of tasks and layer (`ada_weights`, off by default there) and its adversarial pseudo-replay, which perturbs the text
    embeddings of a vision-language head, are not built.
    """
    return by_prefix(course, lambda name, prefix: course.learned(name, frozen=prefix))
