"""The kinds of layers that can be composed: one file each, with the functions of `_kind.LayerKind`."""
