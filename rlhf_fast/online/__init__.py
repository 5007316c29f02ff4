"""The online workflow: SFT, reward model, iterations of generate / score / select / update."""
