"""An expert of the cluster that a prompt is in, beside a universal one."""

import json

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import ScopeError, UnknownName, WeightingError
from loraweave.extensions.recipes import fit_clusters
from loraweave.hub.embedders.hashing import Hashing

LAYER = "model.layers.1.mlp.up_proj"
CLUSTERS = ("sums", "colours", "names")
IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [6, 2, 25, 3, 15]])
TEXTS = ("11 and 12", "12 and 13", "11 and 13", "blue or red", "red or blue", "blue and red", "fill a box", "fill a bag")


def by_text(trained, model, tokenizer, **options):
    made = lw.experts("mocle", model, tokenizer=tokenizer, embedder="hashing", **{"num_clusters": 3, **options})
    return fit_clusters(trained(made), TEXTS)


def weights_of(gate, embedding_H):
    """w_E of a row of a cluster with this embedding, written out, at the default temperature."""
    p_E = functional.softmax(gate.g_EH @ embedding_H / 0.05, dim=0)
    w_E = torch.zeros(len(p_E) + 1, dtype=p_E.dtype)
    w_E[p_E.argmax()] = p_E.max()
    w_E[-1] = 1 - p_E.max()
    return w_E


def encoded(tokenizer, *texts):
    """The texts as a batch, padded on the left."""
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False))


def test_a_site_adds_its_formula(adds_up):
    def weights(made, row, x_TI, x_I):
        return weights_of(made.gates[LAYER.replace(".", "/")], made.gates["reader"].c_KH[(2, 0)[row]])

    options = {"by_task": True, "tasks": CLUSTERS, "rank": 2, "alpha": 5.0, "num_experts": 3}
    adds_up("mocle", LAYER, {"input_ids": IDS_BT, "task": ["names", "sums"]}, weights, 5.0 / 2, **options)


def released_weights(gate, cluster, noise_E=0.0):
    """w_E of a row of that cluster by the authors' code."""
    p_E = functional.softmax((gate.g_EH @ gate.c_KH[cluster] + gate.bias_E + noise_E) / 0.05, dim=0)
    w_E = torch.zeros(len(p_E) + 1, dtype=p_E.dtype)
    # the code multiplies by the gate where it combines experts, and once more by the highest
    w_E[p_E.argmax()] = p_E.max() * p_E.max()
    w_E[-1] = 1 - p_E.max()
    return w_E


def test_as_released_each_site_has_its_own_embeddings_a_bias_and_the_square_of_its_best(make_model, adds_up):
    options = {"by_task": True, "tasks": CLUSTERS, "rank": 2, "alpha": 5.0, "num_experts": 3, "as_released": True}

    def weights(made, row, x_TI, x_I):
        return released_weights(made.gates[LAYER.replace(".", "/")], (2, 0)[row])

    adds_up("mocle", LAYER, {"input_ids": IDS_BT, "task": ["names", "sums"]}, weights, 5.0 / 2, **options)
    with lw.experts("mocle", make_model("llama"), target_modules=(LAYER, "q_proj"), **options) as made:
        assert made.gates[LAYER.replace(".", "/")].c_KH.shape == (3, 384)
        assert not any(name.startswith("gates.reader") for name in made.expert_parameters())


def test_as_released_training_adds_noise_to_the_scores_and_use_does_not(make_model, trained):
    model = make_model("llama", dtype=torch.float64)
    options = {"by_task": True, "tasks": CLUSTERS, "num_experts": 3, "as_released": True, "target_modules": (LAYER,)}
    with lw.experts("mocle", model, **options) as made:
        gate = trained(made).gates[LAYER.replace(".", "/")]
        own = made.adapter("names")
        made.train()
        torch.manual_seed(5)
        made(input_ids=IDS_BT, task=["names", "sums"])
        torch.manual_seed(5)
        noise_BE = 0.1 * torch.randn(2, 3, dtype=torch.float64)
        for row, cluster in enumerate((2, 0)):
            torch.testing.assert_close(made.notes.weights[LAYER][row, 0], released_weights(gate, cluster, noise_BE[row]))
        assert made.adapter("names").hash == own.hash


def test_as_released_sites_give_a_prompt_the_weights_of_its_cluster_and_are_saved_so(
    make_model, tokenizer, tmp_path, trained
):
    model, inputs = make_model("llama", dtype=torch.float64), encoded(tokenizer, "12 and 11", "red or red")
    with by_text(trained, model, tokenizer, as_released=True) as made:
        own = made(**inputs).logits
        clusters = made.gates["reader"].clusters(["12 and 11", "red or red"])
        made.gates.train()
        for gate in made.gates.values():
            gate.noise = 0.0
        made.train()(**inputs)
        for site, w_BTE in made.notes.weights.items():
            for row, cluster in enumerate(clusters):
                expected = released_weights(made.gates[site.replace(".", "/")], cluster)
                torch.testing.assert_close(w_BTE[row, 0], expected)
        made.save_pretrained(tmp_path / "made")
    with lw.experts(tmp_path / "made", model, tokenizer=tokenizer) as again:
        assert torch.equal(again(**inputs).logits, own)


def test_clusters_are_saved_with_the_experts_also_before_there_was_as_released(make_model, tokenizer, tmp_path, trained):
    model, inputs = make_model("llama"), encoded(tokenizer, "12 and 11", "red or red")
    with by_text(trained, model, tokenizer) as made:
        own = made(**inputs).logits
        made.save_pretrained(tmp_path / "made")
    with lw.experts(tmp_path / "made", model, tokenizer=tokenizer) as again:
        assert torch.equal(again(**inputs).logits, own)
    file = tmp_path / "made" / "experts.json"
    found = json.loads(file.read_text())
    assert found["options"].pop("as_released") is False
    assert found["options"]["num_features"] == 64
    file.write_text(json.dumps(found))
    with lw.experts("mocle", model, tokenizer=tokenizer, embedder="hashing", num_clusters=3) as again:
        assert torch.equal(again.load(tmp_path / "made")(**inputs).logits, own)


def test_the_adapter_of_a_cluster_is_the_model_of_it(make_model, trained):
    model = make_model("llama", dtype=torch.float64)
    with lw.experts("mocle", model, by_task=True, tasks=CLUSTERS, rank=2, temperature=1.0) as made:
        own = trained(made)(input_ids=IDS_BT, task="colours").logits
        adapter = made.adapter("colours")
    # its expert and the universal one
    assert all(factors.rank == 4 for factors in adapter.layers.values())
    with lw.Composer(model, lw.ExpertPool([adapter])).activate({adapter.name: 1.0}):
        torch.testing.assert_close(model(input_ids=IDS_BT).logits, own, rtol=1e-4, atol=1e-4)


def test_a_gate_that_is_sure_leaves_the_universal_expert_out(make_model):
    with lw.experts("mocle", make_model("llama"), by_task=True, tasks=CLUSTERS, temperature=1e-6) as made:
        made.train()(input_ids=IDS_BT, task="sums")
        for w_BTE in made.notes.weights.values():
            assert sorted(w_BTE[0, 0].tolist()) == [0.0, 0.0, 0.0, 0.0, 1.0]
            assert float(w_BTE[0, 0, -1].detach()) == 0.0


def test_a_prompt_has_the_weights_of_the_cluster_that_it_is_nearest_to(make_model, tokenizer, trained):
    prompts = ("12 and 11", "red or red", "fill a bag box")
    with by_text(trained, make_model("llama", dtype=torch.float64), tokenizer) as made:
        reader = made.gates["reader"]
        inputs = encoded(tokenizer, *prompts)
        made.train()(**inputs)
        for prompt, (site, w_BTE) in zip(prompts * 5, made.notes.weights.items(), strict=False):
            distance_K = (reader.centroid_KD - torch.from_numpy(Hashing().embed([prompt])[0])).norm(dim=1)
            cluster = int(distance_K.argmin())
            assert cluster == reader.clusters([TEXTS[(0, 3, 6)[prompts.index(prompt)]]])[0]
            row = w_BTE[prompts.index(prompt), 0]
            torch.testing.assert_close(row, weights_of(made.gates[site.replace(".", "/")], reader.c_KH[cluster]))


def test_centroids_are_the_means_of_their_members(make_model, tokenizer, trained):
    with by_text(trained, make_model("llama", dtype=torch.float64), tokenizer) as made:
        reader = made.gates["reader"]
        vectors_ND = torch.from_numpy(Hashing().embed(TEXTS)).double()
        member_N = torch.tensor(reader.clusters(TEXTS))
        assert reader.count_K.tolist() == member_N.bincount(minlength=3).tolist()
        assert bool(reader.count_K.all())
        for cluster in range(3):
            torch.testing.assert_close(reader.centroid_KD[cluster], vectors_ND[member_N == cluster].mean(dim=0))


def test_the_answer_has_the_weights_of_its_prompt(make_model, tokenizer, trained):
    with by_text(trained, make_model("llama", dtype=torch.float64), tokenizer) as made:
        inputs = encoded(tokenizer, "12 and 11", "red or red")
        settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cached = made.generate(**inputs, **settings)
        assert torch.equal(cached, made.generate(**inputs, **settings, use_cache=False))
        labels_BT = cached.clone()
        labels_BT[:, : inputs["input_ids"].shape[1]] = -100
        mask_BT = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        logits = made(input_ids=cached, attention_mask=mask_BT, labels=labels_BT, position_ids=positions_BT).logits
        assert torch.equal(logits[:, -5:-1].argmax(dim=-1), cached[:, -4:])


def test_one_cluster_is_one_set_of_weights(make_model, tokenizer, trained):
    with by_text(trained, make_model("llama"), tokenizer, num_clusters=1) as made:
        made.train()(**encoded(tokenizer, "12 and 11", "red or red"))
        for w_BTE in made.notes.weights.values():
            assert torch.equal(w_BTE[0], w_BTE[1])


def test_what_is_read_into_a_model_replaces_the_clusters_that_it_knew(make_model, tokenizer, tmp_path, trained):
    with by_text(trained, make_model("llama"), tokenizer) as other:
        own = other.gates["reader"].clusters(TEXTS)
        other.gates["reader"].centroid_KD.copy_(other.gates["reader"].centroid_KD.roll(1, dims=0))
        other.save_pretrained(tmp_path / "other")
        other.load(tmp_path / "other")
        assert other.gates["reader"].clusters(TEXTS) == [(cluster + 1) % 3 for cluster in own]


def test_texts_that_leave_a_cluster_without_a_member_are_refused(make_model, tokenizer):
    with lw.experts("mocle", make_model("llama"), tokenizer=tokenizer, embedder="hashing", num_clusters=3) as made:
        with pytest.raises(WeightingError, match="3 clusters need at least as many different texts, and 2 were given"):
            fit_clusters(made, ["blue", "red", "blue"])
        with pytest.raises(WeightingError, match="and 0 were given"):
            fit_clusters(made, [])
        with pytest.raises(WeightingError, match=r"no clusters yet: fit_clusters\(model, texts\) finds them"):
            made(input_ids=IDS_BT)


def test_what_a_row_says_has_to_be_known(make_model, tokenizer, trained):
    with (
        by_text(trained, make_model("llama"), None) as made,
        pytest.raises(ScopeError, match=r"tokenizer=.* and call it with input_ids"),
    ):
        made(input_ids=IDS_BT)
    with by_text(trained, make_model("llama"), tokenizer) as made:
        with pytest.raises(ScopeError, match="call it with input_ids"):
            made(inputs_embeds=torch.zeros(1, 3, 16))
        labels_BT = IDS_BT.clone()
        labels_BT[0, :2] = -100
        with pytest.raises(ScopeError, match="row 1 has none"):
            made(input_ids=IDS_BT, labels=labels_BT)


def test_clusters_of_another_embedder_are_refused(make_model, tokenizer, trained):
    with by_text(trained, make_model("llama"), tokenizer) as made:
        made.gates["reader"].made_by.fill_(7)
        with pytest.raises(WeightingError, match=r"of another embedder than 'hashing' now is .* fit them again"):
            made(input_ids=IDS_BT)


def test_a_recipe_without_clusters_of_texts_is_refused(make_model):
    with (
        lw.experts("mola", make_model("llama"), num_experts=(2,)) as made,
        pytest.raises(WeightingError, match="recipe 'mola' has no clusters to find in texts"),
    ):
        fit_clusters(made, TEXTS)
    with (
        lw.experts("mocle", make_model("llama"), by_task=True, tasks=CLUSTERS) as made,
        pytest.raises(WeightingError, match="are the tasks of the rows"),
    ):
        fit_clusters(made, TEXTS)


def test_an_embedder_that_there_is_not_is_refused_by_name(make_model):
    with pytest.raises(UnknownName, match="did you mean 'sentence'"):
        lw.experts("mocle", make_model("llama"), embedder="sentense")


def test_without_tasks_there_is_nothing_to_call_it_for_until_there_are_some(make_model):
    with lw.experts("mocle", make_model("llama"), by_task=True) as made:
        with pytest.raises(UnknownName, match=r"it has none: pass tasks=\(\.\.\.\) or fit\(\) it on \{task: rows\}"):
            made(input_ids=IDS_BT, task=0)
        made.take_tasks(CLUSTERS)
        made(input_ids=IDS_BT, task=["sums", "names"])
        assert set(made.adapter("names").layers) == set(made.sites)
