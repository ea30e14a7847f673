"""Measurements: what folding removes and costs on the networks of torchvision and timm, and which form of an affine is fast."""
