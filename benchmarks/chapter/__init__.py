"""The trainings behind docs/chapter.md."""
