"""Skills as files of text: how alike two libraries are, what a skill makes of a task, and one merge of many."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedllm.models import retrieval as rt

Skills = Mapping[str, str]
"""Path -> text."""
PATH = re.compile(r"skills/[a-z0-9_]{1,60}\.md")
"""The only places that a patch may write to."""


def merged(mine: Mapping[str, Skills], rewards: Mapping[str, Mapping[str, float]], works: float, each: bool
           ) -> dict[str, dict[str, str]]:
    """Each client's next library, a function of what all have and of what it was worth to each.

    Of a path's working variants (reward from `works`) the best rewarded is everybody's, of equals that of the first id;
    with `each` a client keeps its own, and of what it lacks takes that of whoever is most like it.
    """
    def worth(client: str, path: str) -> float:
        return rewards.get(client, {}).get(path, 0.0)

    def best(c: str, p: str, have: list[str]) -> str:
        if each and c in have:  # covered
            return c  # else a gap, or broken
        return min(have, key=lambda k: (-alike(mine[c], mine[k]) if each else 0.0, -worth(k, p), k))

    paths = sorted({p for library in mine.values() for p in library})
    able = {p: have for p in paths if (have := sorted(k for k in mine if p in mine[k] and worth(k, p) >= works))}
    return {c: {p: mine[best(c, p, have)][p] for p, have in able.items()} for c in sorted(mine)}


def alike(one: Skills, other: Skills) -> float:
    """Share of the skills that both have and have alike."""
    both = one.keys() & other.keys()
    return sum(one[p] == other[p] for p in both) / len(both) if both else 0.0


def solve(task: str, form: str) -> str:
    """The form with the task's values in the place of its placeholders, one after the other; it is filled in and never
    run or obeyed."""
    values = re.findall(r"\w*\d[\w.,:-]*", task)
    for v in values:
        form = form.replace("<number>", v, 1)
    return form


def used(task: str, library: Skills) -> str:
    """The call by the first skill whose word the task has; nothing where there is none."""
    form = next((library[p] for w in rt.words(task) if (p := f"skills/{w}.md") in library), "")
    return solve(task, form) if form else ""
