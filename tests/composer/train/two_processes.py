"""Trainings in as many processes as were launched, which the test beside it starts: two_processes.py folder."""

import sys
from pathlib import Path

import joblib
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny_models import linear_layers, random_factors, tokens_of

import loraweave as lw
from loraweave.errors import TrainingError

ROWS = [
    {"input_ids": [3 + i, *[9] * (1 + i % 3), 5 + i, 6], "labels": [-100, *[-100] * (1 + i % 3), 5 + i, 6]} for i in range(7)
]
SETTINGS = {"steps": 3, "batch_size": 4, "warmup": 0, "evaluation": ROWS[:3], "evaluate_every": 2, "progress": False}


# of unlike lengths, so that each process has other numbers of tokens
TASKS = {
    "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc"), ("dad", "daddad"), ("e", "ee"), ("fee", "feefee")],
    "upper": [("ab", "AB"), ("fed", "FED"), ("a", "A"), ("bead", "BEAD")],
}
LORA = {"rank": 2, "steps": 3, "batch_size": 4, "jobs_per_batch": 2, "lr": 1e-2, "progress": False}


def base():
    """The same model in every process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=31, initializer_range=0.3, **sizes)).double().eval()
    model.name_or_path = "tiny"
    return model


def tokenizer():
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokens_of([*special.values(), *"abcdefABCDEFInputO: \n"], **special)


def trained(**settings):
    """Experts, on the same rows in every process."""
    made = lw.experts("mola", base(), num_experts=(2, 3), rank=2, target_modules=("q_proj", "down_proj"))
    return made.fit(ROWS, **SETTINGS, **settings)


def routed(model=None, **settings):
    """A router with a term of its own, of two random adapters."""
    model = base() if model is None else model
    layers = linear_layers(model, ("q_proj", "down_proj"))
    pool = [
        lw.Adapter(name, "tiny", {layer: random_factors(seed, 2, *sides) for layer, sides in layers.items()})
        for seed, name in enumerate("ab")
    ]
    engine = lw.Composer(model, pool)
    made = lw.router("mole", engine.pool)
    made.fit(engine, ROWS, **SETTINGS, balance=0.1, **settings)
    return made


def adapted(model=None, **settings):
    """An adapter of each task."""
    model, held_out = base() if model is None else model, {"double": TASKS["double"][:2]}
    return lw.train_adapters(model, tokenizer(), TASKS, held_out=held_out, evaluate_every=2, **{**LORA, **settings})


def sharded():
    """The model of which each process has its part, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = base().requires_grad_(False), init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh)
    return model


def values(model, router, adapters):
    """What all three have learned, by name."""
    found = {f"experts {name}": value for name, value in model.expert_state().items()}
    found |= {f"router {name}": value for name, value in router.state_dict().items()}
    for task, adapter in adapters.items():
        for layer, factors in adapter.layers.items():
            found |= {f"{task} {layer} {part}": value for part, value in factors.tensors().items()}
    return {name: value.detach().contiguous().clone() for name, value in found.items()}


def reports(model, router, adapters):
    """(losses, evaluations) of each."""
    jobs = adapters.report.jobs
    of_jobs = [(job.losses, job.held_out) for job in (jobs["double"], jobs["upper"])]
    return [(found["losses"], found["evaluations"]) for found in (vars(model.training_report), router.report)] + of_jobs


def refusals():
    """What the launched processes refuse."""
    found = []
    for settings in ({"batch_size": 3}, {}, {"seed": dist.get_rank()}):
        try:
            with joblib.parallel_config(**({} if settings else {"n_jobs": 2})):
                adapted(**settings)
        except TrainingError as error:
            found.append(str(error))
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    made = trained(), routed(), adapted(checkpoint=folder / "kept")
    save_file(values(*made), folder / f"{dist.get_rank()}.safetensors")
    parts = sharded()
    assert sum(part.to_local().numel() for part in parts.parameters()) < 0.51 * sum(
        part.numel() for part in parts.parameters()
    )
    save_file(values(made[0], routed(parts), adapted(parts)), folder / f"{dist.get_rank()}.sharded.safetensors")
    (folder / f"{dist.get_rank()}.txt").write_text(repr((reports(*made), refusals())))
    dist.destroy_process_group()
