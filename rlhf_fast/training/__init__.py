"""Training: language models as decoder and head, prompt-sharing batches, optimiser."""
