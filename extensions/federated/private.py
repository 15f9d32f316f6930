"""PrivateLoRA (Wang et al. 2023, arXiv 2311.14030): the base in one process, an adapter's core in another, low rank between.

b a = B M A, where A and B have orthonormal rows and columns: the base's process has the blocks, A and B, and never M; the
device has M, the embeddings, the language head, and so the tokens. In each layer the base sends z = A x, the device answers
M z, and B M z is added. One TCP connection carries a JSON greeting, then frames of numbers, each preceded by its size.

This gives locality, not secrecy: a base that keeps z and M z knows M after as many tokens as its rank, and may look up
embeddings in its table.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from loraweave import Adapter, AdapterUnsupported, Factors, LayerMismatch, SourceUnavailable
from loraweave.extend import algebra
from loraweave.extend.scoring import takes, untouched
from loraweave.extend.training import SharedPass, TrainingJob

logger = logging.getLogger(__name__)

HEAD = struct.Struct("!BHIIQ")
HELLO, EMBEDDINGS, LAYER, HIDDEN = range(4)
# flags of a call: return the states of all tokens; begin with an empty cache
WHOLE, BEGINS = 1, 2
# limits of one call
MAX_TOKENS = 2**15
MAX_JSON = 2**20
FLOAT = np.dtype("<f4")


def split_adapter(adapter: Adapter) -> tuple[Adapter, dict[str, Tensor]]:
    """Split an adapter into (public adapter, {layer: M_RR}): b a = B M A exactly, A = p^T, B = q of `algebra.orthonormal`.

    The public adapter's factors are A and B: the subspaces that the update reads and writes, not the map between them. Where
    A and B were drawn at random and M alone was trained, as published, they tell nothing about the training.
    Raises AdapterUnsupported for an update that is not b a alone.
    """
    layers, cores = {}, {}
    for name, factors in adapter.layers.items():
        if not factors.is_product or factors.kind != "linear" or adapter.heads or adapter.invocation:
            raise AdapterUnsupported(
                f"layer {name!r} of adapter {adapter.name!r} is more than b a of a linear layer: make it a plain "
                "LoRA first, by lw.to_lora(adapter, model)"
            )
        q_OR, core_RR, p_IR = algebra.orthonormal(factors.a_RI, factors.b_OR)
        layers[name] = Factors(p_IR.T.float().contiguous(), q_OR.float().contiguous())
        cores[name] = core_RR.float()
    public = Adapter(f"public part of {adapter.name}", adapter.base_model, layers, adapter.fingerprint)
    return public, cores


@dataclass
class Traffic:
    """The bytes of frames sent and received, including their heads.

    `tokens` is the number of tokens that ran through the base; `spared` are the bytes that would come on top if each layer's
    whole input and output were sent instead of A x and M A x, the low-rank parts of its update B M A x.
    """

    sent: int = 0
    received: int = 0
    tokens: int = 0
    spared: int = 0

    @property
    def bytes_per_token(self) -> float:
        """The bytes per token that went over the connection, both ways."""
        return (self.sent + self.received) / max(self.tokens, 1)

    @property
    def activation_bytes_per_token(self) -> float:
        """The bytes per token that would go over the connection with whole activations."""
        return (self.sent + self.received + self.spared) / max(self.tokens, 1)


class Head(NamedTuple):
    """The head of a frame: its kind, `place` (a layer's index or a call's flags), its shape, the number of bytes it has."""

    kind: int
    place: int
    rows: int
    tokens: int
    size: int


@dataclass(eq=False)
class _Line:
    """A connection to `peer` that carries frames and counts their bytes."""

    socket: socket.socket
    peer: str
    traffic: Traffic = field(default_factory=Traffic)

    def send(self, kind: int, x: Tensor | bytes, place: int = 0, rows: int = 0, tokens: int = 0) -> None:
        raw = x if isinstance(x, bytes) else x.detach().cpu().contiguous().numpy().astype(FLOAT, copy=False).tobytes()
        try:
            self.socket.sendall(HEAD.pack(kind, place, rows, tokens, len(raw)) + raw)
        except OSError as error:
            raise SourceUnavailable(f"{self.peer} is gone ({error}): begin again once it runs") from error
        self.traffic.sent += HEAD.size + len(raw)

    def head(self) -> Head:
        return Head(*HEAD.unpack(self._read(HEAD.size)))

    def due(self, kind: int) -> Head:
        """Read and return the head of the next frame, which must be of this kind. Raises LayerMismatch for another."""
        head = self.head()
        self.require(kind, head)
        return head

    def require(self, kind: int, found: Head) -> None:
        if found.kind != kind:
            raise LayerMismatch(f"{self.peer} sent a frame of kind {found.kind} where one of kind {kind} was due")

    def ended(self) -> bool:
        """Return True if the peer has closed the connection; waits for that or for the next frame."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except OSError as error:
            raise SourceUnavailable(f"{self.peer} is gone ({error})") from error

    def numbers(self, given: int, *shape: int) -> Tensor:
        """Read an fp32 tensor of this shape. Raises LayerMismatch, before allocation, unless it takes `given` bytes."""
        expected = math.prod(shape) * FLOAT.itemsize
        if given != expected:
            raise LayerMismatch(f"{self.peer} sent {given} bytes, and numbers of shape {shape} are {expected}")
        return torch.from_numpy(np.frombuffer(self._read(given), dtype=FLOAT).astype(np.float32, copy=False).reshape(shape))

    def json(self, given: int) -> Any:
        if given > MAX_JSON:
            raise LayerMismatch(f"{self.peer} began with {given} bytes, and a greeting has at most {MAX_JSON}")
        try:
            return json.loads(self._read(given))
        except ValueError as error:
            raise LayerMismatch(f"{self.peer} began with what is not JSON ({error})") from error

    def _read(self, count: int) -> bytearray:
        buffer = bytearray(count)
        view, place = memoryview(buffer), 0
        while place < count:
            try:
                size = self.socket.recv_into(view[place:])
            except OSError as error:
                raise SourceUnavailable(f"{self.peer} is gone ({error}) after {place} of {count} bytes") from error
            if not size:
                raise SourceUnavailable(f"{self.peer} ended the connection after {place} of {count} bytes")
            place += size
        self.traffic.received += count
        return buffer


class _Remote(TrainingJob):
    """A job that adds B M A x to the base's layers, where the device calculates M A x."""

    def __init__(self, public: Adapter, line: _Line) -> None:
        self.name = public.name
        self._factors = public.layers
        self._places = {layer: place for place, layer in enumerate(public.layers)}
        self._line = line

    @property
    def layers(self) -> Collection[str]:
        return self._factors.keys()

    def parameters(self) -> list[Tensor]:
        return []

    def update(self, layer: str, x_BTI: Tensor) -> Tensor:
        factors, line = self._factors[layer], self._line
        line.send(LAYER, x_BTI.float() @ factors.a_RI.T.to(x_BTI.device), self._places[layer], *x_BTI.shape[:2])
        z_BTR = line.numbers(line.due(LAYER).size, *x_BTI.shape[:2], factors.rank)
        return (z_BTR @ factors.b_OR.T).to(x_BTI)


def serve_base(
    model: Any,
    public: Adapter,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    timeout: float = 60.0,
    ready: Callable[[str, int], None] = lambda host, port: None,
    devices: int | None = None,
) -> None:
    """Run the model's blocks for one device after the other, until `devices` were served (None: until an interruption).

    `public` is the first result of `split_adapter`. `ready(host, port)` is called once devices may connect; port 0 takes a
    free one. A device that dies, is silent for `timeout` seconds, or sends other shapes than its adapter's ends its own
    connection, which is logged, and nothing else. Anyone who reaches the address can use the model.
    Raises LayerMismatch for a public adapter that does not fit the model's blocks.
    """
    body = model.base_model
    inside = {id(module) for module in body.modules()}
    for layer, factors in public.layers.items():
        module, adapter_shape = dict(model.named_modules()).get(layer), (len(factors.b_OR), factors.a_RI.shape[1])
        model_shape = (
            None if id(module) not in inside else (getattr(module, "out_features", 0), getattr(module, "in_features", 0))
        )
        if model_shape != adapter_shape:
            raise LayerMismatch(
                f"the adapter updates {layer!r} of {adapter_shape}, and the model's blocks have {model_shape} of that name"
            )
    with socket.create_server((host, port)) as server, untouched(model), torch.no_grad():
        ready(*server.getsockname()[:2])
        for _ in itertools.count() if devices is None else range(devices):
            connection, address = server.accept()
            connection.settimeout(timeout)
            with connection:
                line = _Line(connection, f"the device at {address[0]}:{address[1]}")
                try:
                    with SharedPass(model, [_Remote(public, line)]):
                        _answer(model, body, public, line)
                except (SourceUnavailable, LayerMismatch) as error:
                    logger.warning("%s", error)


def _answer(model: Any, body: Any, public: Adapter, line: _Line) -> None:
    """Run the base, its transformer blocks `body`, for each call of one device, until the device closes the connection."""
    embeddings = model.get_input_embeddings().weight
    hello = line.json(line.due(HELLO).size)
    line.send(HELLO, json.dumps({"adapter": public.hash}).encode())
    if hello != {"adapter": public.hash}:
        raise LayerMismatch(f"{line.peer} is of adapter {hello!r:.80}, and this base serves {public.hash}")
    name = "cache" if takes(body, "cache") else "past_key_values"
    cache: Any = None
    num_rows = 0
    while not line.ended():
        head = line.due(EMBEDDINGS)
        begins = cache is None or bool(head.place & BEGINS)
        num_rows, num_before = (head.rows, 0) if begins else (num_rows, cache.get_seq_length())
        in_all = head.rows * (num_before + head.tokens)
        if head.rows != num_rows or not head.rows * head.tokens or in_all > MAX_TOKENS:
            raise LayerMismatch(
                f"{line.peer} asks for {head.rows} rows of {head.tokens} tokens after {num_rows} of {num_before}; it gets "
                f"as many rows as before, and 1 to {MAX_TOKENS} tokens in all"
            )
        x_BTI = line.numbers(head.size, head.rows, head.tokens, embeddings.shape[1]).to(embeddings)
        output = body(inputs_embeds=x_BTI, use_cache=True, **{name: None if begins else cache})
        cache = getattr(output, name)
        hidden_BTI = output.last_hidden_state if head.place & WHOLE else output.last_hidden_state[:, -1:]
        line.send(HIDDEN, hidden_BTI.float(), 0, *hidden_BTI.shape[:2])


class PrivateDevice:
    """The device's half: a context manager whose `logits` and `generate` are those of the base with the adapter.

    `public` and `cores` come from one `split_adapter`; `embeddings` and `head` are the base's own, which also run here. Rows
    have no padding: all are of one length. `traffic` counts what went over the connection.
    Raises SourceUnavailable where no base answers or it dies, LayerMismatch where it serves another adapter or sends other
    shapes than this one's.
    """

    def __init__(
        self,
        public: Adapter,
        cores: Mapping[str, Tensor],
        embeddings: nn.Module,
        head: nn.Module,
        *,
        host: str = "127.0.0.1",
        port: int,
        timeout: float = 60.0,
    ) -> None:
        self._layers = [(cores[layer], factors) for layer, factors in public.layers.items()]
        self._embeddings, self._head = embeddings, head
        peer = f"the base at {host}:{port}"
        try:
            connection = socket.create_connection((host, port), timeout=timeout)
        except OSError as error:
            raise SourceUnavailable(f"{peer} does not answer ({error}): start it with serve_base()") from error
        self._line = _Line(connection, peer)
        try:
            self._line.send(HELLO, json.dumps({"adapter": public.hash}).encode())
            said = self._line.json(self._line.due(HELLO).size)
            if said != {"adapter": public.hash}:
                raise LayerMismatch(
                    f"{peer} serves {said!r:.120}, not adapter {public.hash}: give both the parts of one split_adapter()"
                )
        except BaseException:
            self.close()
            raise

    @property
    def traffic(self) -> Traffic:
        return self._line.traffic

    def __enter__(self) -> PrivateDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._line.socket.close()

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return logits_BTV of all tokens of rows without padding."""
        return self._call(ids_BT, WHOLE | BEGINS)

    def generate(self, ids_BT: Tensor, *, max_new_tokens: int, eos_token_id: int | None = None) -> Tensor:
        """Return the rows with up to `max_new_tokens` likeliest tokens appended; stop once each has had `eos_token_id`."""
        rows_BT, new_BT = ids_BT, ids_BT
        ended_B = torch.zeros(len(ids_BT), dtype=torch.bool)
        for number in range(max_new_tokens):
            next_B = self._call(new_BT, 0 if number else BEGINS)[:, -1].argmax(dim=-1)
            next_B = next_B if eos_token_id is None else next_B.masked_fill(ended_B, eos_token_id)
            new_BT = next_B[:, None]
            rows_BT = torch.cat([rows_BT, new_BT], dim=1)
            ended_B = ended_B | (next_B == eos_token_id)
            if bool(ended_B.all()):
                break
        return rows_BT

    @torch.no_grad()
    def _call(self, ids_BT: Tensor, asked: int) -> Tensor:
        line, (rows, tokens) = self._line, ids_BT.shape
        x_BTI = self._embeddings(ids_BT)
        line.send(EMBEDDINGS, x_BTI.float(), asked, rows, tokens)
        while (head := line.head()).kind == LAYER:
            if head.place >= len(self._layers):
                raise LayerMismatch(f"{line.peer} asks for layer {head.place}, and the adapter has {len(self._layers)}")
            m_RR, factors = self._layers[head.place]
            z_NR = line.numbers(head.size, rows * tokens, factors.rank)
            line.send(LAYER, z_NR @ m_RR.T, head.place, 1, rows * tokens)
            whole = len(factors.b_OR) + factors.a_RI.shape[1] - 2 * factors.rank
            line.traffic.spared += rows * tokens * whole * FLOAT.itemsize
        line.require(HIDDEN, head)
        hidden_BTI = line.numbers(head.size, rows, tokens if asked & WHOLE else 1, x_BTI.shape[2])
        line.traffic.tokens += rows * tokens
        logits_BTV: Tensor = self._head(hidden_BTI.to(x_BTI))
        return logits_BTV
