from loraweave.extensions.large_hubs.indexes.faiss_half import FaissHalf as FaissHalf
from loraweave.extensions.large_hubs.indexes.faiss_ivf import FaissIvf as FaissIvf
