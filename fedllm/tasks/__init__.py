"""Tasks: what a row is, how it becomes tensors, how it is lost on and how it is scored; the file stem is the id."""
