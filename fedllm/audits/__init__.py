"""Audits read what a party saw, and say what it gives away."""
