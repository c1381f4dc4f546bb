"""The recipe: one YAML file that says all of a run, checked key by key before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
)

from fedllm.core.errors import RecipeError
from fedllm.data.scenes import SCENE
from fedllm.data.spec import Spec
from fedllm.runs.complaints import check_values, complaints, edit, fill, read_yaml
from fedllm.runs.laws import short
from fedllm.runs.plugins import plugged
from fedllm.runs.sections import (
    OWN,
    ClientsSpec,
    Data,
    EnergySpec,
    EngineSpec,
    EvaluateSpec,
    ModelSpec,
    Named,
    NamedModel,
    Plugin,
    RecordSpec,
    Stage,
)
from fedllm.tasks.answers import judges_of
from fedllm.trackers.registry import known


class Recipe(Spec):
    """All that a run depends on."""

    name: str = "run"
    """Name of the run, and of its folder."""
    model: Annotated[ModelSpec, short("name")] = Field(default_factory=ModelSpec)
    models: dict[str, Annotated[NamedModel, short("name")]] = Field(default_factory=dict)
    """Further models by name, for client functions (`client.models["teacher"]`) and for clients to hold."""
    data: Annotated[Data, short("source")] = Field(default_factory=Data)
    method: Annotated[Named, short("name")] = Field(default_factory=lambda: Named(name="fedavg"))
    """The method and its knobs (`fedllm methods` lists them)."""
    space: Annotated[Named, short("name")] = Field(default_factory=lambda: Named(name="lora"))
    """What of the model is trained: lora, full, ia3, prefix, soft_prompt, head, ... and its knobs."""
    local: dict[str, Any] = Field(default_factory=dict)
    """Knobs of a client's training: optimizer, lr, steps or epochs, batch_size, ..."""
    layers: list[Annotated[Named, short("name")]] = Field(default_factory=list)
    """Privacy, compression, attacks and defenses, from the method down to the wire."""
    clients: ClientsSpec = Field(default_factory=ClientsSpec)
    select: Annotated[Named, short("name")] = Field(default_factory=lambda: Named(name="uniform"))
    """Who of the clients is asked in a round, for any method."""
    energy: EnergySpec | None = None
    """Meter the run: devices, links, and whether to read the machine's own counters."""
    rounds: Annotated[int, Field(ge=0, le=10**6)] = 10
    """Rounds of the run; 0 tests the model as it is."""
    stages: Annotated[list[Stage], Field(min_length=1)] | None = None
    """Runs one after another in one folder: each has a `name`, the recipe's keys that it changes, and begins with what
    the one before ended with (`start: NAME` of an earlier one, or `base`); with `judges: NAME` the judges of two
    answers that an earlier one trained label its pairs. None: one run."""
    engine: Annotated[EngineSpec, short("kind")] = Field(default_factory=EngineSpec)
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of every draw: equal recipe and seed give an equal state."""
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec)
    record: RecordSpec = Field(default_factory=RecordSpec)
    track: Annotated[list[str], AfterValidator(known)] = Field(default_factory=list)
    """Trackers that are told the run's figures: tensorboard, mlflow, wandb, trackio (each an extra of its name)."""
    plugins: list[Annotated[Plugin, short("file")]] = Field(default_factory=list)
    """Files with parts of one's own. The sites of a real federation load none: there a part is installed."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Written into a run's own recipe: what it ran with. Not read."""


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from a YAML path, a mapping or a recipe; `overrides` maps key paths to values.

    Its plugin files are loaded; those in `overrides` come beside the recipe's own. Raises RecipeError with one line for
    each thing that is wrong.
    """
    return armed(read_recipe(source, overrides))


def read_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The same, of which nothing is loaded or run: whoever's it is, reading it does no harm."""
    raw = _raw(source)
    for key, value in (overrides or {}).items():
        beside = key == "plugins" and isinstance(value, list | tuple) and isinstance(raw.get(key, []), list)
        edit(raw, key, [*raw.get(key, []), *value] if beside else value)
    check_values(raw)
    fill(raw)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(complaints(Recipe, error.errors())) from None
    if recipe.name in ("", ".", "..") or not all(c.isalnum() or c in "-_.+ " for c in recipe.name):
        raise RecipeError(f"name = {recipe.name!r}: allowed are letters, digits, spaces and - _ . +")
    if len(recipe.name.encode()) > 200:
        raise RecipeError(f"name = {recipe.name[:40]!r}... has {len(recipe.name.encode())} bytes; allowed are 200, as "
                          "it is a folder's")
    return recipe


def of_sites(source: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a real federation, checked: rows are each site's own, whatever a simulation's recipe names. An
    environment stays named, since it says how wide a policy is; the sites' are their own all the same."""
    raw = _raw(source)
    data = raw.get("data")
    named = (overrides or {}).get("data.source", data.get("source") if isinstance(data, Mapping) else data)
    return load_recipe(raw, {**({} if str(named).startswith(SCENE) else {"data.source": OWN}), **(overrides or {})})


def _raw(source: str | Path | Mapping[str, Any] | Recipe) -> dict[str, Any]:
    if isinstance(source, Recipe):
        return source.model_dump()
    return dict(source) if isinstance(source, Mapping) else {"name": Path(source).stem, **read_yaml(Path(source))}


def armed(recipe: Recipe) -> Recipe:
    """The recipe with what it names loaded: plugin files, and the functions of one's own that judge."""
    files = plugged([(p.file, p.sha256) for p in recipe.plugins])
    judges_of(recipe.evaluate.metric)
    return recipe.model_copy(update={"plugins": [Plugin(**f) for f in files]})
