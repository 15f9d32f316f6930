"""The names for those who extend: what an extension, or another package, may import beside the public names.

Methods, routers, recipes, formats and the rest are files of a registry (docs/registries.md); what they are made from, and
what their options, files, rows and commands need, is here. A name is loaded with its module on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraweave.common.lazy import lazy

if TYPE_CHECKING:
    from loraweave.cli._application import DEFAULT_HUB, BaseOption, DtypeOption, HubOption, JsonOption, SeedOption
    from loraweave.cli._inputs import load_model, open_hub, recorded_base, require_dtype, require_one_adapter
    from loraweave.cli._printing import note, print_json, print_table
    from loraweave.common.chat import Prompt, prompt_ids, prompt_texts
    from loraweave.common.checks import is_list, is_number, is_whole, require_whole
    from loraweave.common.descent import Descent, backward, descend
    from loraweave.common.display import ShownTable, blank_figure, progress_bar, tracked
    from loraweave.common.files import cache_folder, replacing, require_replaceable, sync, unsynced, whole_file
    from loraweave.common.intervals import wilson
    from loraweave.common.names import MAX_NAME_CHARACTERS, printable, text_digest, unknown_expert
    from loraweave.common.options import (
        Count,
        Declared,
        Fraction,
        NonNegative,
        Positive,
        Range,
        Rate,
        Seed,
        Share,
        Whole,
        check_options,
        options_of,
        require_known,
    )
    from loraweave.common.process import lock_of
    from loraweave.common.randomness import caller_randomness, seeded, with_seed
    from loraweave.common.rows import GivenRows, Row, read_asked, read_rows
    from loraweave.common.spread import Failed, require_all, spread
    from loraweave.common.state import (
        RUNNING,
        TrainingState,
        checkpoint_folder,
        drop_state,
        load_state,
        save_state,
        save_tensors,
    )
    from loraweave.common.storage_errors import remote_errors, storage_errors, without_credentials
    from loraweave.common.yaml_file import read_yaml
    from loraweave.composer.compose.collect_statistics import layer_vectors, record_inputs, text_rows
    from loraweave.composer.compose.compose import ComposeCall
    from loraweave.composer.compose.objectives._row_sums import RowSums
    from loraweave.composer.compose.objectives.cross_entropy import CrossEntropy
    from loraweave.composer.ensembles.ensemble import EnsemblePrediction, align_right, last_positions, without_cache
    from loraweave.composer.ensembles.member_passes import by_rows, known_members, member_passes, rows_of, rows_that_fit
    from loraweave.composer.experts.exchange import has_expert, layers_with, put_expert
    from loraweave.composer.experts.expert_model import ExpertModel, require_expert_model
    from loraweave.composer.experts.forms._form import Args, Form, Seen, Weigh, fitting
    from loraweave.composer.experts.forms.sum_of_experts import SumOfExperts
    from loraweave.composer.experts.make import with_options, with_task
    from loraweave.composer.experts.parts import is_named, layer_sites, numbered_blocks, require_all_named
    from loraweave.composer.experts.running import Running
    from loraweave.composer.experts.together import ExpertJob
    from loraweave.composer.formula.nodes import Named, Stored, Sum, leaves
    from loraweave.composer.fused.fused import Fused
    from loraweave.composer.fused.overwritten import LayerLoss, WeightWriter
    from loraweave.composer.live.hook import Activate, LiveHook, LiveModel, MixedLayer, Resolve, Traced
    from loraweave.composer.live.kernels._added_experts import sort_by_expert
    from loraweave.composer.live.kernels._choice import only_kernel
    from loraweave.composer.live.kernels._cost import Cost, Workload
    from loraweave.composer.live.kernels._parts import (
        Kernel,
        Lend,
        Part,
        RowKernel,
        RowSets,
        group_by_mixture,
        group_rows,
        own_precision,
        place_of,
        weigh_b,
    )
    from loraweave.composer.live.layout import PlacedFactors, find_places
    from loraweave.composer.live.limits import Handle
    from loraweave.composer.live.recording import Load, Trace, UsedLayer, UsedWeights, load_of
    from loraweave.composer.live.residents import Lease
    from loraweave.composer.live.standing_in import StandIn, claimed, give_back
    from loraweave.composer.merge.interference import mixture_interference
    from loraweave.composer.merge.method_call import MethodCall, surveys
    from loraweave.composer.merge.methods._dropout import prune_random
    from loraweave.composer.merge.methods._entries import Entries, Prune, Rule, sum_pruned
    from loraweave.composer.merge.methods._signs import merge_elected
    from loraweave.composer.merge.methods._span import (
        combination,
        empty_update,
        gram,
        interpolation,
        mean_weights,
        pair_shares,
        shares,
    )
    from loraweave.composer.merge.methods._terms import Experts, Term, Weights, terms, terms_of_one_rank, weighted_bias
    from loraweave.composer.merge.methods._thresholds import prune_smallest
    from loraweave.composer.merge.methods.breadcrumbs import prune_both_ends
    from loraweave.composer.merge.methods.della import magprune
    from loraweave.composer.merge.updates import DenseUpdate, TruncatedUpdate
    from loraweave.composer.model.batches import (
        IGNORED,
        EncodedRow,
        TargetBatch,
        batch,
        context_length,
        encode,
        end_tokens,
        last_logits,
        mean_losses,
        pad_id,
        pad_rows,
        takes,
        target_logits,
        token_losses,
        untouched,
        with_positions,
    )
    from loraweave.composer.model.generate import Asked, encode_texts, generation_call, read_prompt
    from loraweave.composer.model.kinds import by_row, conv, is_near, linear
    from loraweave.composer.model.layers import TargetLayer, is_floating, target_layer
    from loraweave.composer.model.scoring import encode_pairs, in_chunks, predict
    from loraweave.composer.train.adapters import target_layers, train_further, training_rows
    from loraweave.composer.train.jobs import LoraJob, LowRank, TrainingJob, given_factors, new_factors
    from loraweave.composer.train.passes import LoraJobs, SharedPass, job_losses
    from loraweave.composer.train.rows import Texts
    from loraweave.composer.train.settings import LoraSettings, read_endings, read_tasks
    from loraweave.errors import BudgetExceeded
    from loraweave.hub.base import EMBEDDED, base_config, base_id, fingerprint, require_model, stored_base
    from loraweave.hub.base_reference import base_loader
    from loraweave.hub.embedders._embedder import Embedder, embedder_of
    from loraweave.hub.formats._base_layer import BaseLayer, as_base_layer, base_layer, head_size, missing_layer
    from loraweave.hub.formats._card import json_text, model_id, read_card, readme_text
    from loraweave.hub.formats._config import AdapterConfig, words
    from loraweave.hub.formats._contents import Contents, Reader
    from loraweave.hub.formats._conversion import Bound, Dense, cut_update, lora_factors, plain_factors
    from loraweave.hub.formats._file_format import FileFormat
    from loraweave.hub.formats._files import entry, parse_json, present, read_bytes, read_json
    from loraweave.hub.formats._foreign import ForeignFormat, PeftReader, StoredLayer, check_size
    from loraweave.hub.formats._peft_config import parse_lora, stored_names
    from loraweave.hub.formats._safetensors import read_tensors, require_finite
    from loraweave.hub.indexes._vectors import Index
    from loraweave.hub.licenses import stated_license
    from loraweave.hub.pipeline import PIPELINE_PARTS, Pipeline
    from loraweave.hub.pool import require_everywhere
    from loraweave.hub.same_base import require_same_base, says_nothing
    from loraweave.hub.stores.catalogue import state_row
    from loraweave.hub.stores.folder_blobs import STALE_TMP_S, FolderBlobs
    from loraweave.hub.stores.migrations import run_step
    from loraweave.hub.stores.packing import put_together, take_apart
    from loraweave.hub.stores.protocols import BlobStore, CatalogueStore, Connection, Near, SharedCatalogue, VectorSearch
    from loraweave.hub.tables.filtering import Filters, store_labels
    from loraweave.hub.tables.rows import stored_rows
    from loraweave.hub.tables.vectors import row_sha256
    from loraweave.hub.targets._target import TIED_MODULES, Target, module_names
    from loraweave.lowrank import algebra
    from loraweave.lowrank.factorise import factorise
    from loraweave.registry import brought, get, nearest, traits, traits_of
    from loraweave.retrieval.keyed_search import Key
    from loraweave.routers.combined import ByRow, needs_call, num_rows_of
    from loraweave.routers.recipes._gate import UNKNOWN, Call, Gate, Weighing, draw_linear
    from loraweave.routers.recipes._recipe import (
        ATTENTION,
        FEED_FORWARD,
        EvenRecipe,
        ExpertShape,
        Recipe,
        Site,
        TopKRecipe,
        balance_term,
        by_layer,
        uniform,
    )
    from loraweave.routers.recipes._token_gates import TokenGate, top_k_of_softmax
    from loraweave.routers.searches._solver import ClosedForm, Solver
    from loraweave.routers.searches.gradient import Gradient
    from loraweave.routers.tokens._caches import BesideCache, RowsAndTokens
    from loraweave.routers.tokens._call import (
        cache_of,
        current_prompts,
        current_tokenizer,
        has_two_sequences,
        prompted,
        real_tokens,
    )
    from loraweave.routers.tokens._forms import InputGates, OutputRouter, ScoredRouter, output_factors
    from loraweave.routers.tokens._learned import LearnedRouter, Step
    from loraweave.routers.tokens._members import LayerTensors, Members
    from loraweave.routers.tokens._model import block_of, running_block
    from loraweave.routers.tokens._router import TokenRouter
    from loraweave.routers.tokens._saved import router_class, router_names
    from loraweave.routers.tokens._scores import Lambda, best_of, least_lambda, sparsegen, top_k_softmax, without
    from loraweave.routers.tokens._text import Examples, TextRouter, labelled_tasks
    from loraweave.routers.tokens.logistic import Logistic
    from loraweave.serving.app import make_app
    from loraweave.serving.http import (
        EventStream,
        loopback_only,
        read_body,
        read_request,
        refused,
        require_loopback,
        unless_gone,
    )
    from loraweave.serving.limits import Limits
    from loraweave.serving.refusals import Refusal, refusal_of
    from loraweave.serving.scheduler import too_busy
    from loraweave.types import DEFAULT_TEMPLATE

# the same names by module: a process imports what it uses, a type checker reads the imports above
_MODULES = {
    # what a registry holds
    "registry": "brought get nearest traits traits_of",
    "common.options": (
        "Count Declared Fraction NonNegative Positive Range Rate Seed Share Whole check_options options_of require_known"
    ),
    "composer.merge.updates": "DenseUpdate TruncatedUpdate",
    "hub.embedders._embedder": "Embedder embedder_of",
    "hub.formats._contents": "Contents Reader",
    "hub.indexes._vectors": "Index",
    "hub.targets._target": "TIED_MODULES Target module_names",
    "retrieval.keyed_search": "Key",
    "routers.recipes._recipe": (
        "ATTENTION EvenRecipe ExpertShape FEED_FORWARD Recipe Site TopKRecipe balance_term by_layer uniform"
    ),
    "routers.searches._solver": "ClosedForm Solver",
    "routers.tokens._learned": "LearnedRouter Step",
    "routers.tokens._router": "TokenRouter",
    "routers.tokens._saved": "router_class router_names",
    "routers.tokens._scores": "Lambda best_of least_lambda sparsegen top_k_softmax without",
    "composer.merge.methods._span": "combination empty_update gram interpolation mean_weights pair_shares shares",
    "composer.merge.methods._terms": "Experts Term Weights terms terms_of_one_rank weighted_bias",
    "composer.compose.objectives._row_sums": "RowSums",
    "composer.compose.objectives.cross_entropy": "CrossEntropy",
    "routers.searches.gradient": "Gradient",
    "routers.tokens._caches": "BesideCache RowsAndTokens",
    "routers.tokens._call": "cache_of current_prompts current_tokenizer has_two_sequences prompted real_tokens",
    "routers.tokens._forms": "InputGates OutputRouter ScoredRouter output_factors",
    "routers.tokens._members": "LayerTensors Members",
    "routers.tokens._text": "Examples TextRouter labelled_tasks",
    "routers.tokens.logistic": "Logistic",
    "composer.merge.method_call": "MethodCall surveys",
    "composer.merge.methods._dropout": "prune_random",
    "composer.merge.methods._entries": "Entries Prune Rule sum_pruned",
    "composer.merge.methods._signs": "merge_elected",
    "composer.merge.methods._thresholds": "prune_smallest",
    "composer.merge.methods.breadcrumbs": "prune_both_ends",
    "composer.merge.methods.della": "magprune",
    "hub.formats._config": "AdapterConfig words",
    "hub.formats._conversion": "Bound Dense cut_update lora_factors plain_factors",
    "hub.formats._file_format": "FileFormat",
    "hub.formats._foreign": "ForeignFormat PeftReader StoredLayer check_size",
    "hub.formats._peft_config": "parse_lora stored_names",
    "hub.formats._safetensors": "read_tensors require_finite",
    "hub.formats._card": "json_text model_id read_card readme_text",
    "hub.pipeline": "PIPELINE_PARTS Pipeline",
    "hub.stores.packing": "put_together take_apart",
    # models, training and scoring
    "composer.ensembles.member_passes": "by_rows known_members member_passes rows_of rows_that_fit",
    "composer.ensembles.ensemble": "EnsemblePrediction align_right last_positions without_cache",
    "common.descent": "Descent backward descend",
    "common.randomness": "caller_randomness seeded with_seed",
    "common.intervals": "wilson",
    "common.spread": "Failed require_all spread",
    "composer.compose.compose": "ComposeCall",
    "composer.compose.collect_statistics": "layer_vectors record_inputs text_rows",
    "composer.experts.expert_model": "ExpertModel require_expert_model",
    "composer.formula.nodes": "Named Stored Sum leaves",
    "composer.model.batches": (
        "EncodedRow IGNORED TargetBatch batch context_length encode end_tokens last_logits mean_losses pad_id "
        "pad_rows takes target_logits token_losses untouched with_positions"
    ),
    "composer.model.layers": "TargetLayer is_floating target_layer",
    "composer.model.scoring": "encode_pairs in_chunks predict",
    "composer.train.adapters": "target_layers train_further training_rows",
    "composer.train.jobs": "LoraJob LowRank TrainingJob given_factors new_factors",
    "composer.train.passes": "LoraJobs SharedPass job_losses",
    "composer.train.rows": "Texts",
    "composer.train.settings": "LoraSettings read_endings read_tasks",
    "hub.base": "EMBEDDED base_config base_id fingerprint require_model stored_base",
    "hub.base_reference": "base_loader",
    "lowrank": "algebra",
    "lowrank.factorise": "factorise",
    "routers.tokens._model": "block_of running_block",
    "composer.merge.interference": "mixture_interference",
    "composer.experts.together": "ExpertJob",
    "hub.formats._base_layer": "BaseLayer as_base_layer base_layer head_size missing_layer",
    "hub.pool": "require_everywhere",
    "composer.live.recording": "Load Trace UsedLayer UsedWeights load_of",
    "composer.model.generate": "Asked encode_texts generation_call read_prompt",
    "hub.licenses": "stated_license",
    "hub.same_base": "require_same_base says_nothing",
    "composer.live.standing_in": "StandIn claimed give_back",
    # reading, writing and showing
    "common.storage_errors": "remote_errors storage_errors without_credentials",
    "common.state": "RUNNING TrainingState checkpoint_folder drop_state load_state save_state save_tensors",
    "common.chat": "Prompt prompt_ids prompt_texts",
    "common.checks": "is_list is_number is_whole require_whole",
    "common.display": "ShownTable blank_figure progress_bar tracked",
    "common.files": "cache_folder replacing require_replaceable sync unsynced whole_file",
    "common.names": "MAX_NAME_CHARACTERS printable text_digest unknown_expert",
    "common.rows": "GivenRows Row read_asked read_rows",
    "common.yaml_file": "read_yaml",
    "hub.formats._files": "entry parse_json present read_bytes read_json",
    "types": "DEFAULT_TEMPLATE",
    "errors": "BudgetExceeded",
    # hubs and servers elsewhere
    "hub.stores.protocols": "BlobStore CatalogueStore Connection Near SharedCatalogue VectorSearch",
    "serving.limits": "Limits",
    "hub.stores.folder_blobs": "FolderBlobs STALE_TMP_S",
    "hub.stores.catalogue": "state_row",
    "hub.stores.migrations": "run_step",
    "hub.tables.filtering": "Filters store_labels",
    "hub.tables.rows": "stored_rows",
    "hub.tables.vectors": "row_sha256",
    "serving.app": "make_app",
    "serving.refusals": "Refusal refusal_of",
    "serving.scheduler": "too_busy",
    # the command line
    "cli._application": "BaseOption DEFAULT_HUB DtypeOption HubOption JsonOption SeedOption",
    "cli._inputs": "load_model open_hub recorded_base require_dtype require_one_adapter",
    "cli._printing": "note print_json print_table",
    # HTTP applications over the same models
    "serving.http": "EventStream loopback_only read_body read_request refused require_loopback unless_gone",
    # what live mixtures are made of: hooks, and kernels by row with their costs
    "common.process": "lock_of",
    "composer.live.kernels._choice": "only_kernel",
    "composer.live.kernels._cost": "Cost Workload",
    "composer.live.kernels._parts": (
        "Kernel Lend Part RowKernel RowSets group_by_mixture group_rows own_precision place_of weigh_b"
    ),
    "composer.live.layout": "PlacedFactors find_places",
    "composer.live.residents": "Lease",
    "composer.live.hook": "Activate LiveHook LiveModel MixedLayer Resolve Traced",
    "composer.live.limits": "Handle",
    "routers.combined": "ByRow needs_call num_rows_of",
    # what a recipe is made from: gates, what they look at, and the form of its experts (docs/extensions/recipes.md)
    "routers.recipes._gate": "Call Gate UNKNOWN Weighing draw_linear",
    "routers.recipes._token_gates": "TokenGate top_k_of_softmax",
    "composer.experts.forms._form": "Args Form Seen Weigh fitting",
    "composer.experts.forms.sum_of_experts": "SumOfExperts",
    "composer.experts.parts": "is_named layer_sites numbered_blocks require_all_named",
    "composer.experts.running": "Running",
    "composer.experts.make": "with_options with_task",
    "composer.experts.exchange": "has_expert layers_with put_expert",
    "composer.model.kinds": "by_row conv is_near linear",
    "composer.live.kernels._added_experts": "sort_by_expert",
    # what is written into weights
    "composer.fused.fused": "Fused",
    "composer.fused.overwritten": "LayerLoss WeightWriter",
}

if not TYPE_CHECKING:
    __getattr__ = lazy(__name__, {f"loraweave.{module}": names for module, names in _MODULES.items()})


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "ATTENTION",
    "DEFAULT_HUB",
    "DEFAULT_TEMPLATE",
    "EMBEDDED",
    "FEED_FORWARD",
    "IGNORED",
    "MAX_NAME_CHARACTERS",
    "PIPELINE_PARTS",
    "RUNNING",
    "STALE_TMP_S",
    "TIED_MODULES",
    "UNKNOWN",
    "Activate",
    "AdapterConfig",
    "Args",
    "Asked",
    "BaseLayer",
    "BaseOption",
    "BesideCache",
    "BlobStore",
    "Bound",
    "BudgetExceeded",
    "ByRow",
    "Call",
    "CatalogueStore",
    "ClosedForm",
    "ComposeCall",
    "Connection",
    "Contents",
    "Cost",
    "Count",
    "CrossEntropy",
    "Declared",
    "Dense",
    "DenseUpdate",
    "Descent",
    "DtypeOption",
    "Embedder",
    "EncodedRow",
    "EnsemblePrediction",
    "Entries",
    "EvenRecipe",
    "EventStream",
    "Examples",
    "ExpertJob",
    "ExpertModel",
    "ExpertShape",
    "Experts",
    "Failed",
    "FileFormat",
    "Filters",
    "FolderBlobs",
    "ForeignFormat",
    "Form",
    "Fraction",
    "Fused",
    "Gate",
    "GivenRows",
    "Gradient",
    "Handle",
    "HubOption",
    "Index",
    "InputGates",
    "JsonOption",
    "Kernel",
    "Key",
    "Lambda",
    "LayerLoss",
    "LayerTensors",
    "LearnedRouter",
    "Lease",
    "Lend",
    "Limits",
    "LiveHook",
    "LiveModel",
    "Load",
    "Logistic",
    "LoraJob",
    "LoraJobs",
    "LoraSettings",
    "LowRank",
    "Members",
    "MethodCall",
    "MixedLayer",
    "Named",
    "Near",
    "NonNegative",
    "OutputRouter",
    "Part",
    "PeftReader",
    "Pipeline",
    "PlacedFactors",
    "Positive",
    "Prompt",
    "Prune",
    "Range",
    "Rate",
    "Reader",
    "Recipe",
    "Refusal",
    "Resolve",
    "Row",
    "RowKernel",
    "RowSets",
    "RowSums",
    "RowsAndTokens",
    "Rule",
    "Running",
    "ScoredRouter",
    "Seed",
    "SeedOption",
    "Seen",
    "Share",
    "SharedCatalogue",
    "SharedPass",
    "ShownTable",
    "Site",
    "Solver",
    "StandIn",
    "Step",
    "Stored",
    "StoredLayer",
    "Sum",
    "SumOfExperts",
    "Target",
    "TargetBatch",
    "TargetLayer",
    "Term",
    "TextRouter",
    "Texts",
    "TokenGate",
    "TokenRouter",
    "TopKRecipe",
    "Trace",
    "Traced",
    "TrainingJob",
    "TrainingState",
    "TruncatedUpdate",
    "UsedLayer",
    "UsedWeights",
    "VectorSearch",
    "Weigh",
    "Weighing",
    "WeightWriter",
    "Weights",
    "Whole",
    "Workload",
    "algebra",
    "align_right",
    "as_base_layer",
    "backward",
    "balance_term",
    "base_config",
    "base_id",
    "base_layer",
    "base_loader",
    "batch",
    "best_of",
    "blank_figure",
    "block_of",
    "brought",
    "by_layer",
    "by_row",
    "by_rows",
    "cache_folder",
    "cache_of",
    "caller_randomness",
    "check_options",
    "check_size",
    "checkpoint_folder",
    "claimed",
    "combination",
    "context_length",
    "conv",
    "current_prompts",
    "current_tokenizer",
    "cut_update",
    "descend",
    "draw_linear",
    "drop_state",
    "embedder_of",
    "empty_update",
    "encode",
    "encode_pairs",
    "encode_texts",
    "end_tokens",
    "entry",
    "factorise",
    "find_places",
    "fingerprint",
    "fitting",
    "generation_call",
    "get",
    "give_back",
    "given_factors",
    "gram",
    "group_by_mixture",
    "group_rows",
    "has_expert",
    "has_two_sequences",
    "head_size",
    "in_chunks",
    "interpolation",
    "is_floating",
    "is_list",
    "is_named",
    "is_near",
    "is_number",
    "is_whole",
    "job_losses",
    "json_text",
    "known_members",
    "labelled_tasks",
    "last_logits",
    "last_positions",
    "layer_sites",
    "layer_vectors",
    "layers_with",
    "lazy",
    "least_lambda",
    "leaves",
    "linear",
    "load_model",
    "load_of",
    "load_state",
    "lock_of",
    "loopback_only",
    "lora_factors",
    "magprune",
    "make_app",
    "mean_losses",
    "mean_weights",
    "member_passes",
    "merge_elected",
    "missing_layer",
    "mixture_interference",
    "model_id",
    "module_names",
    "nearest",
    "needs_call",
    "new_factors",
    "note",
    "num_rows_of",
    "numbered_blocks",
    "only_kernel",
    "open_hub",
    "options_of",
    "output_factors",
    "own_precision",
    "pad_id",
    "pad_rows",
    "pair_shares",
    "parse_json",
    "parse_lora",
    "place_of",
    "plain_factors",
    "predict",
    "present",
    "print_json",
    "print_table",
    "printable",
    "progress_bar",
    "prompt_ids",
    "prompt_texts",
    "prompted",
    "prune_both_ends",
    "prune_random",
    "prune_smallest",
    "put_expert",
    "put_together",
    "read_asked",
    "read_body",
    "read_bytes",
    "read_card",
    "read_endings",
    "read_json",
    "read_prompt",
    "read_request",
    "read_rows",
    "read_tasks",
    "read_tensors",
    "read_yaml",
    "readme_text",
    "real_tokens",
    "record_inputs",
    "recorded_base",
    "refusal_of",
    "refused",
    "remote_errors",
    "replacing",
    "require_all",
    "require_all_named",
    "require_dtype",
    "require_everywhere",
    "require_expert_model",
    "require_finite",
    "require_known",
    "require_loopback",
    "require_model",
    "require_one_adapter",
    "require_replaceable",
    "require_same_base",
    "require_whole",
    "router_class",
    "router_names",
    "row_sha256",
    "rows_of",
    "rows_that_fit",
    "run_step",
    "running_block",
    "save_state",
    "save_tensors",
    "says_nothing",
    "seeded",
    "shares",
    "sort_by_expert",
    "sparsegen",
    "spread",
    "state_row",
    "stated_license",
    "storage_errors",
    "store_labels",
    "stored_base",
    "stored_names",
    "stored_rows",
    "sum_pruned",
    "surveys",
    "sync",
    "take_apart",
    "takes",
    "target_layer",
    "target_layers",
    "target_logits",
    "terms",
    "terms_of_one_rank",
    "text_digest",
    "text_rows",
    "token_losses",
    "too_busy",
    "top_k_of_softmax",
    "top_k_softmax",
    "tracked",
    "train_further",
    "training_rows",
    "traits",
    "traits_of",
    "uniform",
    "unknown_expert",
    "unless_gone",
    "unsynced",
    "untouched",
    "weigh_b",
    "weighted_bias",
    "whole_file",
    "wilson",
    "with_options",
    "with_positions",
    "with_seed",
    "with_task",
    "without",
    "without_cache",
    "without_credentials",
    "words",
]
