"""Engines that run an exported file."""
