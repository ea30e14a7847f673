"""A trained network on a labelled data set: what it gets right, and whether its moving statistics fit its weights."""
