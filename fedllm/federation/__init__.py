"""Real federations: what a site decides, what the coordinator does; the transports lie in rooms of their own."""
