"""Measurements of the fold: the form of an affine, and the cost next to torch.export."""
