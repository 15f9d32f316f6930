"""How is a hub of many thousand adapters searched fast? By indexes on faiss, in files that several processes map.

Searches that name no index use both: `faiss_half`, whose results are exact, and from 200,000 adapters on `faiss_ivf`; from
1,000 on the index is a file. The embedder `sentence_form` finds adapters by bare inputs in searches without keys. It needs
faiss (`faiss-cpu`).
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.large_hubs.indexes.faiss_half import FaissHalf
    from loraweave.extensions.large_hubs.indexes.faiss_ivf import FaissIvf
else:
    _CLASSES = {"half": "FaissHalf", "ivf": "FaissIvf"}
    __getattr__ = lazy(__name__, {f"{__name__}.indexes.faiss_{kind}": name for kind, name in _CLASSES.items()})

__all__ = ["FaissHalf", "FaissIvf"]
