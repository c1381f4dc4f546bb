"""What a finished run's model is worth: on rows of one's own, on lm-eval's tasks, and in the eyes of a judge."""
