"""Generation backends: each turns prompts into sampled completions and takes new weights in place."""
