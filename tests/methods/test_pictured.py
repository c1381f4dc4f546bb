"""Every method of pictures can be asked what its served model says of one, or serves none (`runs/pictures.py`)."""

from types import SimpleNamespace

import pytest

from fedllm.methods.registry import method_class, modules
from fedllm.runs.pictures import Pictured, named
from tests.methods.conftest import begin, tried

SEEING = [name for name in modules() if method_class(name).trial.task in ("image_text", "pairs")]


@pytest.mark.parametrize("name", SEEING)
def test_the_served_model_names_pictures_before_any_round_and_after_one(name):
    run = begin(name, **tried(name))
    rows = [Pictured(None, e, "") for e in run.world.federation.test if "pixels" in e.parts]
    assert rows
    for _ in range(2):
        said = named(SimpleNamespace(world=run.world), run.method, run.state, rows)
        assert (len(said) == len(rows) and set(said) <= set(run.world.federation.labels)) if run.method.serves else (
            said == [])
        run.go(1)
