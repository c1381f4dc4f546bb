"""Layers that make chosen clients malicious: what they send, what they train on, or whether they train at all."""
