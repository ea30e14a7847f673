"""Validation of untrusted files, before any engine opens them."""

from bnexport.validation.archives import validate_archive

__all__ = ["validate_archive"]
