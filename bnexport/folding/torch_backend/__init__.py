"""Folding of PyTorch networks: torch.export graphs are read, proved and written back."""
