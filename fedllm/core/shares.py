"""What a site may answer a query with, by word. Imports nothing: `join` reads settings for as long as a site lives."""

SHARES = ("snippets", "ids", "scores", "counts")
"""Ids, scores and the beginnings of texts; no text; scores of documents by number; how many documents are how close
to the query, with the noise of differential privacy, and nothing else."""
