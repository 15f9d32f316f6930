"""The pipelines that a Composer takes, as one model with the pipeline's parts."""
