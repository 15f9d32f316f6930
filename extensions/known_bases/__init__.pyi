from loraweave.extensions.known_bases.fetching import gguf_file as gguf_file
