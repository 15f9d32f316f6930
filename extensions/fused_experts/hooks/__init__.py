"""The hook that runs a module of fused experts with a mixture's updates."""
