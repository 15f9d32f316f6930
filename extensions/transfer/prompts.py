"""A prompt as an adapter, whose weight is the prompt's strength: ControlPE (Sun et al. 2023, arXiv 2311.09773)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from loraweave import Adapter, InvalidTask, Task, train_adapters
from loraweave.extend import (
    DEFAULT_TEMPLATE,
    Count,
    GivenRows,
    Positive,
    Prompt,
    progress_bar,
    prompt_ids,
    read_asked,
    require_all,
    spread,
)
from loraweave.extend.models import base_loader
from loraweave.extend.scoring import in_chunks, predict

# inputs that are answered together, and the most tokens of an answer
BATCH_SIZE, MAX_NEW_TOKENS = 32, 48
# the default form of a prompt, without its instruction
PLAIN = DEFAULT_TEMPLATE.removeprefix("{instruction}\n")


def distil_prompt(
    model: Any,
    tokenizer: Any,
    teacher: Task,
    inputs: GivenRows,
    *,
    student: Task | None = None,
    name: str = "prompt",
    max_new_tokens: Count = MAX_NEW_TOKENS,
    rank: Count = 8,
    steps: Count = 60,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Adapter:
    """Return an adapter with which the model answers without a prompt as it does with the prompt and no adapter.

    The base answers unlabelled `inputs` as the `teacher` task asks it: with its instruction, demonstrations and system. On
    these answers the adapter is trained under the prompts of `student`, by default the teacher's without all three. The loss
    is the cross-entropy of the answers' tokens. Empty answers teach nothing and are left out.

    W + w * update is the model under w times the prompt: w = 1 is the prompt, 0 the base, others lie between or beyond; sums
    of several adapters are several prompts. `lw.compose(.., method="grid")` searches strengths on examples, as published,
    and method="manual" takes yours.

    `n_jobs` workers, or those that `joblib.parallel_config` names, answer the inputs as one process would
    (docs/howto/many_machines.md). Raises InvalidTask for a teacher whose prompt says no more than the student's, and where
    all answers are empty; what `train_adapters` raises.
    """
    template = PLAIN if teacher.template is None and not teacher.chat else teacher.template
    bare = replace(
        teacher, examples=(), instruction="", demonstrations=(), system=None, orders=1, template=template, calibrated=False
    )
    prompts = read_asked(inputs)
    told = bare if student is None else student
    if not prompts or teacher.prompt(prompts[0]) == told.prompt(prompts[0]):
        raise InvalidTask(
            f"there is nothing to distil: of {len(prompts)} inputs, the first is asked alike by teacher and student; give "
            "the teacher an instruction, demonstrations or a system, and inputs to answer"
        )
    # in batches of inputs of like length, which are the same for any number of workers
    lengths = [len(ids) for ids in prompt_ids(tokenizer, [teacher.prompt(text) for text in prompts])]
    order = sorted(range(len(prompts)), key=lengths.__getitem__)
    parts = in_chunks(order, BATCH_SIZE)
    pieces = {f"{number} of {len(parts)}": [prompts[place] for place in part] for number, part in enumerate(parts, start=1)}
    work = partial(_answered, base_loader(model, tokenizer, n_jobs), teacher, max_new_tokens)
    with progress_bar(progress) as bar:
        answers_by_piece = require_all(dict(spread(work, pieces, n_jobs=n_jobs, label="answering", bar=bar)))
    answers = dict(zip(order, (answer for name in pieces for answer in answers_by_piece[name]), strict=True))
    rows = [(prompt, answers[place]) for place, prompt in enumerate(prompts) if answers[place].strip()]
    if not rows:
        raise InvalidTask(
            f"the model answers none of the {len(prompts)} inputs under the teacher's prompt: "
            f"{teacher.prompt(prompts[0])!s:.80}"
        )
    made = train_adapters(
        model,
        tokenizer,
        {name: replace(told, examples=rows)},
        rank=rank,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        target_modules=target_modules,
        seed=seed,
        progress=progress,
    )[name]
    said = teacher.instruction or teacher.system or "demonstrations"
    return replace(made, card={**made.card, "description": f"Answers as under the prompt: {said}"})


def _answered(
    load: Callable[[], tuple[Any, Any]], teacher: Task, max_new_tokens: int, inputs: Sequence[Prompt]
) -> list[str]:
    return predict(*load(), teacher, inputs, max_new_tokens=max_new_tokens)
