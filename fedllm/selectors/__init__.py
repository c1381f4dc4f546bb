"""Who is asked in a round: each selector is one file, found by its name."""
