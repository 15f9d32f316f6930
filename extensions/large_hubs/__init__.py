"""How is a hub of many thousand adapters searched fast? By indexes on faiss, in files that several processes map.

Searches that name no index use both: `faiss_half`, whose results are exact, and from 200,000 adapters on `faiss_ivf`; from
1,000 on the index is a file. The embedder `sentence_form` finds adapters by bare inputs in searches without keys. It needs
faiss (`faiss-cpu`).
"""

from loraweave.extend import face

_MODULES = {"indexes.faiss_half": "FaissHalf", "indexes.faiss_ivf": "FaissIvf"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
