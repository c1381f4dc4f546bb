"""Hand a run's model to others: the PEFT adapter as it is, or merged into its base with plain `peft`."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedllm.core.errors import ModelError, RunError
from fedllm.models.load import load_tokenizer
from fedllm.models.merge import merge_adapter
from fedllm.models.peft_io import SPACE
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.products import BASE, form_of, write_tree
from fedllm.runs.recipe import load_recipe, received
from fedllm.runs.result import Result
from fedllm.spaces.registry import make_space

CARD = "model_card.md"
PAPERS = {CARD: "README.md", "privacy_statement.md": "privacy_statement.md"}
"""What goes along with a model, and under which name model hubs look for it."""


def export(path: str | Path, out: str | Path | None = None, *, merge: bool = False, round: int | None = None) -> Path:
    """Copy the adapter to `out`, or with `merge` write a whole model there that needs neither us nor `peft`.

    `round`: the model after so many rounds, of a run that kept its checkpoints. Raises RunError when the run serves no
    model or `out` exists, ModelError for adapters that cannot be merged.
    """
    if round is not None:
        return _export_round(Path(path), round, Path(out) if out else None, merge)
    result = Result.load(path)
    served = result.adapter_path
    if served is None:
        raise RunError(f"{path}: method '{result.method}' serves no single model; what clients have lies in "
                       f"{result.folder / 'clients'}")
    goal = Path(out) if out else result.folder / ("merged" if merge else "export")
    if goal.exists() and any(goal.iterdir()):
        raise RunError(f"{goal} exists and is not empty; give another folder with --out")
    try:
        if merge and served.name == "trainables":
            made = json.loads((served / SPACE).read_text())
            why = make_space(made["space"], **made["knobs"]).stays  # streams have theirs from what they hold
            raise ModelError(f"space '{made['space']}' cannot be merged into the model's weights: {why}; export what "
                             "it trained as it is with --peft")
        if merge and served.name == "adapter":
            _merge(served, goal, load_recipe(result.folder / "recipe.yaml").model.trust_remote_code)
        else:
            if (served / BASE).exists():
                raise RunError(f"{served}: the method also changed the base weights ({BASE}), which an adapter alone "
                               "cannot hold; export with --merge")
            shutil.copytree(served, goal, dirs_exist_ok=True)
        for name, as_name in PAPERS.items():
            if (paper := result.folder / name).is_file():
                text = paper.read_text(encoding="utf-8")
                (goal / as_name).write_text(as_exported(text, merge) if name == CARD else text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{goal} cannot be written: {error}") from None
    return goal


USE = """```python
from {library} import {kind}
model = {kind}.from_pretrained("PATH/OF/THIS/FOLDER")
```"""


def as_exported(card: str, merged: bool) -> str:
    """The run's card as that of the exported folder: which library loads it, and how."""
    library, kind = ("transformers", "AutoModelForCausalLM") if merged else ("peft", "AutoPeftModelForCausalLM")
    if merged:
        card = card.replace("\nlibrary_name: peft\n", "\nlibrary_name: transformers\n", 1)
    head, mark, rest = card.partition("```python\nfrom peft import AutoPeftModelForCausalLM\n")
    _, end, rest = rest.partition("\n## Results\n")
    return f"{head}{USE.format(library=library, kind=kind)}\n{end}{rest}" if mark and end else card


def _export_round(path: Path, round: int, out: Path | None, merge: bool) -> Path:
    """The model of one of a run's checkpoints."""
    folder = RunFolder.open(path)
    if round not in (kept := folder.rounds()):
        raise RunError(f"--round {round}: {path} keeps checkpoints after {', '.join(map(str, kept)) or 'no'} rounds; "
                       "run a recipe with record.keep_rounds = true to keep them all")
    goal = out or folder.path / f"{'merged' if merge else 'export'}-{round}"
    if goal.exists() and any(goal.iterdir()):
        raise RunError(f"{goal} exists and is not empty; give another folder with --out")
    parts, found = build(received(folder.path)), folder.load(round)
    assert found
    theta, base = parts.method.served(found[1]["state"]) if parts.method.serves else ({}, None)
    if not theta:
        raise RunError(f"{path}: method '{parts.recipe.method.name}' serves no single model")
    if base and not merge:
        raise RunError(f"{path}: the method also changed the base weights, which an adapter alone cannot hold; export "
                       "with --merge")
    if form_of(parts.world.model, theta) != "adapter" and merge:
        raise ModelError(f"space '{parts.world.model.space.stem}' has no adapter to merge; export it with --peft")
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "made"
        made.mkdir()
        write_tree(made, parts.world.model, theta, base)
        if merge:
            _merge(made, goal, parts.recipe.model.trust_remote_code)
        else:
            shutil.copytree(made, goal, dirs_exist_ok=True)
    return goal


def _merge(adapter: Path, goal: Path, trust: bool) -> None:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    delta = load_file(adapter / BASE) if (adapter / BASE).exists() else {}
    merge_adapter(adapter, goal, delta, load_tokenizer(base, trust), trust)


def export_for_clients(recipe: Any, out: str | Path) -> Path:
    """Write the model that clients of this recipe's method hold (`model.at_clients`): for fedbiot, the emulator.

    RunError when `out` exists. Blocks that the owner keeps are not in it.
    """
    parts, goal = build(load_recipe(recipe, {})), Path(out)
    if goal.exists() and any(goal.iterdir()):
        raise RunError(f"{goal} exists and is not empty; give another folder")
    held: Any = parts.method.at_client(parts.world.model)
    held.net.save_pretrained(str(goal))
    held.tokenizer.save_pretrained(str(goal))
    return goal
