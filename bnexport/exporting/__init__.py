"""Writing a folded model to files."""
