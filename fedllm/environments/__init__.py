"""Environments: worlds that answer an action with an observation and a reward, for clients that learn to act."""
