"""Faults done to real processes: `make drills`."""
