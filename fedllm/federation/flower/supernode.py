"""`python -m fedllm.federation.flower.supernode`: Flower's SuperNode with short sleeps, as `join` starts it."""

from __future__ import annotations

from fedllm.federation.flower.internals import run_supernode

POLL = 0.05
"""Seconds from one look for messages to the next."""

if __name__ == "__main__":
    run_supernode(POLL)
