"""What a client descends, one file an objective: the file's stem is its name."""
