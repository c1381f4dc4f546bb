"""DiPaCo: one path is DiLoCo, modules step by who has them, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import CompositionError, RecipeError
from fedllm.methods.registry import make_method

LOCAL = {"space": "full", "local": {"optimizer": "adamw", "lr": 0.01, "steps": 2}}


def test_with_one_module_a_level_it_is_diloco(begin, gap):
    mine = begin("dipaco", modules_a_level=1, **LOCAL).go(3)
    theirs = begin("diloco", **LOCAL).go(3)
    assert gap(mine.method.tree(mine.state, 0), theirs.state["theta"]) < 1e-12


@pytest.mark.parametrize("rescale", ["none", "sqrt"])
def test_a_module_steps_by_the_mean_of_those_who_have_it(begin, rescale):
    """Paths 0 and 1 share the second level's module; each has the first level's to itself."""
    run = begin("dipaco", rescale=rescale, outer_lr=1.0, outer_momentum=0.0, **LOCAL)
    state = {**run.state, "paths": {"c0": 0, "c1": 1}}
    ones = {n: torch.ones_like(t) for n, t in run.method.tree(state, 0).items()}
    moved = run.method.merge(state, {"c0": (0, ones), "c1": (1, {n: 3 * t for n, t in ones.items()})})

    def step(module, name):
        key = f"{module}/model.layers.{name}.mlp.up_proj.weight"
        return float((run.state["theta"][key] - moved["theta"][key]).mean())

    times = 2**0.5 if rescale == "sqrt" else 1.0
    assert step("0.0", 0) == pytest.approx(1) and step("0.1", 0) == pytest.approx(3)
    assert step("1.0", 1) == pytest.approx(2 * times) and step("1.1", 1) == 0


def test_a_client_gets_one_path_and_rows_take_the_nearest(begin):
    run = begin("dipaco", **LOCAL).go(1)
    whole = sum(t.numel() for t in run.world.model.initial().values())
    down = [e for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "down"
            and "local" in e["phase"]]
    assert len(down) == 4 and all(e["bytes"] < 1.2 * 8 * whole for e in down)
    assert sum(t.numel() for t in run.state["theta"].values()) > 1.3 * whole
    assert sorted(run.method.modules(run.state)) == [f"path-{p}" for p in sorted(set(run.state["paths"].values()))]
    first = run.state["paths"]["c0"]
    assert run.method.routed(run.state, {"late": run.state["centers"][first]})["paths"]["late"] == first


def test_levels_without_blocks_and_other_spaces_are_refused(begin):
    model = begin("fedavg", space="full").world.model
    with pytest.raises(RecipeError, match=r"levels = 3 leaves a path without modules.*allowed are 1 to 2"):
        make_method("dipaco", levels=3).check(model)
    with pytest.raises(CompositionError, match="use the space 'full'"):
        make_method("dipaco").check(begin("fedavg").world.model)
