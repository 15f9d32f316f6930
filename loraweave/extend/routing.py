"""Routers of tokens and rows, and searches for weights (`routers`): base classes, scores, and the running call."""

from loraweave.registry import face

_MODULES = {
    "routers.combined": "ByRow needs_call under",
    "routers.invoked": "last_place",
    "routers.searches._solver": "ClosedForm Solver",
    "routers.searches.gradient": "Gradient",
    "routers.tokens._caches": "BesideCache RowsAndTokens",
    "routers.tokens._call": (
        "asked_of_head block_of cache_of current_prompts current_tokenizer has_two_sequences prompted real_tokens "
        "running_block"
    ),
    "routers.tokens._forms": "InputGates ScoredRouter",
    "routers.tokens._learned": "LearnedRouter Step TrainingReport",
    "routers.tokens._members": "LayerTensors Members RoutedLayer find_names",
    "routers.tokens._router": "TokenRouter",
    "routers.tokens._saved": "router_class router_names",
    "routers.tokens._scores": "best_of factors_by_expert top_k_softmax top_p_of_softmax without",
    "routers.tokens._text": "TextRouter labelled_tasks read_prompts",
    "routers.tokens.logistic": "Logistic",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
