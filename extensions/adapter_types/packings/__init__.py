"""Encodings in which a hub stores factors in fewer bits without loss; an entry packs tensors and unpacks them."""
