"""The engine whose clients are far away: what NVFlare and Flower share."""
