from loraweave.extensions.retrieval_keys.training import train_encoder as train_encoder
