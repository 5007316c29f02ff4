"""Backends that turn prompts into sampled completions and take new weights in place."""
