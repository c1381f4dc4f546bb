"""Speed and memory beside what others run: `make bench`, `fedllm bench NAME...` `python -m evidence.bench`."""

from __future__ import annotations


def main() -> None:
    """Run the benches named on the command line and show their rows."""
    from evidence.bench.__main__ import main as go

    go()
