"""An adapter for a base of another family, with another tokenizer: trained on the old one's answers, judged on others.

No map of weights leads there, since the two bases read different tokens. What both share is text.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from loraweave import Adapter, AdapterUnsupported, Composer, InvalidTask, Task, base_key, train_adapters
from loraweave.extend import Count, Fraction, GivenRows, Positive, check_options, options_of, read_asked
from loraweave.extend.scoring import predict
from loraweave.extensions.transfer.old_answers import split


def distil_adapter(
    adapter: Adapter,
    old: Any,
    tokenizer: Any,
    new: Any,
    new_tokenizer: Any,
    task: Task,
    inputs: GivenRows,
    *,
    least: Fraction = 0.5,
    rank: Count = 8,
    steps: Count = 60,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    progress: bool = True,
) -> Adapter:
    """Return an adapter of the model `new` that answers unlabelled inputs as `adapter` does in the model `old`.

    Both bases are asked as `task` says, each in its own tokens; its examples are not learned. `old` answers all `inputs`
    with the adapter. Every fourth judges, alone, and `train_adapters` trains a LoRA of `new` on the others, by the
    cross-entropy of the answers' tokens. Empty answers teach nothing. The bases may differ in any shape and depth. What the
    old adapter answers wrong is taught, too.

    `card["transfer"]` has both bases, the numbers of inputs that teach and judge, and two shares of those that judge: those
    that `new` answers word for word as `old` with the adapter, `before` the training and after it (`answers`).
    `card["recipe"]` has the parent; scores are not taken over.

    Raises AdapterUnsupported where `answers` is below `least`; InvalidTask for too few inputs, or none with an answer;
    BaseModelMismatch for an adapter of another base than `old`; WeightingError for settings outside their range; what
    `train_adapters` raises.
    """
    settings = {"least": least, "rank": rank, "steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed}
    check_options("distil_adapter()", settings, options_of(distil_adapter, after=7))
    lessons, judges = split(read_asked(inputs))
    with Composer(old, [adapter], tokenizer=tokenizer).activate({adapter.name: 1.0}):
        taught, wanted = (predict(old, tokenizer, task, prompts) for prompts in (lessons, judges))
    rows = [(prompt, answer) for prompt, answer in zip(lessons, taught, strict=True) if answer.strip()]
    if not rows:
        raise InvalidTask(f"{adapter.name!r} answers none of {len(lessons)} inputs: is it asked as it was trained?")
    before = _agreement(wanted, predict(new, new_tokenizer, task, judges))
    learning: dict[str, Any] = {"rank": rank, "steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed}
    lesson_task = replace(task, examples=rows, calibrated=False)
    made = train_adapters(
        new, new_tokenizer, {adapter.name: lesson_task}, target_modules=target_modules, progress=progress, **learning
    )[adapter.name]
    with Composer(new, [made], tokenizer=new_tokenizer).activate({made.name: 1.0}):
        share = _agreement(wanted, predict(new, new_tokenizer, task, judges))
    key = base_key(new)
    if share < least:
        raise AdapterUnsupported(
            f"trained on answers of {adapter.name!r}, {key.id!r} answers {share:.2f} of {len(judges)} other inputs as "
            f"{adapter.base_model!r} does with it ({before:.2f} without training), below least={least:g}: give more inputs "
            "or steps, or lower least"
        )
    about = {"from": adapter.base_model, "to": key.id, "way": "distilled", "before": before, "answers": share}
    about |= {"prompts": len(rows), "judges": len(judges)}
    card = {name: value for name, value in adapter.card.items() if name not in ("report", "peft", "scores")}
    parents = [{"hash": adapter.hash, "name": adapter.name}]
    card["recipe"] = {"method": "distil_adapter", "options": settings, "parents": parents}
    return replace(made, card={**card, "transfer": about})


def _agreement(wanted: Sequence[str], answers: Sequence[str]) -> float:
    same = sum(answer.strip() == right.strip() for answer, right in zip(answers, wanted, strict=True))
    return same / len(wanted)
