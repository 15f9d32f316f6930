from loraweave.extensions.sources.on_model_hub import Found as Found
from loraweave.extensions.sources.on_model_hub import discover as discover
from loraweave.extensions.sources.trees import TreeReport as TreeReport
from loraweave.extensions.sources.trees import add_tree as add_tree
