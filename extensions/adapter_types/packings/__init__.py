"""Forms in which a hub stores factors in fewer bits, each bit for bit; an entry packs tensors and unpacks them."""
