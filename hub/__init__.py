"""The store of adapters: their formats, content-addressed blobs, a catalogue and search."""
