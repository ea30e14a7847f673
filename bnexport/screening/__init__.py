"""Files of strangers, looked at before any engine opens them: what is refused, and where the limits are."""

from bnexport.screening.archives import screen_archive

__all__ = ["screen_archive"]
