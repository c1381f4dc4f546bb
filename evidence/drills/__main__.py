"""`make drills`: every fault and a long run under random harm, on real processes (docs/results/federation.md)."""

from __future__ import annotations

import sys

from evidence.bench.federation import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["faults", "soak"])
