"""Pages of docs/results, written from measured rows alone."""
