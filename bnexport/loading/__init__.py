"""From what a user names to a network with its weights: sources, checkpoints, weight files, model zoos, user code."""
