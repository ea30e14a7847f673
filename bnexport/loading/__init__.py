"""Loading of networks and their weights: sources, checkpoints, weight files, model zoos, user code."""
