"""The verifier tests itself: faults put into copies of a bundle, each of which a verification has to catch."""
