"""Other servers, as people write them: programs for separate environments, started by path, without bnexport."""
