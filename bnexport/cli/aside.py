"""Keeping what other people's code prints out of results."""

from __future__ import annotations

import contextlib
import sys


def prints_aside() -> contextlib.AbstractContextManager[object]:
    """What a user's network prints while it runs goes to standard error: it is no result of ours, and would break --json."""
    return contextlib.redirect_stdout(sys.stderr)
