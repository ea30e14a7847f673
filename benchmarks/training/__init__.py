"""Speed, accuracy and statistics of trainings."""
