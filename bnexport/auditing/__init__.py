"""Which of the tools that also fold BatchNorm gives a wrong answer on a given network."""
