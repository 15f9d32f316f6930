"""What tests of the server share: compositions without a hub, rows that keep what they hear, and answers of rows alone."""

import time

import torch

from loraweave.serving.batch import Batch, Prefixes, Row, Sampling
from loraweave.serving.memory import Experts
from loraweave.serving.names import Served

PROMPTS = ["abc", "the judge thanked: ", "b", "zebra 12, 34. ", "OPA? "]
MIXTURES = [{"a": 1.0}, {}, {"b": 0.7, "c": -0.4}, {"c": 1.0}, {"a": 0.5, "b": 0.5, "c": 0.5}]


def served(adapters, weights):
    """A composition of these weights by name, as the server keeps it by content."""
    by_name = {adapter.name: adapter for adapter in adapters}
    return Served(
        str(weights),
        str(weights),
        {by_name[name].hash: weight for name, weight in weights.items()},
        {by_name[name].hash: by_name[name] for name in weights},
    )


def routed(engine, router):
    """A router over all adapters of the engine, as the server keeps it by its formula."""
    return Served(router.name, router.name, {}, dict(engine.pool.adapters), router)


class Heard:
    """A row, and all that was told of it."""

    def __init__(self, tokenizer, prompt, composition, sampling, **options):
        self.events = []
        self.row = Row(
            [tokenizer(prompt)["input_ids"]] * len(composition.members), composition, sampling, self.events.append, **options
        )

    @property
    def text(self):
        return "".join(event.text for event in self.events)

    @property
    def logprobs(self):
        return [chosen.logprob for event in self.events for chosen in event.chosen]

    @property
    def finish(self):
        return self.events[-1].finish

    @property
    def error(self):
        return next((event for event in self.events if isinstance(event, BaseException)), None)


def heard_rows(tokenizer, adapters, max_tokens=9, **options):
    """A row for each prompt and mixture above, greedy and with log-probabilities unless told otherwise."""
    sampling = Sampling(max_tokens, **{"temperature": 0.0, "logprobs": 2, **options})
    return [
        Heard(tokenizer, prompt, served(adapters, weights), sampling)
        for prompt, weights in zip(PROMPTS, MIXTURES, strict=True)
    ]


def make_batch(model, tokenizer, most=8, prefixes=None):
    experts = Experts(model, tokenizer, most)
    return Batch(model, tokenizer, experts, prefixes or Prefixes()), experts


def join(batch, experts, heard):
    """What the scheduler does for rows that join."""
    for each in heard:
        experts.take(each.row.served)
    batch.read([each.row for each in heard])


def finish(batch):
    """Steps until no row is left."""
    while batch.rows:
        batch.step()


@torch.no_grad()
def alone(engine, prompt, weights, max_tokens=9):
    """(text, log-probability of each token but the end) of transformers' greedy search on this prompt alone."""
    ids = torch.tensor([engine.tokenizer(prompt)["input_ids"]])
    with engine.activate(weights):
        output = engine.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, ids.shape[1] :]
    logprobs = [float(step[0].double().log_softmax(0)[token]) for step, token in zip(output.logits, tokens, strict=True)]
    ends = tokens[-1] == engine.model.generation_config.eos_token_id
    return engine.tokenizer.decode(tokens, skip_special_tokens=True), logprobs[:-1] if ends else logprobs


@torch.no_grad()
def averaged(engine, prompts, mixtures, shares, max_tokens=9):
    """The greedy text of sum over members of share * softmax(logits after its prompt and all tokens so far), no cache."""
    tokens = []
    while len(tokens) < max_tokens and engine.model.generation_config.eos_token_id not in tokens:
        total_V = 0
        for prompt, mixture, share in zip(prompts, mixtures, shares, strict=True):
            with engine.activate(mixture):
                ids = engine.tokenizer(prompt)["input_ids"] + tokens
                total_V = total_V + share * engine.model(torch.tensor([ids])).logits[0, -1].double().softmax(0)
        tokens.append(int(total_V.argmax()))
    return engine.tokenizer.decode(tokens, skip_special_tokens=True)


def wait_for(rows, seconds=60):
    until = time.monotonic() + seconds
    while not all(each.row.over for each in rows):
        assert time.monotonic() < until
        time.sleep(0.002)


def require_alone(engine, heard):
    """Compare rows of the prompts and mixtures above with the engine alone."""
    for each, prompt, weights in zip(heard, PROMPTS, MIXTURES, strict=True):
        assert each.error is None
        assert each.text == alone(engine, prompt, weights)[0]


def long_row(tokenizer, adapters, prompt="abc", tokens=40):
    return Heard(tokenizer, prompt, served(adapters, {"b": 1.0}), Sampling(tokens, temperature=0.0))
