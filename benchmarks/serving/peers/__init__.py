"""Other servers, as people write them: programs for environments of their own, started by path, without bnexport."""
