"""Scoring (`objectives`): batches of rows, answers of a model, and their losses."""

from loraweave.registry import face

_MODULES = {
    "composer.compose.loss": "ExampleLoss",
    "composer.compose.objectives._row_sums": "RowSums",
    "composer.compose.objectives.cross_entropy": "CrossEntropy",
    "composer.model.batches": (
        "IGNORED NO_TOKENIZER EncodedRow TargetBatch batch context_length encode end_tokens following in_chunks "
        "last_logits mean_losses pad_apart pad_id pad_rows padded_inputs takes target_logits text_rows token_losses "
        "untouched with_positions"
    ),
    "composer.model.generate": "Asked encode_texts generation_call read_prompt",
    "composer.model.scoring": "encode_pairs predict",
    "retrieval.fusion": "wilson",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
