"""A recipe of stages: runs one after another in one folder, each beginning with what an earlier one ended with."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedllm.core.errors import CompositionError, FedLLMError, RecipeError, RunError
from fedllm.methods.registry import make_method
from fedllm.privacy.accountant import composed
from fedllm.runs.acting import acts
from fedllm.runs.build import FAR, build, make_recipe_space
from fedllm.runs.complaints import edit
from fedllm.runs.export import export
from fedllm.runs.fits import overrides
from fedllm.runs.folder import STAGES, RunFolder
from fedllm.runs.handed import check_judges, judged
from fedllm.runs.products import BASE
from fedllm.runs.progress import Quiet
from fedllm.runs.received import received, trusted
from fedllm.runs.recipe import Recipe, armed, load_recipe, read_recipe
from fedllm.runs.resolved import versions
from fedllm.runs.result import Result, finished
from fedllm.runs.rows import look
from fedllm.runs.sections import Stage
from fedllm.runs.standing import Publish
from fedllm.runs.started import begin as begin_run
from fedllm.runs.started import go_on as go_on_run
from fedllm.runs.started import say_name

FILE = "stages.json"
WHOLE = ("name", "stages", "plugins", "track", "versions")
"""Keys that are the whole recipe's."""
HEADLESS = ("generation", "preference", "masked_words", "image_text")
"""Tasks whose whole network is in a saved model; of the others a head lies beside it, with which nothing begins."""


def begin(recipe: str | Path | Mapping[str, Any] | Recipe, root: str | Path, overrides: Mapping[str, Any],
          publish: Publish, shown: Quiet | None = None) -> Result:
    """A new run, or, of a recipe of stages, all of them: the result is the last one's."""
    loaded = load_recipe(recipe, overrides)
    if not loaded.stages:
        return begin_run(loaded, root, {}, publish, shown)
    check(loaded)
    folder = RunFolder.fresh(Path(root), loaded.name, {**loaded.model_dump(), "versions": versions()})
    say_name(folder, Path(root), loaded.name)
    return _through(folder, loaded, publish, shown)


def go_on(path: str | Path, publish: Publish, *, plugins: Sequence[str | Path] = (), trust_remote_code: bool = False,
          overrides: Mapping[str, Any] | None = None, shown: Quiet | None = None) -> Result:
    """A run that was stopped, or stages of which one was: those that are done stay as they are."""
    how: dict[str, Any] = {"plugins": plugins, "trust_remote_code": trust_remote_code}
    if not is_staged(Path(path)):
        return go_on_run(path, publish, overrides=overrides, shown=shown, **how)
    if overrides:
        raise RecipeError(f"{next(iter(overrides))}: {path} is a run of stages, which keeps its recipe; run the longer "
                          "recipe anew")
    folder = RunFolder(Path(path))
    recipe = received(folder.path, **how)
    for stage in recipe.stages or ():
        trusted(stage_of(recipe, stage), folder.path, **how)
    return _through(folder, recipe, publish, shown, **how)


def is_staged(path: Path) -> bool:
    """Whether this is the folder of a recipe of stages."""
    try:
        raw = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(raw, Mapping) and bool(raw.get("stages"))


def _through(folder: RunFolder, recipe: Recipe, publish: Publish, shown: Quiet | None, **how: Any) -> Result:
    """Every stage that is not done yet, in order."""
    done: dict[str, Result] = {}
    with folder.held():
        for stage in recipe.stages or ():
            room = folder.path / STAGES / stage.name
            if (room / "result.json").is_file():
                done[stage.name] = finished(room)
            elif (room / "recipe.yaml").is_file():
                done[stage.name] = go_on_run(room, publish, shown=shown, **how)
            else:
                shutil.rmtree(room, ignore_errors=True)  # it was being made when the run was stopped
                origin = origin_of(recipe, stage)
                begun = stage_of(recipe, stage) if origin is None else started(recipe, stage, done[origin].folder)
                if stage.judges:
                    room_of = done[stage.judges].folder
                    begun = load_recipe(judged(begun, read_recipe(room_of / "recipe.yaml"), stage, room_of))
                done[stage.name] = begin_run(begun, room.parent, {}, publish, shown)
        folder.write_json(FILE, summary(done))
    return done[(recipe.stages or ())[-1].name]


def summary(done: Mapping[str, Result]) -> dict[str, Any]:
    """What all stages came to: each one's figures, one digest over theirs, and the privacy that they spent together."""
    text = "".join(f"{name} {r.state_digest}\n" for name, r in done.items())
    return {"stages": [{"name": name, "folder": f"{STAGES}/{name}", "method": r.method, "rounds": r.rounds,
                        "state_digest": r.state_digest, "bytes": r.bytes, "privacy": r.privacy}
                       for name, r in done.items()],
            "state_digest": hashlib.sha256(text.encode()).hexdigest(),
            "privacy": composed({name: r.privacy for name, r in done.items() if r.rounds})}


def stage_of(recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe of one stage, as if it began with the recipe's own model."""
    raw = recipe.model_dump(exclude={"stages"})
    for key, value in stage.changes.items():
        if key in WHOLE:
            raise RecipeError(f"stages.{stage.name}.{key}: this is the whole recipe's and no stage's; give it at the "
                              "top")
        edit(raw, key, value)
    try:
        return armed(read_recipe({**raw, "name": stage.name}))
    except RecipeError as error:
        raise RecipeError("\n".join(f"stages.{stage.name}.{line}" for line in str(error).splitlines())) from None


def origin_of(recipe: Recipe, stage: Stage) -> str | None:
    """The stage that this one begins with; None: the recipe's own model."""
    names = [s.name for s in recipe.stages or ()]
    before = names[: names.index(stage.name)]
    if stage.judges in before and not stage.start:  # a policy begins where its judges began
        return origin_of(recipe, (recipe.stages or ())[names.index(stage.judges)])
    if stage.start == "base" or (not before and not stage.start):
        return None
    if stage.start and stage.start not in before:
        raise RecipeError(f"stages.{stage.name}.start = {stage.start!r}: allowed are "
                          f"{', '.join([*before, 'base'])}: earlier stages, or the recipe's own model")
    return stage.start or before[-1]


def goes_on(before: Recipe, after: Recipe) -> bool:
    """Whether a stage trains on what the one before trained, in place of training something over its merged model."""
    space, _ = make_recipe_space(before)
    alike = before.space.name == after.space.name and before.data.task == after.data.task
    return alike and bool(space.peft or space.stays)


def started(recipe: Recipe, stage: Stage, product: Path) -> Recipe:
    """The recipe of a stage that begins with what lies in an earlier one's folder."""
    after, before = stage_of(recipe, stage), read_recipe(product / "recipe.yaml")
    served = Result.load(product).adapter_path
    if served is None:
        raise RunError(f"{product} serves no model, so stage '{stage.name}' cannot begin with it")
    model, space = {**after.model.model_dump(), "weights": "pretrained"}, after.space.model_dump()
    if make_recipe_space(after)[1] is not None:  # the adapter that the first stage began with is in its product
        del space["start_from"]
    if served.name == "model":
        model["name"] = str(served.resolve())
    elif goes_on(before, after) and not (served / BASE).exists():
        model["name"], space["start_from"] = before.model.name, str(served.resolve())
    else:
        model["name"] = str(merged(product, before))
    return load_recipe({**after.model_dump(), "model": model, "space": space})


def merged(product: Path, before: Recipe) -> Path:
    """The whole model of a finished stage, made once."""
    room = RunFolder(product)
    goal = product / "merged"
    if not goal.is_dir():
        with room.replacing("merged") as temp:
            export(product, temp, merge=True, trust_remote_code=before.model.trust_remote_code)
    return goal.resolve()


def check(recipe: Recipe) -> None:
    """Refuse, before anything is made, what some stage could not do: each is built as it would begin by itself."""
    stages = recipe.stages or []
    names = [s.name for s in stages]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"stages: {name!r} is the name of {names.count(name)} of them; each needs its own")
        if name == "base" or not name or not all(c.isalnum() or c in "-_" for c in name):
            raise RecipeError(f"stages: the name {name!r} is not allowed; it must be of letters, digits, - and _, and "
                              "not 'base', the recipe's own model")
    made = {s.name: stage_of(recipe, s) for s in stages}
    for stage in stages:
        after, origin = made[stage.name], origin_of(recipe, stage)
        if after.engine.kind in FAR:
            raise RecipeError(f"engine.kind = {after.engine.kind!r} and stages do not go together: serve each stage by "
                              "itself, with model.name or space.start_from on what the one before ended with")
        if stage.judges:
            check_judges(recipe, stage, made)
            after = judged(after, made[stage.judges], stage)
        if origin is not None:
            check_fit(stage.name, after, origin, made[origin], "model" in stage.changes)
        try:
            look(build(after))
        except FedLLMError as error:
            raise type(error)(f"stage '{stage.name}': {error}") from None


def check_fit(name: str, after: Recipe, origin: str, before: Recipe, own_model: bool) -> None:
    """RecipeError or CompositionError where a stage cannot begin with what another one ends with."""
    if own_model and before.model.name != after.model.name:
        raise RecipeError(f"stages.{name}.model.name = {after.model.name!r}: the model is what stage '{origin}' ends "
                          "with; leave it out, or give start: base")
    adapter = make_recipe_space(after)[1]
    if adapter is not None and adapter != make_recipe_space(before)[1]:
        raise RecipeError(f"stages.{name}.space.start_from: it begins with what stage '{origin}' ends with; leave it "
                          "out, or give start: base")
    method = make_method(before.method.name, **before.method.knobs)
    if acts(before) or not method.serves or not overrides(method, "round"):
        raise CompositionError(f"stage '{name}' cannot begin with what stage '{origin}' ends with: method "
                               f"'{before.method.name}' ends with no language model that all share; give start: base")
    if method.ends_with_judges and not make_method(after.method.name, **after.method.knobs).ends_with_judges:
        raise CompositionError(f"stage '{name}' cannot begin with what stage '{origin}' ends with: a judge of answers, "
                               f"which gives none; give judges: {origin}, or another start")
    space, _ = make_recipe_space(before)
    if goes_on(before, after):
        return
    if space.stays:
        raise CompositionError(f"stage '{name}' with space '{after.space.name}' (data.task '{after.data.task}') cannot "
                               f"begin with what stage '{origin}' ends with: space '{before.space.name}' cannot be put "
                               f"into the weights ({space.stays}); use the same space and task, or start: base")
    if before.data.task == after.data.task and before.data.task not in HEADLESS:
        raise CompositionError(f"stage '{name}' with space '{after.space.name}' cannot begin with what stage "
                               f"'{origin}' ends with: of data.task '{before.data.task}' the head would be lost; use "
                               f"an adapter's space (lora) in both, or start: base")
