"""Lossless encodings in which a hub stores factors in fewer bits, each with functions that pack and unpack tensors."""
