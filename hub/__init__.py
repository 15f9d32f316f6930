"""Where adapters live: formats in, content-addressed blobs, a catalogue, search."""
