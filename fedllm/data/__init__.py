"""Data of a federation: sources, templates, partitioners and synthetic federations."""
