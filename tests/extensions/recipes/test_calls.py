"""What every gate, and every call, can rely on."""

import pytest
import torch

import loraweave as lw
from loraweave.composer.experts.together import ExpertJob

IDS_BT = torch.tensor([[3, 9, 27, 20], [6, 2, 25, 3], [7, 8, 9, 10], [5, 4, 3, 11]])


def draw(made):
    with torch.no_grad():
        for value in made.expert_parameters().values():
            value.normal_(std=0.3)
    return made


def test_a_prompt_ends_before_the_first_label_also_where_the_last_logits_alone_are_kept(make_model):
    with lw.experts("octavius", make_model("llama"), rank=2) as made:
        draw(made)
        labels = IDS_BT.masked_fill(torch.arange(4) < 2, -100)
        whole = made(input_ids=IDS_BT, labels=labels).logits
        kept = made(input_ids=IDS_BT, labels=labels[:, 2:], logits_to_keep=2).logits
        torch.testing.assert_close(kept, whole[:, 2:])


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_padding_of_embeddings_that_a_generation_begins_with_is_not_of_the_prompt(make_model, cache):
    with lw.experts("fedms", make_model("llama"), per_site=True) as made:
        draw(made)
        ids_BT = torch.tensor([[0, 0, 27, 20], [6, 2, 25, 3]])
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True, **cache}
        embed = made.base_model.get_input_embeddings()
        both = made.generate(inputs_embeds=embed(ids_BT), attention_mask=(ids_BT != 0).long(), do_sample=False, **options)
        alone = made.generate(ids_BT[:1, 2:], do_sample=False, **options)
        for logits, of_one in zip(both.logits, alone.logits, strict=True):
            torch.testing.assert_close(logits[:1], of_one, rtol=1e-4, atol=1e-4)


def test_a_job_has_the_terms_of_the_factors_too(make_model):
    with lw.experts("reward_ensemble", make_model("llama"), target_modules=("q_proj",), diversity=0.5) as made:
        job = ExpertJob("one", made, task="0")
        job.begin({"input_ids": IDS_BT}, None)
        singular = [torch.linalg.svdvals(torch.nn.functional.normalize(layer.a_SI)).sum() for layer in made.layers.values()]
        torch.testing.assert_close(job.penalty(), -0.5 * sum(singular) / 2)
