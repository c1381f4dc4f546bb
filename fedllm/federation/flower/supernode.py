"""`python -m fedllm.federation.flower.supernode`: Flower's SuperNode with short sleeps, as `join` starts it."""

from __future__ import annotations

import importlib
import sys

from fedllm.federation.flower.wire import hasten, hasten_pulls

POLL = 0.05
"""Seconds from one look for messages to the next."""


def main() -> None:
    """Run the SuperNode with the command line's options."""
    from flwr.supernode.cli import flower_supernode

    hasten(importlib.import_module("flwr.supernode.start_client_internal"), POLL)
    hasten_pulls()
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
