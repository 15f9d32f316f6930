"""Where branches of tasks leave the shared stream."""

from __future__ import annotations

import pytest

from loraweave.extensions.recipes.forms.task_branches import TaskBranches
from loraweave.extensions.recipes.recipes.mtlora import Mtlora, closing_blocks


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("segformer", ["segformer.stages.0.blocks.1", "segformer.stages.1.blocks.0"]),
        ("upernet", ["backbone.swin.encoder.layers.0.blocks.1", "backbone.swin.encoder.layers.1.blocks.0"]),
        ("llama", ["model.layers.1"]),
        ("bart", ["model.encoder.layers.0", "model.decoder.layers.0"]),
        # its blocks have lists of layers of different classes, which are no stages
        ("t5", ["encoder.block.1", "decoder.block.1"]),
    ],
)
def test_the_last_block_of_each_stage_or_stack_is_closing(make_model, kind, expected):
    assert closing_blocks(make_model(kind)) == expected


def test_the_places_of_closing_blocks_and_outside_the_blocks_are_closing(make_model):
    recipe = Mtlora(tasks=("a", "b"), target_modules=("fc1", "linear_fuse", "linear_projections.1.proj"))
    sites = TaskBranches.sites(make_model("segformer"), recipe)
    assert {site.name: site.closing for site in sites} == {
        "segformer.stages.0.blocks.0.mlp.fc1": False,
        "segformer.stages.0.blocks.1.mlp.fc1": True,
        "segformer.stages.1.blocks.0.mlp.fc1": True,
        # numbered, but no stage
        "decode_head.linear_projections.1.proj": False,
        "decode_head.linear_fuse": True,
    }
