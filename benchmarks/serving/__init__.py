"""bnexport serve next to other servers of the same model."""
