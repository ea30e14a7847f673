"""The GPU lane: every GPU runtime in every setting, on a machine with a GPU."""
