"""Tables of the recipe families at a size for one core and minutes: `python -m evidence.pages.families [NAME ...]`.

Each is `fedllm compare` with the options below; its page goes to docs/results/families, with the command on top. The
files of `python -m evidence.bench_rows` must lie in the shared data (`FEDLLM_DATA`), and those of `python -m
evidence.picture_rows vision_rows` and `python -m evidence.knowledge_rows knowledge_rows` in this folder. The page of
`knowledge` has columns of its own, and takes new methods by itself (`evidence/pages/knowledge.py`).
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

import fedllm
from evidence.pages import knowledge
from fedllm.runs.complaints import parse_override

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "results" / "families"
MINILM = ("data.test_limit=100", "data.limit=600", "local.max_length=24", "local.batch_size=8")
SMALL: Mapping[str, tuple[int, int, tuple[str, ...]]] = {
    "fedit_shepherd": (4, 1, ("rounds=4",)),
    "fedllm_bench": (1, 1, ("rounds=3", "local.max_length=48", "data.test_limit=30")),
    "fs_llm": (1, 1, ("rounds=3", "data.office.test_rows=30", "local.steps=5")),
    "openfedllm": (1, 1, ("rounds=3", "local.steps=4", "clients.per_round=4")),
    "fedpeft": (2, 1, MINILM),
    "fedpetuning": (2, 1, MINILM),
    "fedtune_bench": (2, 1, MINILM),
    "knowledge": (3, 1, ()),
    "vision_language": (10, 1, ()),
    "profit": (3, 1, ("data.office.test_rows=30", "local.steps=5")),
    "architectures": (3, 1, ()),
    "init_study": (3, 1, ()),
    "ftl_fm": (1, 1, ()),
}
"""Name -> seeds, tuning seeds, and keys of the recipe that differ from the family's own."""


def command(name: str, many: int | None = None) -> str:
    """The one line that makes the table, on so many seeds (None: its own number)."""
    seeds, tuning, changes = SMALL[name]
    if name == "knowledge":
        return f"python -m evidence.pages.families {name} --seeds {many or seeds}"
    said = [f"--seeds {many or seeds}", f"--tuning-seeds {tuning}", *(f"--set {shlex.quote(c)}" for c in changes)]
    return f"fedllm compare recipes/families/{name}.yaml {' '.join(said)}"


def page(name: str, folder: Path, many: int | None = None) -> Path:
    """The table of a comparison that lies in `folder`, with its command on top."""
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    made = (PAGES.parent if name == "vision_language" else PAGES) / f"{name}.md"
    made.write_text(f"<!-- {command(name, many)} -->\n{text}", encoding="utf-8")
    return made


def main() -> None:
    """Run the families named (none: all), and write their pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", help=", ".join(SMALL))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "families", help="where the cells lie")
    parser.add_argument("--seeds", type=int, help="in the place of the table's own; more may follow")
    given = parser.parse_args()
    for name in given.name or SMALL:
        if name not in SMALL:
            parser.error(f"there is no family '{name}'; there are {', '.join(SMALL)}")
        seeds, tuning, changes = SMALL[name]
        seeds = given.seeds or seeds
        file = ROOT / "recipes" / "families" / f"{name}.yaml"
        if name == "knowledge":
            told = knowledge.page(*knowledge.run(file, given.out / name, seeds), command(name, seeds))
            (PAGES / f"{name}.md").write_text(told, encoding="utf-8")
            continue
        fedllm.compare(file, out=given.out / name, seeds=seeds, tuning_seeds=tuning,
                       overrides=dict(map(parse_override, changes)))
        page(name, given.out / name, seeds)


if __name__ == "__main__":
    main()
