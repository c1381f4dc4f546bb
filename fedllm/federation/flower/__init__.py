"""A federation over Flower: keys, SuperLink, SuperNodes, and the line to far sites."""
