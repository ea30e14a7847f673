"""Proof that what was written computes what was meant."""
