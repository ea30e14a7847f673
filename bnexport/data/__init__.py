"""Data sets, images, and the one preprocessing for training and serving."""
