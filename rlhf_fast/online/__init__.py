"""The online workflow: generate, score, select, update, evaluate, and the report of a run."""
