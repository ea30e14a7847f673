"""A bundle on its way to other people's servers: files for Triton, KServe and Docker, each checked before it is written."""
