"""The house as it stands: which room imports which, how large each is, and the longest chain of imports.

`MAY` is the one table of which room may import which; `tests/test_rooms.py` holds the code to it. `python -m
evidence.pages.rooms` prints the figures.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAY: Mapping[str, str] = {
    "core": "",
    "environments": "core",
    "tasks": "core",
    "data": "core environments tasks",
    "spaces": "core",
    "models": "core data spaces tasks",
    "gate": "core models",
    "local": "core data environments models spaces tasks",
    "wire": "core local",
    "privacy": "core gate local spaces wire",
    "defenses": "core data local models",
    "attacks": "core data local defenses",
    "selectors": "core local wire",
    "methods": "core data gate local models spaces tasks wire privacy",
    "engines": "core data environments local models tasks wire",
    "trackers": "core",
    "runs": "core data environments local models spaces tasks wire privacy defenses selectors methods engines trackers",
    "report": "core gate methods models tasks runs",
    "comparisons": "core data local methods models spaces tasks runs report",
    "advice": "core data methods models runs",
    "evaluation": "core data engines local models spaces tasks runs",
    "audits": "core data local models spaces tasks attacks defenses engines runs",
    "federation": "core data gate local models tasks wire privacy defenses methods engines trackers runs report",
    "dashboard": "core tasks privacy runs comparisons federation",
    "api": "runs report comparisons",
    "cli": "core data local models spaces tasks methods runs report comparisons advice audits evaluation "
           "federation dashboard api",
    "__main__": "cli",
    "fedllm": "core data runs comparisons api",
    "evidence": "core data environments gate local models spaces tasks wire privacy defenses attacks selectors methods "
                "engines trackers runs report comparisons advice audits evaluation federation dashboard api cli fedllm",
}
"""What each room may import beside itself. `api`, `__main__` and `fedllm` are the faces, `evidence` stands beside the
package."""


def room(module: str) -> str:
    """The room that a module lies in."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] or "fedllm" if first == "fedllm" else first


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package and of the evidence, by its dotted name."""
    found = {}
    for path in sorted([*ROOT.glob("fedllm/**/*.py"), *ROOT.glob("evidence/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, at any place in its file (for types alone counts too)."""
    return {name: set(_named(name, path)) for name, path in modules().items()}


def _named(name: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module:
            for a in node.names:
                full = f"{node.module}.{a.name}"
                if (hit := full if full in modules() else node.module) in modules() and hit != name:
                    yield hit


def astray() -> list[str]:
    """Imports that the table does not allow."""
    return [f"{name} imports {other}" for name, others in imports().items() for other in sorted(others)
            if room(other) not in (room(name), *MAY[room(name)].split())]


def circles() -> list[list[str]]:
    """Files that import one another, by any way."""
    graph = imports()
    reach = {name: _reached(name) for name in graph}
    rounds = {tuple(sorted(m for m in reach[name] if name in reach[m])) for name in graph if name in reach[name]}
    return [list(r) for r in sorted(rounds)]


def _reached(start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(imports()[start])
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += imports()[name]
    return seen


def longest() -> list[str]:
    """The longest chain of imports, from the top down; needs a graph without circles."""

    @functools.cache
    def below(name: str) -> tuple[str, ...]:
        return (name, *max((below(other) for other in imports()[name]), key=len, default=()))

    return list(max((below(name) for name in modules() if room(name) != "evidence"), key=len))


def sizes() -> dict[str, tuple[int, int]]:
    """Room -> (files, lines)."""
    out: dict[str, tuple[int, int]] = {}
    for name, path in modules().items():
        files, lines = out.get(room(name), (0, 0))
        out[room(name)] = files + 1, lines + path.read_text().count("\n")
    return out


def page() -> str:
    """All of it, as Markdown."""
    rows = [f"| {name} | {files} | {lines:,} |" for name, (files, lines) in sorted(sizes().items())]
    chain = longest()
    return "\n".join(["| room | files | lines |", "|---|---|---|", *rows, "",
                      f"Longest chain of imports, {len(chain)} files: {' > '.join(chain)}", ""])


if __name__ == "__main__":
    print(page())  # noqa: T201
