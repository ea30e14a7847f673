"""Accuracy of a trained network on a labelled data set, and checks of its moving statistics."""
