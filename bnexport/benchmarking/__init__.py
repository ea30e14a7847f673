"""Measure the runtimes of bundles side by side: the fastest among those whose answers are right."""
