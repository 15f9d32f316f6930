from loraweave.extensions.reranking.ranking import LossSlopes as LossSlopes
from loraweave.extensions.reranking.ranking import first_order as first_order
from loraweave.extensions.reranking.ranking import rerank as rerank
