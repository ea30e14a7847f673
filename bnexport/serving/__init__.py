"""Prediction with a bundle: a server, bulk prediction, and single pictures."""
