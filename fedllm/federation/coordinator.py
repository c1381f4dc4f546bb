"""The coordinator's half of a real federation: open the run at every site, drive it as any run, close it."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.core.client import ClientInfo
from fedllm.core.errors import RecipeError, RunError
from fedllm.data.federation import Federation, Shard
from fedllm.engines.far.engine import Flare
from fedllm.engines.far.line import Link, Patience
from fedllm.engines.far.reasons import Refused
from fedllm.engines.far.sites import Sites
from fedllm.engines.world import World
from fedllm.federation.answering import Answering
from fedllm.federation.gated import GATE
from fedllm.federation.identity import TOLD, differing, identity_of, keep_identity
from fedllm.federation.opening import Opening
from fedllm.federation.public import PublicRows, check_public
from fedllm.federation.site import site_profile
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.report.report import publish
from fedllm.runs.build import Parts, bound, heard_by, make_layers, make_recipe_space, recipe_model
from fedllm.runs.fits import check_cohort, compose, need_public, no_stages
from fedllm.runs.folder import RUN_ID, RunFolder
from fedllm.runs.models import check_names, check_servers, need_named, shelves
from fedllm.runs.progress import Lines, Quiet
from fedllm.runs.recipe import Recipe, load_recipe
from fedllm.runs.result import Result, finished
from fedllm.runs.rows import file_rows
from fedllm.runs.run import Run
from fedllm.runs.training import check_training
from fedllm.tasks.answers import judges_of
from fedllm.trackers.registry import installed

log = logging.getLogger(__name__)
FAILED = "failed.txt"
"""In the run's folder: why the coordinator's process gave up."""


class NotAllHere(RunError):
    """NVFlare began the run without sites that are needed (one may be starting again): worth another try."""


class FarWorld(World):
    """The coordinator's world: the model and the global test; of the clients only what they said of themselves."""

    said: Mapping[str, ClientInfo] = {}

    def infos(self) -> list[ClientInfo]:
        return list(self.said.values())


def coordinator_parts(recipe: Recipe, said: Mapping[str, Mapping[str, Any]], sites: Sequence[str],
                      left_out: Mapping[str, str]) -> Parts:
    """The parts of the run on the coordinator, where no client's row is."""
    labels = sorted({tuple(s["labels"]) for s in said.values()})
    tasks = sorted({str(s["task"]) for s in said.values()})
    if len(labels) != 1 or len(tasks) != 1:
        raise RunError(f"the sites disagree on the task: labels {labels}, tasks {tasks}")
    method = make_method(recipe.method.name, **recipe.method.knobs)
    layers, selector = make_layers(recipe, named=any("model" in s["profile"] for s in said.values()))
    compose(method, layers)
    local = LocalSpec.make(recipe.local, "local")
    layers = bound(layers, recipe, {s: int(said[s]["n"]) for s in sorted(said)}, local)
    infos = {s: ClientInfo(s, int(said[s]["n"]), site_profile(recipe, s, sites, said[s]["profile"]))
             for s in sorted(said)}
    check_cohort(recipe, method, list(infos))
    task = "environment" if recipe.data.acts else recipe.data.task
    federation = Federation({s: Shard((), (), {"site": s}) for s in infos}, file_rows(recipe, recipe.data.test), task,
                            tuple(labels[0]), file_rows(recipe, recipe.data.public))
    space, _ = make_recipe_space(recipe)
    e = recipe.evaluate
    model = recipe_model(recipe, space, federation.task, federation.labels)
    method.check(model)
    check_training(model, local, method, layers)
    method.check_work(local, recipe.rounds)
    method.check_profiles(model, list(infos.values()))
    named, _ = shelves(recipe, federation.task, federation.labels, lambda: model, {})
    check_servers(method, model, named)
    world = FarWorld(model, federation, local, recipe.seed,
                     {s: i.profile for s, i in infos.items()}, Limits(batch_tokens=recipe.engine.step_tokens),
                     e.exact_match, e.max_new_tokens, recipe.data.completion_only, recipe.rounds, models=named,
                     metric=e.metric)
    world.said = infos
    return Parts(recipe, world, method, layers, dict(left_out), heard_by(layers, selector))


def drive_run(folder: Path, link: Link, sites: Sequence[str], needed: int | None = None,
              patience: Patience | None = None, progress: Quiet | None = None, kind: str = "flare",
              after: Callable[[Answering], None] | None = None) -> Result:
    """Begin the run in `folder`, or go on where it stood, with these sites; comes back with its result.

    `kind` is the engine that the result names: what carries the link. `after` is given the run once its rounds are
    over, while its sites are there: to answer questions.
    """
    room = RunFolder.open(folder)
    recipe = load_recipe(folder / "recipe.yaml")
    check_recipe(recipe)
    needed = len(sites) if needed is None else needed
    if len(sites) < needed:
        raise NotAllHere(f"{len(sites)} of {needed} sites are here ({', '.join(sites)})")
    found = room.load()
    table = Sites(link, sites, patience)
    method = make_method(recipe.method.name, **recipe.method.knobs)
    public = PublicRows.of(file_rows(recipe, recipe.data.public)) if "clients" in method.public_at() else None
    opening = Opening(table, recipe, recipe_run(folder), found[0] if found else 0, public)
    left_out = opening.all(needed)
    parts = coordinator_parts(recipe, opening.said, sorted(sites), left_out)
    if strange := of_other_models(room, parts.world, recipe, opening.said):
        left_out |= opening.without(strange, needed)
        parts = coordinator_parts(recipe, opening.said, sorted(sites), left_out)
    parts.recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"kind": kind})})
    parts.engine = functools.partial(Flare, sites=table)
    try:
        with room.held(wait=30.0):  # the process before this one may still be ending
            run = Run(parts, room, progress or Lines(), publish)
            for site, size in sorted(opening.shipped.items()):
                run.record.crossed("down", "Opening.public", site, size, run.at, "Opening")
            over = (folder / "result.json").exists()
            result = finished(folder) if over else run.go()
            if after is not None:
                answering = Answering(run.course, table, recipe.rounds, folder)
                if over:  # documents may have changed since
                    answering.refresh()
                after(answering)
    finally:
        table.hang_up()
    loads = opening.close()
    room.write_json("sites.json", {n: {"loads": loads.get(n), "suspect": s.suspect} for n, s in table.table.items()})
    return result


def of_other_models(room: RunFolder, world: FarWorld, recipe: Recipe, said: Mapping[str, Mapping[str, Any]]
                    ) -> dict[str, str]:
    """Sites that hold another base model or tokenizer than the run, and what is another there; those that hold a model
    of their own, as the recipe or they say, are not compared.

    What the run is on is the coordinator's own model, as it was when the run began; where sites hold another one
    (`model.at_clients`), it is that which the site first by name holds.
    """
    mine: Mapping[str, Any] = identity_of(world.model)
    try:
        keep_identity(room.path, {name: mine[name] for name in TOLD})
    except Refused as changed:
        raise RunError(f"this coordinator's own model is not the one that the run began with: {changed}") from None
    alike = sorted(c.id for c in world.infos() if c.profile.model in (None, recipe.model.name))
    if recipe.model.at_clients and alike:
        mine = said[alike[0]]
    return {site: f"its {' and '.join(odd)} differ from those of the run"
            for site in alike if (odd := differing(mine, said[site]))}


def check_recipe(recipe: Recipe) -> None:
    """RecipeError for what a simulation alone can do."""
    no_stages(recipe)
    if recipe.data.canaries:
        raise RecipeError(f"data.canaries = {recipe.data.canaries} is not allowed in a real federation: rows are the "
                          "sites' own, a recipe adds none to them, and an audit that looks for canaries needs the rows "
                          "of a simulation. Leave it out, or measure the same recipe with `fedllm run` first")
    if recipe.evaluate.baselines:
        raise RecipeError("evaluate.baselines run on all clients' rows in a simulation; leave them out of a federation")
    judges_of(recipe.evaluate.metric)
    installed(recipe.track)
    method = make_method(recipe.method.name, **recipe.method.knobs)
    if why := method.simulation_only:
        raise RecipeError(f"method.name = '{recipe.method.name}' {why}, so it runs in a simulation only")
    if "text" in method.card.kinds and GATE not in [layer.name for layer in recipe.layers]:
        raise RecipeError(f"method.name = '{recipe.method.name}' sends text, and sites let text leave through the gate "
                          f"alone; list it: layers: [{GATE}]")
    if isinstance(recipe.data.public, float) and recipe.data.public:
        raise RecipeError(f"data.public = {recipe.data.public}: of rows that lie at sites no share can be set aside "
                          "for all; allowed in a real federation is a file of the coordinator's")
    check_names(recipe)
    need_named(recipe, method)
    public = file_rows(recipe, recipe.data.public)
    need_public(recipe, method, len(public))
    if "clients" in method.public_at():
        check_public(public, recipe)


def recipe_run(folder: Path) -> str:
    """The run's name for its sites' stores: kept in the folder, so that a resumed run finds its memories."""
    path = folder / RUN_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text().strip()
