"""Known base models, one file for each, which says where the GGUF file comes from."""
