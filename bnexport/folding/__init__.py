"""Folding of BatchNorm into the neighbouring linear layers, every BatchNorm accounted for."""
