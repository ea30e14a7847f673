"""A bundle put to work."""
