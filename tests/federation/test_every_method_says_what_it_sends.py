"""What a method's card says that leaves is what leaves: without words or tokens declared, tensors and numbers alone."""

import pytest

from evidence.bench.federation import SPECS
from fedllm.api import run
from fedllm.core.program import Fold
from fedllm.engines.far.leaving import Words, held_back
from fedllm.federation.nvflare.loopback import Loopback
from fedllm.methods.registry import make_method, method_class, modules
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe


@pytest.fixture(scope="module")
def rig(tmp_path_factory, tiny_llama_folder):
    return Loopback(tmp_path_factory.mktemp("rows"), tiny_llama_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(modules()))
def test_a_method_sends_what_its_card_declares(rig, name, monkeypatch):
    spec = {**rig.recipe(name, **SPECS.get(name, {})), "rounds": 1}
    method = make_method(**spec["method"])
    if method.simulation_only:
        pytest.skip("no site runs it")
    found, take, names = [], Fold.take, build(load_recipe(spec)).world.model.initial()

    def look(self, client, reply, seconds=None):
        sealed = self.ask.fn.__dict__.get("sealed", False)
        words = Words.of([], [*names, *self.ask.msgs.get(client, ())]).content()
        if client != "__global__" and (why := held_back(reply, words, sealed)):
            found.append(f"{self.ask.phase}: {why}")
        return take(self, client, reply, seconds)

    monkeypatch.setattr(Fold, "take", look)
    run(spec, root=rig.folder / "runs")
    assert bool(found) <= bool(method_class(name).card.kinds), found[:3]
