"""What a stage hands to a later one beside its product: judges of two answers, frozen, that label its pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedllm.core.errors import CompositionError, RecipeError, RunError
from fedllm.core.method import Method
from fedllm.methods.registry import make_method, method_class, modules
from fedllm.models.peft_io import CONFIG, SPACE
from fedllm.runs.recipe import Recipe
from fedllm.runs.result import Result
from fedllm.runs.sections import NamedModel, Stage


def judged(after: Recipe, before: Recipe, stage: Stage, product: Path | None = None) -> Recipe:
    """The recipe of a stage that asks the judges of another, whose recipe is `before` and whose folder is `product`.

    Each becomes one of its `models`, over a copy of the base of its own, and the method is told their names. Without a
    product they are untrained: what does not fit is found before anything is run.
    """
    method = make_method(before.method.name, **before.method.knobs)
    names = [f"{stage.judges}-{g}" for g in range(method.ends_with_judges)]
    models = {**after.models}
    for g, name in enumerate(names):
        models[name] = _judge(before, None if product is None else _folder(product, g, len(names)))
    told = {**after.method.model_dump(), "judges": names, "choices": list(method.choices)}  # type: ignore[attr-defined]
    return after.model_copy(update={"models": models, "method": type(after.method)(**told)})


def _folder(product: Path, g: int, of: int) -> Path:
    """Where judge g of a finished stage lies: the only one is what the stage serves."""
    folder = Result.load(product).adapter_path if of == 1 else product / "modules" / f"judge-{g}"
    if folder is None or not folder.is_dir():
        raise RunError(f"{product} lacks judge {g} of {of}: the stage ended otherwise, or its folder was changed")
    return folder.resolve()


def _judge(before: Recipe, folder: Path | None) -> NamedModel:
    """One judge as one of `models`: what it was trained over, with the adapter that it came to."""
    space: dict[str, Any] = {k: v for k, v in before.space.model_dump().items() if k != "start_from"}
    m = before.model
    name = m.name
    if folder is not None and ((folder / CONFIG).exists() or (folder / SPACE).exists()):
        space = {"name": before.space.name, "start_from": str(folder)}
    elif folder is not None:
        name = str(folder)
    return NamedModel.model_validate({"name": name, "space": space, "dtype": m.dtype, "quantize": m.quantize})


def check_judges(recipe: Recipe, stage: Stage, made: dict[str, Recipe]) -> None:
    """RecipeError or CompositionError where a stage cannot ask the judges that it names; `made`: all recipes."""
    key = f"stages.{stage.name}.judges = {stage.judges!r}"
    names = [s.name for s in recipe.stages or ()]
    earlier = names[: names.index(stage.name)]
    if stage.judges not in earlier:
        raise RecipeError(f"{key}: allowed are earlier stages: {', '.join(earlier) or 'there are none'}")
    before, after = made[stage.judges], made[stage.name]
    trained = make_method(before.method.name, **before.method.knobs).ends_with_judges
    if not trained:
        able = [n for n in modules() if method_class(n).ends_with_judges is not Method.ends_with_judges]
        raise CompositionError(f"{key}: that stage's method '{before.method.name}' trains no judges of two answers; "
                               f"methods that do: {', '.join(able)}")
    if "judges" not in method_class(after.method.name).knobs():
        able = [n for n in modules() if "judges" in method_class(n).knobs()]
        raise CompositionError(f"{key}: method '{after.method.name}' asks no judges; methods that do: "
                               f"{', '.join(able)}")
    if before.rounds < trained:
        raise CompositionError(f"{key}: that stage has {before.rounds} rounds for {trained} judges, so that some would "
                               f"be untrained; allowed is rounds >= {trained}")
    if before.model.name != after.model.name:
        raise CompositionError(f"{key}: those judges are of model '{before.model.name}' and this stage trains "
                               f"'{after.model.name}'; give both stages one model")
    if taken := [k for k in ("judges", "choices") if k in after.method.knobs]:
        raise RecipeError(f"stages.{stage.name}.method.{taken[0]}: the stage '{stage.judges}' says it; leave it out")
