"""Networks, their BatchNorm layers, and the ways to load them."""
