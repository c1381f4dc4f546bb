"""Evidence: what methods claim and what the code costs, measured. Beside the package, not in the wheel."""
