"""The names for those who extend: what an extension, or another package, may import beside the public names.

Methods, routers, recipes, formats and the rest are files of a registry (docs/registries.md); what they are made from, and
what their options, files, rows and commands need, is here. A name is loaded with its module on first use. Type checkers read
the same names in `extend.pyi`, which `scripts/stub.py` writes.
"""

from __future__ import annotations

from loraweave.registry import lazy

_MODULES = {
    # entries of any registry, and their options
    "common.options": (
        "Count Declared Fraction NonNegative Positive Range Rate Share Whole check_options options_of require_known"
    ),
    "registry": "brought get lazy nearest traits traits_of",
    # merge methods
    "composer.merge.method_call": (
        "DenseUpdate Experts MethodCall Term TruncatedUpdate Weights surveys terms terms_of_one_rank weighted_bias"
    ),
    "composer.merge.methods._entries": "Entries Prune Rule decide divisor merge_elected merged sum_pruned",
    "composer.merge.methods._pruning": (
        "Cut LEVELS draws_for keep_largest largest prune_random prune_smallest quantise stream"
    ),
    "composer.merge.methods._span": "combination empty_update gram interpolation mean_weights pair_shares shares",
    # formats of adapters, and targets of exports
    "hub.formats._card": "base_model_of_readme json_text license_of_fields read_card readme_text",
    "hub.formats._config": "AdapterConfig config_fields words",
    "hub.formats._contents": "Bound Contents Dense cut_update lora_factors",
    "hub.formats._files": "entry folder_within open_file parse_json present read_bytes read_json",
    "hub.formats._peft_config": "module_names parse_lora stored_names stored_tensors",
    "hub.formats._reading": "is_adapter lora_files names_in",
    "hub.formats._safetensors": "FLOATS INTEGERS file_metadata read_tensors require_finite",
    # routers and searches
    "composer.compose.objectives._row_sums": "RowSums",
    "composer.compose.objectives.cross_entropy": "CrossEntropy",
    "retrieval.fusion": "wilson",
    "retrieval.query": "KeySpace Query",
    "routers.combined": "ByRow needs_call",
    "routers.invoked": "last_place",
    "routers.searches._solver": "ClosedForm Solver",
    "routers.searches.gradient": "Gradient",
    "routers.tokens._caches": "BesideCache RowsAndTokens",
    "routers.tokens._call": (
        "block_of cache_of current_prompts current_tokenizer has_two_sequences prompted real_tokens running_block"
    ),
    "routers.tokens._forms": "InputGates OutputRouter ScoredRouter output_factors",
    "routers.tokens._learned": "LearnedRouter Step TrainingReport",
    "routers.tokens._members": "LayerTensors Members find_names",
    "routers.tokens._router": "TokenRouter",
    "routers.tokens._saved": "router_class router_names",
    "routers.tokens._scores": "best_of top_k_softmax top_p_of_softmax without",
    "routers.tokens._text": "TextRouter labelled_tasks read_prompts",
    "routers.tokens.logistic": "Logistic",
    # recipes and their experts
    "composer.experts.expert_model": "ExpertModel require_expert_model",
    "composer.experts.forms._form": "Args Form Seen Weigh fitting",
    "composer.experts.forms.sum_of_experts": "SumOfExperts",
    "composer.experts.make": "has_expert layers_with put_expert",
    "composer.experts.parts": "is_named layer_sites make_recipe numbered_blocks require_all_named shapes_of",
    "composer.experts.running": "Running",
    "composer.experts.together": "ExpertJob require_shareable",
    "routers.recipes._gate": "Call Gate TokenGate Weighing draw_linear",
    "routers.recipes._recipe": (
        "ATTENTION EvenRecipe ExpertShape FEED_FORWARD Recipe Site TopKRecipe balance_term by_layer uniform"
    ),
    # models, batches and live mixtures
    "composer.ensembles.ensemble": (
        "EnsemblePrediction align_right answers by_rows known_members last_positions member_passes rows_of "
        "rows_that_fit without_cache"
    ),
    "composer.fused.fused": "Fused",
    "composer.fused.overwritten": "LayerLoss WeightWriter",
    "composer.live.fitting": "Fitting",
    "composer.live.hook": "Activate LiveHook LiveModel MixedLayer Resolve Traced",
    "composer.live.kernels._parts": (
        "AddsInPlace Cost Kernel Lend Part RowKernel RowSets TokenWorkload Workload costs "
        "group_by_mixture only_kernel own_precision place_of row_kernels weigh_b"
    ),
    "composer.live.kernels.dense": "sort_by_expert",
    "composer.live.pages": "PlacedFactors find_places",
    "composer.live.recording": "Trace UsedLayer UsedWeights",
    "composer.live.residents": "Lease",
    "composer.live.standing_in": "Handle StandIn claimed give_back",
    "composer.model.batches": (
        "EncodedRow IGNORED NO_TOKENIZER TargetBatch batch context_length encode end_tokens following last_logits "
        "mean_losses pad_apart pad_id pad_rows padded_inputs takes target_logits text_rows token_losses untouched "
        "with_positions"
    ),
    "composer.model.generate": "Asked encode_texts generation_call read_prompt",
    "composer.model.kinds": "by_row conv is_near linear",
    "composer.model.layers": "GradientTap TargetLayer is_floating multiplies_columns target_layer tied_parameters",
    "composer.model.scoring": "encode_pairs in_chunks predict",
    # compositions and formulas
    "composer.compose.candidates": "experts_of in_context_adapter",
    "composer.compose.compose": "ComposeCall",
    "composer.compose.loss": "ExampleLoss",
    "composer.compose.program": "Program",
    "composer.compose.refine": "STEP_COST linear_targets loss_with",
    "composer.compose.report": "ReportRow",
    "composer.formula.nodes": "Named Stored Sum leaves",
    # training
    "common.descent": (
        "Descent TrainingState backward caller_randomness checkpoint_folder descend drop_state load_state save_state "
        "save_tensors seeded tensor_bytes warmed_cosine with_seed"
    ),
    "composer.train.adapters": "Apart read_tasks require_plain require_startable require_texts target_layers training_rows",
    "composer.train.jobs": (
        "JobKind LoraJob LoraJobs LoraSettings LowRank Pace SharedPass Stream TrainingJob given_factors job_losses "
        "new_factors"
    ),
    "composer.train.progress": "KeptState TrainingProgress TrainingSettings checkpointed_blocks",
    "composer.train.rows": "HeldOut Judging MAX_PACKED Owners RowReader Texts TrainingRow can_be_packed is_empty",
    "composer.train.shared": "SharedTraining StepMemory",
    "composer.train.state": "JobReport JobSize PlannedJob SharedReport TrainedAdapters load_adapter save_adapter",
    # hubs
    "hub": "compositions",
    "hub.adapter": "ExportReport cosine parent_of",
    "hub.adding": "Addition MAX_BATCH_BYTES checked_policy prepare",
    "hub.base": (
        "PIPELINE_PARTS Parts base_config base_id fast_dtype fingerprint require_model require_same_base "
        "rounded_samples sampled_places says_nothing"
    ),
    "hub.base_layer": "BaseLayer ExpertMatrix as_base_layer base_layer expert_matrix head_size missing_layer",
    "hub.base_reference": "BaseReference base_loader",
    "hub.embedders": "sentence",
    "hub.embedders._embedder": "Embedder embed_in_batches embedder_of readable",
    "hub.gguf_base": "EMBEDDED GgufBase",
    "hub.indexes.flat": "Flat saved_array",
    "hub.licenses": "canonical is_accepted stated_license",
    "hub.merge_report": "by_number mixture_interference",
    "hub.pool": "StackedFactors require_everywhere",
    "hub.search.keys": "Keys Segment Stamp",
    "hub.sources": "Repository model_hub_client",
    "hub.stores.blobs": "examine_blob put_together take_apart",
    "hub.stores.catalogue": "state_row",
    "hub.stores.folder_blobs": "FolderBlobs STALE_TMP_S digests listed",
    "hub.stores.migrations": "migrate run_step",
    "hub.stores.open_stores": "blobs_of",
    "hub.stores.protocols": "BlobStore CatalogueStore Connection Near SharedCatalogue VectorSearch",
    "hub.stores.storing": "Prepared put_content recorded_blob stored_adapter usable_blob",
    "hub.stores.verify": "blob_problems",
    "hub.tables": "rows versions",
    "hub.tables.fields": "checked_fields",
    "hub.tables.filtering": "Filters store_labels",
    "hub.tables.rows": "stored_rows",
    "hub.tables.vectors": "row_sha256",
    # servers
    "serving.app": "make_app make_server",
    "serving.batch": "Prefixes",
    "serving.http": "EventStream loopback_only read_body read_request refused require_loopback unless_gone",
    "serving.limits": "Limits Refusal refusal_of",
    "serving.scheduler": "Admission Metrics too_busy",
    # the command line
    "cli._application": (
        "AnomaliesOption BaseOption BlobsOption DEFAULT_HUB DtypeOption HubOption JsonOption ManyTagsOption "
        "SeedOption WorkersOption composition_row note print_json print_rows print_table record_row"
    ),
    "cli._inputs": "load_model open_hub recorded_base require_dtype require_one_adapter",
    # factors, files, rows and what is shown
    "common.chat": "Prompt prompt_ids prompt_texts",
    "common.checks": "is_list is_number is_whole one_or_many require_whole",
    "common.compute": "library",
    "common.display": "ShownTable blank_figure progress_bar tracked",
    "common.files": (
        "as_path cache_folder is_damage read_yaml replacing require_replaceable storage_errors sync "
        "unsynced whole_file without_credentials"
    ),
    "common.names": "MAX_NAME_CHARACTERS checked_name printable text_digest unknown_expert",
    "common.process": "free_host_bytes launched_processes lock_of",
    "common.rows": "GivenRows Row located read_asked read_rows",
    "common.spread": "Failed processes_here require_all spread",
    "errors": "BudgetExceeded WorkersFailed",
    "lowrank": "algebra",
    "lowrank.factorise": "factorise",
    "types": "DEFAULT_TEMPLATE",
}

__getattr__ = lazy(__name__, {f"loraweave.{module}": names for module, names in _MODULES.items()})

__all__ = [name for names in _MODULES.values() for name in names.split()]


def __dir__() -> list[str]:
    return sorted(__all__)
