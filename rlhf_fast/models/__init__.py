"""Hugging Face models as the rest sees them: a backbone, a head, batches that share prompts."""
