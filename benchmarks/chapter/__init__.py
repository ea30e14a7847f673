"""The trainings behind docs/results/chapter.md."""
