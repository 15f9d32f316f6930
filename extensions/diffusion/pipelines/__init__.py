"""The pipelines whose parts a Composer takes as one model."""
