"""Methods for a recipe: those that its parts allow, in the order in which they stand on the leaderboard."""
