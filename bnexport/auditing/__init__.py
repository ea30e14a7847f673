"""Audit of tools that fold BatchNorm: which of them changes the outputs of a given network."""
