from loraweave.extensions.cluster.replicas import replicated as replicated
