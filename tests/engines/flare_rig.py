"""Rows of three made-up sites, for tests of engines."""

from fedllm.federation.nvflare.loopback import ROWS, SITES, write_rows

__all__ = ["SITES", "write_data"]


def write_data(folder):
    """One file a site, and a test file of the coordinator's."""
    for k, (site, n) in enumerate(zip(SITES, ROWS, strict=True)):
        write_rows(folder / "data" / f"{site}.jsonl", k, n)
    write_rows(folder / "test.jsonl", 9, 6)
