"""Trackers that a run's figures are told to, one file each; the file's stem is what a recipe's `track` calls it."""
