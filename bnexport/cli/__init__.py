"""The command line: words to one library call to an exit code."""
