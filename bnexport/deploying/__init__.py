"""Deployment files of a bundle for Triton, KServe and Docker, each checked before it is written."""
