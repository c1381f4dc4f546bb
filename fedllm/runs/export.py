"""Hand a run's model to others: the PEFT adapter as it is, or merged into its base with plain `peft`."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedllm.core.errors import ModelError, RunError
from fedllm.models.cache import NOT_TAKEN, why
from fedllm.models.checks import loaded
from fedllm.models.gguf import is_gguf
from fedllm.models.load import DTYPES, load_tokenizer, place_of, resolve
from fedllm.models.merge import merge_adapter
from fedllm.models.peft_io import SPACE, sound
from fedllm.models.quantized import options
from fedllm.runs.build import build
from fedllm.runs.folder import RunFolder
from fedllm.runs.products import BASE, form_of, write_tree
from fedllm.runs.received import received
from fedllm.runs.recipe import load_recipe, read_recipe
from fedllm.runs.result import Result
from fedllm.runs.sections import ModelSpec
from fedllm.runs.store import sync_files, sync_folder
from fedllm.spaces.registry import make_space
from fedllm.spaces.space import CAUSAL

CARD = "model_card.md"
PAPERS = {CARD: "README.md", "privacy_statement.md": "privacy_statement.md"}
"""What goes along with a model, and under which name model hubs look for it."""

PART = ".part-"
"""Begins the name of a folder in which an export is made, beside where it will lie."""


def export(path: str | Path, out: str | Path | None = None, *, merge: bool = False, gguf: str | None = None,
           round: int | None = None, trust_remote_code: bool = False) -> Path:
    """Copy the adapter to `out`, or with `merge` write a whole model there that needs neither us nor `peft`.

    `gguf` (the type of its matrices: f32, f16, q8_0) writes that model as one file for llama.cpp, and gives its path.
    `round`: the model after so many rounds, of a run that kept its checkpoints. A base model that brings code of its
    own is loaded only if that is trusted. Raises RunError when the run serves no model or `out` exists, ModelError for
    adapters that cannot be merged and for models that cannot be written as GGUF.
    """
    if gguf is not None:
        return _as_gguf(path, out, gguf, round, trust_remote_code)
    if round is not None:
        return _export_round(Path(path), round, Path(out) if out else None, merge, trust_remote_code)
    result = Result.load(path)
    served = result.adapter_path
    if served is None:
        raise RunError(f"{path} holds no served model (adapter/, model/ or trainables/): method '{result.method}' "
                       "serves no single one, and what clients have lies in "
                       f"{result.folder / 'clients'}; or it was deleted")
    goal = Path(out) if out else result.folder / ("merged" if merge else "export")
    _is_free(goal)
    if served.name == "adapter":
        sound(served)  # what is damaged is not handed out
    if merge and served.name == "trainables":
        made = json.loads((served / SPACE).read_text())
        stays = make_space(made["space"], **made["knobs"]).stays  # streams have theirs from what they hold
        raise ModelError(f"space '{made['space']}' cannot be merged into the model's weights: {stays}; export what it "
                         "trained as it is with --peft")
    with _filled(goal) as part:
        if merge and served.name == "adapter":
            _merge(served, part, read_recipe(result.folder / "recipe.yaml").model, trust_remote_code)
        else:
            if (served / BASE).exists():
                raise RunError(f"{served}: the method also changed the base weights ({BASE}), which an adapter alone "
                               "cannot hold; export with --merge")
            shutil.copytree(served, part, dirs_exist_ok=True)
        for name, as_name in PAPERS.items():
            if (paper := result.folder / name).is_file():
                text = paper.read_text(encoding="utf-8")
                (part / as_name).write_text(as_exported(text, merge) if name == CARD else text, encoding="utf-8")
    return goal


@contextlib.contextmanager
def _filled(goal: Path) -> Iterator[Path]:
    """A folder whose files become those of `goal` when the block ends well; else nothing is left, and a disk that does
    not take them is a RunError. A folder that is there (a disk of its own, it may be) is filled, not replaced."""
    try:
        there = goal.is_dir()
        at = goal if there else goal.absolute().parent
        at.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PART, dir=at) as room:
            part = Path(room) / "whole"
            part.mkdir()
            yield part
            sync_files(part)
            if not there:
                part.replace(goal)
            for path in sorted(part.iterdir(), key=_last) if there else ():
                path.replace(goal / path.name)
            sync_folder(at)
    except NOT_TAKEN as error:
        named = goal.parent.parent if goal.parent.name.startswith(PART) else goal  # a part is gone by now
        raise RunError(f"{named} cannot be written: {why(error)}; make room, or give another folder with --out"
                       ) from None


def _last(path: Path) -> bool:
    """What a folder is known by comes last."""
    return path.name.endswith("config.json")


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


def _is_free(goal: Path) -> None:
    """RunError for what is no folder, or one that holds something."""
    try:
        if not goal.is_symlink() and not goal.exists():
            return
        full = any(goal.iterdir())
    except OSError as error:
        raise RunError(f"{goal} cannot be written into ({error.strerror or error}); give another folder with --out"
                       ) from None
    if full:
        raise RunError(f"{goal} exists and is not empty; give another folder with --out")


def _as_gguf(path: str | Path, out: str | Path | None, kind: str, round: int | None, trust: bool) -> Path:
    """The merged model in a folder of its own, as one file."""
    from fedllm.models.gguf_write import written

    result = Result.load(path)
    if read_recipe(result.folder / "recipe.yaml").data.task not in CAUSAL:
        raise ModelError(f"{path}: only models that continue texts are written as GGUF")
    goal = Path(out) if out else result.folder / "gguf"
    _is_free(goal)
    with _filled(goal) as part:
        merged = export(path, part.parent / "merged", merge=True, round=round, trust_remote_code=trust)
        net = loaded(AutoModelForCausalLM, str(merged), str(merged), False)
        made = written(part, net.eval(), load_tokenizer(str(merged)), kind, result.folder.name)
        for name in PAPERS.values():
            if (merged / name).is_file():
                shutil.copyfile(merged / name, part / name)
    return goal / made.name


def _export_round(path: Path, round: int, out: Path | None, merge: bool, trust: bool) -> Path:
    """The model of one of a run's checkpoints."""
    folder = RunFolder.open(path)
    if round not in (kept := folder.rounds()):
        raise RunError(f"--round {round}: {path} keeps checkpoints after {', '.join(map(str, kept)) or 'no'} rounds; "
                       "run a recipe with record.keep_rounds = true to keep them all")
    goal = out or folder.path / f"{'merged' if merge else 'export'}-{round}"
    _is_free(goal)
    parts, found = build(received(folder.path, trust)), folder.load(round)
    assert found
    theta, base = parts.method.served(found[1]["state"]) if parts.method.serves else ({}, None)
    if not theta:
        raise RunError(f"{path}: method '{parts.recipe.method.name}' serves no single model")
    if base and not merge:
        raise RunError(f"{path}: the method also changed the base weights, which an adapter alone cannot hold; export "
                       "with --merge")
    if form_of(parts.world.model, theta) != "adapter" and merge:
        raise ModelError(f"space '{parts.world.model.space.stem}' has no adapter to merge; export it with --peft")
    with _filled(goal) as part:
        made = part.parent / "made" if merge else part
        made.mkdir(exist_ok=True)
        write_tree(made, parts.world.model, theta, base)
        if merge:
            _merge(made, part, parts.recipe.model, trust)
    return goal


def _merge(adapter: Path, goal: Path, model: ModelSpec, trust: bool) -> None:
    said = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = resolve(model.name) if is_gguf(model.name) else said  # what lies in the cache may have been deleted
    delta = load_file(adapter / BASE) if (adapter / BASE).exists() else {}
    how = options(model.quantize, DTYPES[model.dtype], place_of("auto"))
    merge_adapter(adapter, goal, delta, load_tokenizer(base, trust), trust, base, DTYPES[model.dtype], **how)


def export_for_clients(recipe: Any, out: str | Path) -> Path:
    """Write the model that clients of this recipe's method hold (`model.at_clients`): for fedbiot, the emulator.

    RunError when `out` exists. Blocks that the owner keeps are not in it.
    """
    parts, goal = build(load_recipe(recipe, {})), Path(out)
    _is_free(goal)
    held: Any = parts.method.at_client(parts.world.model)
    with _filled(goal) as part:
        held.net.save_pretrained(str(part))
        held.tokenizer.save_pretrained(str(part))
    return goal
