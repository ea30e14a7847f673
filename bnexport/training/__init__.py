"""Training of a classifier, with checkpoints that survive a kill at any moment."""
