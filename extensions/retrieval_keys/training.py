"""Fine-tuning of the sentence encoder on adapters' sample inputs, so that inputs of one task lie close together.

LoraRetriever's loss (Zhao et al. 2024, arXiv 2402.09997): for an input x and another input x+ of the same task,
-log exp(cos(x, x+) / t) / (exp(cos(x, x+) / t) + sum over inputs x- of the batch's other tasks of exp(cos(x, x-) / t)).
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from loraweave import Hub, HubError, TrainingError
from loraweave.extend import (
    Count,
    GivenRows,
    Positive,
    Range,
    Whole,
    check_options,
    options_of,
    progress_bar,
    read_rows,
    replacing,
    text_digest,
    whole_file,
)
from loraweave.extend.hubs import readable, sentence
from loraweave.extend.training import (
    Descent,
    TrainingState,
    checkpoint_folder,
    descend,
    drop_state,
    load_state,
    save_state,
    save_tensors,
    warmed_cosine,
)

CHECKPOINT_STEPS = 20
RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class EncoderRecipe:
    """The settings that determine a fine-tuned encoder, besides the texts and the encoder that it began as."""

    steps: Count
    tasks_per_step: Annotated[int, Range(least=2)]
    inputs_per_task: Annotated[int, Range(least=2)]
    lr: Positive
    temperature: Positive
    seed: Whole


def train_encoder(
    hub_or_inputs: Hub | Mapping[str, GivenRows],
    out: str | Path,
    *,
    steps: int = 60,
    tasks_per_step: int = 16,
    inputs_per_task: int = 4,
    lr: float = 2e-5,
    temperature: float = 0.05,
    seed: int = 0,
    start: sentence.Sentence | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> sentence.Sentence:
    """Fine-tune the encoder and save it in the folder `out`: `Retriever(hub, embedder=...)` takes it, or the folder.

    Trains on a mapping of task names to inputs, or on the sample inputs in a hub's cards; tasks with fewer than two
    different inputs are left out. Each step has `inputs_per_task` inputs of `tasks_per_step` tasks. `start` is the encoder
    to begin with, all-MiniLM-L6-v2 by default; its word embeddings stay as they are. AdamW without weight decay or dropout,
    warm-up over a tenth of the steps, then a cosine to zero, gradients clipped to norm 1. The same seed gives the same bits
    on one machine. With `checkpoint`, a folder, the same call goes on where it was interrupted, to the same result.

    Raises TrainingError for settings out of range, fewer than two tasks, an `out` that holds something, a checkpoint of
    another training or that cannot be written, and a loss that is not finite; InvalidTask for inputs that are neither
    texts nor rows; PackageMissing without the encoder's weights.
    """
    recipe = EncoderRecipe(steps, tasks_per_step, inputs_per_task, lr, temperature, seed)
    inputs = _inputs(hub_or_inputs)
    target = Path(out)
    _check(recipe, inputs, target)
    begin = sentence.Sentence() if start is None else start
    folder = checkpoint_folder(checkpoint)
    key = _key(recipe, inputs, begin)
    if folder is not None:
        _claim(folder, recipe, key)
    tokenizer, model = begin.loaded_copy()
    _train(tokenizer, model, begin.instruction, inputs, recipe, folder, key, progress)
    _save(target, begin, model, recipe, sorted(inputs))
    if folder is not None:
        drop_state(folder, key)
    return sentence.Sentence(folder=target)


def contrastive_loss(unit_ND: Tensor, task_N: Tensor, temperature: float) -> Tensor:
    """Return the mean of LoraRetriever's loss over N unit vectors of inputs, `task_N` being the task of each.

    An input's positive is the next one of its task, the last one's is the first. Inputs of one task lie side by side, and
    each task has at least two.
    """
    similarity_NN = unit_ND @ unit_ND.T / temperature
    same_NN = task_N[:, None] == task_N[None, :]
    index_N = torch.arange(len(task_N))
    first_N = same_NN.int().argmax(dim=1)
    following_N = first_N + (index_N - first_N + 1) % same_NN.sum(dim=1)
    positive_N = similarity_NN[index_N, following_N]
    # other inputs of the same task are neither the positive nor negatives
    negative_NN = similarity_NN.masked_fill(same_NN, -math.inf)
    return (torch.logsumexp(torch.cat([positive_N[:, None], negative_NN], dim=1), dim=1) - positive_N).mean()


def pooled(tokenizer: Any, model: Any, texts: list[str]) -> Tensor:
    """Return the texts as unit vectors (N, D) with gradients, as the encoder embeds them: the masked mean, at norm 1."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=sentence.MAX_TOKENS, return_tensors="pt")
    hidden_NTD = model(**tokens).last_hidden_state
    mask_NT1 = tokens["attention_mask"][..., None].to(hidden_NTD.dtype)
    return normalize((hidden_NTD * mask_NT1).sum(dim=1) / mask_NT1.sum(dim=1), dim=1)


def _train(
    tokenizer: Any,
    model: Any,
    instruction: str,
    inputs: Mapping[str, Sequence[str]],
    recipe: EncoderRecipe,
    folder: Path | None,
    key: str,
    progress: bool,
) -> None:
    learning = _learning(model)
    # the schedule as a share of lr, so that a rate is one product
    warmup = max(1, recipe.steps // 10)
    descent = Descent(learning, lambda step: recipe.lr * warmed_cosine(1.0, step, recipe.steps, warmup))
    state = None if folder is None else load_state(folder, key)
    first = 0 if state is None else state.restore(learning, descent.optimizer)

    def loss(step: int) -> Tensor:
        texts, task_N = _batch(inputs, recipe, step)
        unit_ND = pooled(tokenizer, model, [instruction + readable(text) for text in texts])
        return contrastive_loss(unit_ND, task_N, recipe.temperature)

    def keep(step: int) -> None:
        if folder is not None and (step + 1) % CHECKPOINT_STEPS == 0 and step + 1 < recipe.steps:
            save_state(folder, key, TrainingState.of(step + 1, learning, descent.optimizer))

    with progress_bar(progress, field="loss") as bar:
        learners = {"the encoder": descent}
        descend(learners, loss, recipe.steps, bar, title="training the encoder", first=first, after_step=keep)


def _learning(model: Any) -> list[Tensor]:
    """Freeze the word embeddings and the pooler, which mean pooling does not use; return the parameters that learn."""
    words = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    model.requires_grad_(False)
    learning = [p for name, p in model.named_parameters() if id(p) not in words and not name.startswith("pooler.")]
    for parameter in learning:
        parameter.requires_grad_(True)
    return learning


def _batch(inputs: Mapping[str, Sequence[str]], recipe: EncoderRecipe, step: int) -> tuple[list[str], Tensor]:
    """Draw one step's texts and their tasks' indices (N), a function of `inputs`, the recipe and the step's number."""
    generator = torch.Generator().manual_seed(int(text_digest(f"{recipe.seed}/{step}")[:16], 16) % 2**63)
    names = sorted(inputs)
    chosen = torch.randperm(len(names), generator=generator)[: recipe.tasks_per_step].tolist()
    texts, tasks = [], []
    for place in chosen:
        pool = inputs[names[place]]
        some = torch.randperm(len(pool), generator=generator)[: recipe.inputs_per_task].tolist()
        texts += [pool[index] for index in some]
        tasks += [place] * len(some)
    return texts, torch.tensor(tasks)


def _inputs(hub_or_inputs: Hub | Mapping[str, GivenRows]) -> dict[str, list[str]]:
    """Map each task to its different inputs, leaving out tasks with fewer than two."""
    if isinstance(hub_or_inputs, Hub):
        inputs: dict[str, Sequence[str]] = {record.name: record.examples for record in hub_or_inputs.records()}
    else:
        inputs = {
            name: [row.input for row in read_rows(rows, noun="input", of=repr(name), targets="none")]
            for name, rows in hub_or_inputs.items()
        }
    different = {name: list(dict.fromkeys(text for text in texts if text.strip())) for name, texts in inputs.items()}
    return {name: texts for name, texts in different.items() if len(texts) >= 2}


def _save(target: Path, begin: sentence.Sentence, model: Any, recipe: EncoderRecipe, tasks: Sequence[str]) -> None:
    """Write the encoder's folder `target`, whole or not at all, with the files of `begin` beside the new weights.

    Raises TrainingError if it cannot be written.
    """
    try:
        with replacing(target) as temporary:
            for name in sentence.MODEL_FILES:
                if name != "model.safetensors":
                    shutil.copyfile(begin.files / name, temporary / name)
            tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
            save_tensors(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            about = {
                "instruction": begin.instruction,
                "started_from": begin.id,
                "recipe": asdict(recipe),
                "tasks": list(tasks),
            }
            (temporary / sentence.ENCODER_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            # an empty folder may be there; one that was filled meanwhile refuses
            with suppress(FileNotFoundError):
                target.rmdir()
    except HubError as error:
        raise TrainingError(
            f"the trained encoder could not be written to {target} ({error}); with checkpoint=..., its state is kept there: "
            "call again with another folder"
        ) from error


def _key(recipe: EncoderRecipe, inputs: Mapping[str, Sequence[str]], begin: sentence.Sentence) -> str:
    content = json.dumps([asdict(recipe), inputs, begin.id], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _claim(folder: Path, recipe: EncoderRecipe, key: str) -> None:
    """Write the recipe and key of this training into its checkpoint folder. Raises TrainingError if it has another's."""
    path = folder / RECIPE_FILE
    training = {**asdict(recipe), "key": key}
    if path.is_file():
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            recorded = None
        if recorded != training:
            other = recorded if isinstance(recorded, dict) else {}
            differing = [name for name in training if other.get(name) != training[name]]
            shown = ", ".join(f"{name} {other.get(name)!r} there and {training[name]!r} here" for name in differing)
            raise TrainingError(
                f"the checkpoint {folder} is of another training: {shown} (the key is of texts and encoder too); "
                "give another folder, or the same settings"
            )
        return
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")


def _check(recipe: EncoderRecipe, inputs: Mapping[str, Sequence[str]], target: Path) -> None:
    check_options("train_encoder()", asdict(recipe), options_of(EncoderRecipe), error=TrainingError)
    if len(inputs) < 2:
        raise TrainingError(
            f"{len(inputs)} tasks have two or more different inputs, and two are needed: each is told from the others; "
            "give more tasks, or store adapters with examples=[...]"
        )
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise TrainingError(f"{target} is a file, or a folder that holds something; name another folder for the encoder")
