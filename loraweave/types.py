"""The data types that several packages share. Nothing here imports torch, so that catalogue and command line start fast.

Shape letters, also used as suffixes of tensor names: B instances, T tokens, L adapted layers, E experts, R rank, S rank rows
of a pool (the sum of its ranks), I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from loraweave.common.chat import Conversation, Prompt
from loraweave.common.checks import one_or_many, require_whole
from loraweave.common.rows import GivenRows, Row, read_rows, shared_instruction
from loraweave.errors import InvalidTask

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["linear", "embedding", "conv", "expert"]
# the fields of `Factors` that are tensors
_PARTS = ("a_RI", "b_OR", "gain_O", "bias_O", "magnitude_O", "base_bias_O")


@dataclass(frozen=True, eq=False)
class Factors:
    """The update of one layer: x -> (x a^T) b^T + gain * y0 + bias, y0 being the base layer's output without its bias.

    The LoRA scale is folded into `b_OR` once, when an adapter is read. Factors are fp32 and are never changed in place.
    An embedding has I = vocabulary size (x is the one-hot token); a convolution has I = input channels * kernel size.

    `magnitude_O` (DoRA's m) and `base_bias_O` (a trained bias that replaces the base's) are absolute values that need
    the base layer; `algebra.bind` turns them into `gain_O` and `bias_O`, and a delta of unbound factors is refused.
    """

    a_RI: Tensor
    b_OR: Tensor
    gain_O: Tensor | None = None
    bias_O: Tensor | None = None
    magnitude_O: Tensor | None = None
    base_bias_O: Tensor | None = None
    kind: Kind = "linear"
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        return int(self.a_RI.shape[0])

    @property
    def bound(self) -> bool:
        """True if the update is known without the base layer."""
        return self.magnitude_O is None and self.base_bias_O is None

    @property
    def is_product(self) -> bool:
        """True if the update is b a alone, without a gain, a bias or a magnitude."""
        return self.tensors().keys() == {"a_RI", "b_OR"}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by field name."""
        held = vars(self)
        return {name: held[name] for name in _PARTS if held[name] is not None}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **{name: own_memory(tensor) for name, tensor in self.tensors().items()}}


def own_memory(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it is a view of a larger tensor, which a pickle would contain as a whole."""
    return tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.detach().clone()


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a base model: a hash over its parameters' names and shapes, and sampled weights where known."""

    shapes: str
    samples: tuple[float, ...] = ()

    # one unit in the last place of bf16, so that a checkpoint loaded in fp32, bf16 or fp16 counts as the same
    TOLERANCE = 2.0**-7

    def differs(self, other: Fingerprint) -> str:
        """Return why `other` is another base model, as a phrase; "" if nothing contradicts that both are the same."""
        if self.shapes != other.shapes:
            return f"parameter names and shapes hash to {self.shapes} and {other.shapes}"
        if not self.samples or not other.samples:
            return ""
        pairs = list(zip(self.samples, other.samples, strict=False))
        far = [(a, b) for a, b in pairs if abs(a - b) > self.TOLERANCE * max(abs(a), abs(b)) + 1e-7]
        if not far:
            return ""
        return f"{len(far)} of {len(pairs)} sampled weights differ, the first {far[0][0]:.6g} and {far[0][1]:.6g}"

    def to_json(self) -> dict[str, Any]:
        return {"shapes": self.shapes, "samples": list(self.samples)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fingerprint:
        return cls(str(data["shapes"]), tuple(float(value) for value in data.get("samples", ())))


@dataclass(frozen=True)
class BaseKey:
    """The identity of a base model: its id, with its revision and fingerprint if they are known.

    If both keys have sampled weights, the fingerprints alone decide whether they are of one model; otherwise ids, and
    revisions and fingerprints that both have, must agree. `alike` are keys accepted as this model by names and shapes alone.
    """

    id: str
    revision: str | None = None
    fingerprint: Fingerprint | None = None
    alike: tuple[BaseKey, ...] = ()

    def differs(self, other: BaseKey) -> str:
        """Return why `other` is not accepted as this base model, as a phrase; "" if it is accepted."""
        if why := self.contradicts(other):
            return why
        if self.id == other.id or self._has_weights_of(other) or other in self.alike:
            return ""
        return f"the ids are {self.id!r} and {other.id!r}"

    def contradicts(self, other: BaseKey) -> str:
        """Return why `other` cannot be this base model, as a phrase; "" if nothing that both keys have excludes it."""
        fingerprint, its = self.fingerprint, other.fingerprint
        if fingerprint and its and (why := fingerprint.differs(its)):
            return why
        if self._has_weights_of(other) or self.id != other.id:
            return ""
        if self.revision and other.revision and _other_commits(self.revision, other.revision):
            return f"the revisions are {self.revision!r} and {other.revision!r}"
        return ""

    def proves(self, other: BaseKey) -> bool:
        """Return True if sampled weights or ids show that `other`, which must not contradict this key, is the same model."""
        return self._has_weights_of(other) or (bool(self.id) and self.id == other.id)

    def _has_weights_of(self, other: BaseKey) -> bool:
        """Return True if both keys have sampled weights, which then agree unless the fingerprints differ."""
        fingerprint, its = self.fingerprint, other.fingerprint
        return bool(fingerprint and its and fingerprint.samples and its.samples)


def _other_commits(left: str, right: str) -> bool:
    """Return True if two revisions are different commits; False for a branch or tag, which can stand for any commit."""
    commits = [text for text in (left.lower(), right.lower()) if len(text) >= 7 and not set(text) - set("0123456789abcdef")]
    return len(commits) == 2 and not commits[0].startswith(commits[1]) and not commits[1].startswith(commits[0])


@dataclass(frozen=True)
class Source:
    """The origin of an adapter: its folder as the user named it, or a repository and the commit that was read."""

    location: str
    revision: str | None = None


@dataclass(frozen=True)
class Anomaly:
    """An oddity of an adapter: the check that noticed it, a sentence about it, and its size (docs/anomalies.md)."""

    kind: str
    detail: str
    score: float


@dataclass(frozen=True)
class Record:
    """A row of the hub's catalogue: everything about an adapter but its tensors.

    `version` counts the contents that the name has had, from 1; `restored` is the version that a rollback restored.
    """

    name: str
    hash: str
    base_model: str
    rank: int
    target_modules: tuple[str, ...]
    license: str | None
    tags: tuple[str, ...]
    description: str
    size_bytes: int
    created: str
    # long fields stay out of the representation
    examples: tuple[str, ...] = field(default=(), repr=False)
    fingerprint: Fingerprint | None = field(default=None, repr=False)
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    language: tuple[str, ...] = ()
    version: int = 1
    restored: int | None = None
    base_revision: str | None = None
    source: Source | None = None
    anomalies: tuple[Anomaly, ...] = ()
    quarantined: bool = False

    @property
    def base(self) -> BaseKey:
        """The base model as a key, to compare with that of a model at hand."""
        return BaseKey(self.base_model, self.base_revision, self.fingerprint)

    @property
    def parents(self) -> tuple[str, ...]:
        """The hashes of the adapters that this one was merged from; () for a trained adapter."""
        match self.card.get("recipe"):
            case {"parents": [*parents]}:
                return tuple(str(parent["hash"]) for parent in parents if isinstance(parent, Mapping) and "hash" in parent)
        return ()


@dataclass(frozen=True)
class Candidate:
    """A hit of a search: an adapter, how well it fits (inner product of unit vectors, -1 to 1), and the reason.

    After `rerank` the score is the decrease of a loss, and the evidence begins with that measurement.
    """

    name: str
    score: float
    evidence: str
    record: Record = field(repr=False)


# inputs without content, which say nothing about a label
NEUTRAL = ("N/A", "[MASK]", "")
# the text that ends an answer of one line
LINE = ("\n",)
DEFAULT_TEMPLATE = "{instruction}\nInput: {input}\nOutput:"
CHAT_TEMPLATE = "{instruction}\n\n{input}"


@dataclass(frozen=True)
class Task:
    """A task given by a few (input, target) examples, an instruction, and how its answers are scored.

    Examples are rows in any form of `loraweave.common.rows`, stored as pairs of texts. Without an `instruction` the task
    takes the one that all rows share. Every input is put into the template, whatever its column is called. `labels` is the
    closed set of answers: the label with the highest likelihood is predicted and `metric` becomes "rank_classification".
    Otherwise the first line of a greedy generation is compared with the target ("exact_match"); `stop` lists other texts
    that end an answer, () if only the end of the sequence does. `template` has the fields {instruction} and {input}.
    `demonstrations` are (input, target) pairs that every prompt shows first, each in the template with its answer; True
    shows the examples. A prompt never shows its own input, so that an example is learned under the other examples (MetaICL,
    Min et al. 2022, arXiv 2110.15943). With `orders`, answers are averaged, as probabilities, over that many orders of the
    demonstrations. With `calibrated=True` the probability of a label is divided by its mean over inputs without content
    (Zhao et al. 2021, arXiv 2102.09690); with a list of inputs, by its geometric mean over these (Zhou et al. 2024, arXiv
    2309.17249), for inputs with labels over those of other labels.

    With `chat`, by default if the examples are messages, prompts are conversations in the tokenizer's chat template. They
    begin with `system`, by default the system turn that all rows share; if it is empty, an input keeps its own, if any.
    Demonstrations are earlier turns, and the input, after the instruction, is the user's last turn (docs/chat.md). The
    answer is the assistant's whole turn, unless `stop` ends it before. An input of several turns is stored as a
    `Conversation`.

    Raises InvalidTask for examples and settings that cannot be used.
    """

    examples: Sequence[tuple[Prompt, str]]
    instruction: str = field(default="", kw_only=True)
    labels: Sequence[str] | None = field(default=None, kw_only=True)
    metric: str = field(default="exact_match", kw_only=True)
    template: str | None = field(default=None, kw_only=True)
    demonstrations: Sequence[tuple[Prompt, str]] | bool = field(default=(), kw_only=True)
    orders: int = field(default=1, kw_only=True)
    calibrated: bool | Sequence[Prompt | tuple[Prompt, str]] = field(default=False, kw_only=True)
    stop: Sequence[str] | None = field(default=None, kw_only=True)
    chat: bool | None = field(default=None, kw_only=True)
    system: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("instruction", "template", "system"):
            if not isinstance(text := getattr(self, name), str | None):
                raise InvalidTask(f"{name} is {text!r:.80}; it must be a text")
        rows = read_rows(self.examples, noun="example")
        demonstrations = self.demonstrations
        shown = (
            (rows if demonstrations else [])
            if isinstance(demonstrations, bool)
            else read_rows(demonstrations, noun="demonstration")
        )
        self._read_chat([*rows, *shown])
        for name, read in (("examples", rows), ("demonstrations", shown)):
            object.__setattr__(self, name, tuple((self._as_kept(row.asked), row.targets[0]) for row in read))
        if not self.instruction:
            # in a chat, the instruction of a row of messages is already its system turn
            plain_rows = [row for row in rows if row.chat is None] if self.chat else rows
            object.__setattr__(self, "instruction", shared_instruction(plain_rows))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
            object.__setattr__(self, "metric", "rank_classification")
            if len(set(self.labels)) < len(self.labels):
                raise InvalidTask(f"labels are {self.labels}; each is ranked against the others, so give each once")
        if self.metric not in ("exact_match", "rank_classification"):
            raise InvalidTask(f"metric {self.metric!r} is neither 'exact_match' nor 'rank_classification'")
        if self.metric == "rank_classification" and not self.labels:
            raise InvalidTask("metric 'rank_classification' needs labels=[...], the closed set of answers")
        if not isinstance(self.calibrated, bool):
            inputs = [(self._as_kept(row.asked), row.targets) for row in read_rows(self.calibrated, targets="any")]
            calibrated = tuple((kept, targets[0]) if targets else kept for kept, targets in inputs)
            object.__setattr__(self, "calibrated", calibrated)
        if self.calibrated and not self.labels:
            raise InvalidTask("calibrated divides the probabilities of labels, and the task has no labels")
        for noun, pairs in (("example", self.examples), ("calibrating input", self.neutral)):
            for number, (_, target) in enumerate(pairs, start=1):
                if self.labels is not None and target not in (*self.labels, None):
                    raise InvalidTask(f"{noun} {number} has target {target!r}, which is not one of the labels {self.labels}")
        if self.template is not None and "{input}" not in self.template:
            raise InvalidTask(f"template {self.template!r} has no field {{input}}")
        require_whole("orders", self.orders, 1, InvalidTask)
        stop = (() if self.chat else LINE) if self.stop is None else one_or_many(self.stop)
        object.__setattr__(self, "stop", stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise InvalidTask(f"stop is {self.stop!r:.80}; give the texts that end an answer, none of them empty")

    @classmethod
    def of(cls, given: Task | GivenRows) -> Task:
        """Return `given` if it is a Task, else a task of the rows `given`, with default settings."""
        return given if isinstance(given, Task) else cls(cast(Sequence[tuple[Prompt, str]], given))

    def prompt(self, asked: Prompt) -> Prompt:
        """Return the prompt for one input `asked`, the demonstrations included.

        A text is followed by a space and the answer, a Conversation, in a chat, by the assistant's turn.
        """
        return self._prompt(asked, self.instruction)

    @property
    def shown(self) -> tuple[tuple[Prompt, str], ...]:
        """The demonstrations as (input, target) pairs."""
        return cast(tuple[tuple[Prompt, str], ...], self.demonstrations)

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return cast(tuple[str, ...], self.stop)

    @property
    def neutral(self) -> tuple[tuple[Prompt, str | None], ...]:
        """The (input, label or None) pairs that calibrate the probabilities of labels; () for a task without calibration."""
        inputs = (NEUTRAL if self.calibrated else ()) if isinstance(self.calibrated, bool) else self.calibrated
        return tuple(entry if isinstance(entry, tuple) else (entry, None) for entry in inputs)

    @property
    def answer_end(self) -> str | None:
        """The text that ends an answer: a line break if there are demonstrations, else None, the end of the sequence."""
        return "\n" if self.demonstrations else None

    def in_orders(self) -> list[Task]:
        """Return one task for each of `orders` rotations of the demonstrations, at most one for each demonstration."""
        pairs = self.shown
        count = max(1, min(self.orders, len(pairs)))
        if count == 1:
            return [self]
        starts = [len(pairs) * number // count for number in range(count)]
        return [with_pairs(self, demonstrations=pairs[start:] + pairs[:start], orders=1) for start in starts]

    def prompt_of(self, row: Row) -> Prompt:
        """Return a row's prompt: its input if a whole prompt already, else with the instruction of the row or the task."""
        if row.whole_prompt:
            return row.input
        if row.chat is not None and self.chat is not False:
            return self._prompt(row.chat, self.instruction)
        return self._prompt(row.input, row.instruction or self.instruction)

    def _prompt(self, asked: Prompt, instruction: str) -> Prompt:
        if isinstance(asked, Conversation) if self.chat is None else self.chat:
            return self._conversation(asked, instruction)
        text = str(asked)
        template = DEFAULT_TEMPLATE if self.template is None else self.template
        # fields are replaced in one pass over the template, so that braces in the user's text are not read as fields
        parts = [part.replace("{instruction}", instruction) for part in template.split("{input}")]
        shown = [f"{str(prompt).join(parts)} {target}\n\n" for prompt, target in self.shown if prompt != text]
        return "".join([*shown, text.join(parts)])

    def _conversation(self, asked: Prompt, instruction: str) -> Conversation:
        template = self.template or (CHAT_TEMPLATE if instruction else "{input}")
        parts = [part.replace("{instruction}", instruction) for part in template.split("{input}")]

        def turns(given: Prompt) -> list[tuple[str, str]]:
            if not isinstance(given, Conversation):
                return [("user", given.join(parts))]
            *before, (role, last) = given.without_system.turns
            return [*before, (role, last.join(parts))]

        system = self.system or (asked.system if isinstance(asked, Conversation) else "")
        messages = [("system", system)] if system else []
        for prompt, target in self.shown:
            if prompt != self._as_kept(asked):
                messages += [*turns(prompt), ("assistant", target)]
        return Conversation((*messages, *turns(asked)))

    def _read_chat(self, rows: Sequence[Row]) -> None:
        """Set `chat` and `system`, if they are None, from the rows. Raises InvalidTask if only some rows are of messages.

        The rows are the examples, then the demonstrations.
        """
        chats = [row.chat is not None for row in rows]
        if self.chat is None and rows:
            if len(set(chats)) > 1:
                raise InvalidTask(
                    f"example {chats.index(True) + 1} has messages, and example {chats.index(False) + 1} has texts "
                    "(demonstrations count after the examples): pass chat=True to make messages of all, or chat=False to "
                    "make texts of all"
                )
            object.__setattr__(self, "chat", chats[0])
        if self.system and not self.chat:
            raise InvalidTask("system is a turn of a chat: pass chat=True, or the text as instruction=...")
        if self.chat and self.system is None:
            said = {row.chat.system if row.chat is not None else "" for row in rows}
            object.__setattr__(self, "system", said.pop() if len(said) == 1 else "")

    def _as_kept(self, asked: Prompt) -> Prompt:
        """Return the input `asked` as examples store it: a text, unless a chat has several turns or its own system turn."""
        if not isinstance(asked, Conversation) or self.chat is False:
            return str(asked)
        kept = asked.without_system if self.system else asked
        return kept.turns[0][1] if len(kept.turns) == 1 else kept


def with_pairs(task: Task, **fields: Any) -> Task:
    """Return a copy of the task with these fields; pairs among them are tuples from a task, which are not read again."""
    copied = copy(task)
    vars(copied).update(fields)
    return copied
