"""One table of every method that trains, on the same worlds with the same work: `python -m evidence.leaderboard`."""
