"""A server of compositions: an OpenAI-compatible HTTP interface over one model and a hub of adapters."""
