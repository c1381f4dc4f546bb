"""Every method has a recipe by which real federations are compared with a simulation, or says in a sentence why not."""

from evidence.bench.federation import _apart, tried
from evidence.bench.rig_rows import by_rig
from fedllm.core.errors import FedLLMError
from fedllm.federation.coordinator import check_recipe
from fedllm.federation.nvflare.loopback import Loopback
from fedllm.methods.registry import METHODS, method_class
from fedllm.runs.recipe import of_sites


class Paper(Loopback):
    """The files and the recipes, without keys or processes."""

    def _keys(self, folder, host):
        return None


def test_every_method_is_tried_or_says_why_not(tmp_path):
    refused, sites = {}, {}
    for at, (some, more) in enumerate(by_rig(sorted(METHODS))):
        (tmp_path / str(at)).mkdir()
        rig = Paper(tmp_path / str(at), **more)
        for name in some:
            if why := _apart(method_class(name).trial):
                refused[name] = why
                continue
            try:
                recipe = of_sites(tried(rig, name))
                check_recipe(recipe)
                sites[name] = rig.sites
            except FedLLMError as why:
                refused[name] = str(why)
    assert set(refused) == {"centralized", "fed_rag"}
    assert all("no rounds" in why or "simulation only" in why for why in refused.values())
    assert all((sites[name] == ("client-0", "client-1", "client-2")) == bool(method_class(name).trial.acts)
               for name in sites)  # who acts in an environment is called as its clients are
