"""Parts of one's own: plugin files, entry points, and what is refused."""

import importlib.metadata
import inspect
import json
import re
from pathlib import Path

import pytest
import yaml

import fedllm
from fedllm.cli.main import main
from fedllm.core import found
from fedllm.core.errors import RecipeError
from fedllm.engines.far.reasons import Refused
from fedllm.federation.admission import admitted
from fedllm.federation.opening import for_sites
from fedllm.federation.settings import SiteSettings
from fedllm.methods import registry
from fedllm.methods.baselines import fedavg
from fedllm.methods.registry import METHODS, method_class, modules
from fedllm.runs.layers import LAYERS
from fedllm.runs.plugins import plugged
from fedllm.runs.recipe import load_recipe
from fedllm.spaces.registry import SPACES

LAYER = '''
from fedllm.core.layer import Layer


class Nothing(Layer):
    """Changes nothing."""
'''


@pytest.fixture(autouse=True)
def unplugged():
    yield
    plugged([])
    found.installed.cache_clear()


@pytest.fixture
def mine(tmp_path):
    """FedAvg under another name, in a file of one's own."""
    path = tmp_path / "fedmine.py"
    path.write_text(inspect.getsource(fedavg).replace("class FedAvg(", "class FedMine("))
    return path


def recipe(tmp_path, model, **more):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {w}", "response": w}) + "\n" for w in
                            ["red", "green", "blue", "one", "two", "cat"] * 3))
    return {"model": model, "rounds": 2, "data": {"source": str(rows), "partition": {"kind": "iid", "clients": 2},
                                                  "test": 0.2}, "space": {"name": "lora", "rank": 2},
            "local": {"steps": 1, "batch_size": 2}, "evaluate": {"exact_match": False, "samples": 0}, **more}


def test_a_plugin_runs_as_ours_does_and_is_recorded(tmp_path, tiny_llama_folder, mine):
    spec = recipe(tmp_path, tiny_llama_folder)
    want = fedllm.run(spec, root=tmp_path / "a")
    got = fedllm.run(spec, root=tmp_path / "b", method="fedmine", plugins=[str(mine)])
    assert got.state_digest == want.state_digest
    kept = yaml.safe_load((got.folder / "recipe.yaml").read_text())["plugins"]
    assert kept == [{"file": str(mine), "sha256": found.digest_of(mine, "plugins.0.file")}]
    assert "fedmine" in METHODS and "fedmine" not in modules()
    load_recipe({})
    assert "fedmine" not in METHODS
    with pytest.raises(RecipeError, match="'fedmine' is unknown"):
        method_class("fedmine")


def test_resume_refuses_another_file_and_takes_a_moved_one(tmp_path, tiny_llama_folder, mine):
    spec = recipe(tmp_path, tiny_llama_folder, method="fedmine", plugins=[str(mine)])
    done = fedllm.run(spec, root=tmp_path / "a")
    (done.folder / "result.json").unlink()
    text = mine.read_text()
    mine.write_text(text + "\n# changed\n")
    with pytest.raises(RecipeError, match=r"plugins.0.file = '.*fedmine.py' has changed since the run began \(sha256"):
        fedllm.resume(done.folder, plugins=[mine])
    with pytest.raises(RecipeError, match=r"plugins.0.file = '.*', which is Python code .* --trust-remote-code"):
        fedllm.resume(done.folder)
    away = tmp_path / "away"
    away.mkdir()
    mine.unlink()
    with pytest.raises(RecipeError, match=r"plugins.0.file = '.*fedmine.py' cannot be read: No such file"):
        fedllm.resume(done.folder, trust_remote_code=True)
    (away / "fedmine.py").write_text(text)
    with pytest.raises(RecipeError, match=r"--plugin 'other.py': this run goes on with the plugins .* \(fedmine\)"):
        fedllm.resume(done.folder, plugins=["other.py"])
    assert fedllm.resume(done.folder, plugins=[away / "fedmine.py"]).state_digest == done.state_digest


def test_what_is_wrong_with_a_plugin_is_said(tmp_path, mine):
    def refused(name, text):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(RecipeError) as error:
            plugged([(str(path), None)])
        return str(error.value)

    code = mine.read_text()
    assert "the name 'fedavg' is taken among the methods by fedllm itself" in refused("fedavg.py", code)
    assert "holds nothing that a recipe can name; allowed are methods, layers" in refused("empty.py", "x = 1\n")
    assert "cannot be loaded: SyntaxError" in refused("wrong.py", "def :\n")
    assert "whose name is the name of what it holds" in refused("my-method.py", code)
    assert "holds ['A', 'B']; allowed is one of the kind 'layers'" in refused(
        "two.py", LAYER.replace("Nothing", "A") + LAYER.replace("Nothing", "B"))
    other = tmp_path / "sub"
    other.mkdir()
    (other / "fedmine.py").write_text(code + "\n")
    with pytest.raises(RecipeError, match="the name 'fedmine' is taken by"):
        plugged([(str(mine), None), (str(other / "fedmine.py"), None)])


def test_a_plugin_may_hold_a_layer(tmp_path):
    (tmp_path / "nothing.py").write_text(LAYER)
    assert load_recipe({"layers": ["nothing"], "plugins": [str(tmp_path / "nothing.py")]}).plugins[0].sha256
    assert LAYERS["nothing"].__name__ == "Nothing" and "nothing" not in METHODS


class Point:
    """An installed package's entry point."""

    def __init__(self, name, value, package="theirs"):
        self.name, self.value = name, value
        self.dist = type("Dist", (), {"name": package})()

    def load(self):
        return importlib.metadata.EntryPoint(self.name, self.value, "g").load()


def bring(monkeypatch, *points):
    monkeypatch.setattr(found, "entry_points", lambda group: points if group == "fedllm.methods" else ())
    found.installed.cache_clear()


def test_an_entry_point_is_found_by_module_and_by_class(monkeypatch):
    bring(monkeypatch, Point("one", "fedllm.methods.baselines.fedavg"),
          Point("two", "fedllm.methods.baselines.fedavg:FedAvg"))
    assert method_class("one") is method_class("two") is fedavg.FedAvg
    assert METHODS.whose("one") == "the installed package 'theirs'" and {"one", "two"} < set(METHODS)


def test_entry_points_that_clash_or_break_are_refused_when_they_are_asked_for(monkeypatch):
    bring(monkeypatch, Point("fedavg", "x"), Point("three", "x", "a"), Point("three", "y", "b"),
          Point("gone", "no_such_module"), Point("no", "json:dumps"))
    assert method_class("fedprox")
    for name, why in {"fedavg": "brought by fedllm itself and the installed package 'theirs'",
                      "three": "brought by the installed package 'a' and the installed package 'b'",
                      "gone": "'gone = no_such_module' of the installed package 'theirs' cannot be loaded: ModuleNot",
                      "no": "allowed is a module with one of the kind 'methods', or the class itself"}.items():
        with pytest.raises(RecipeError, match=why):
            method_class(name)


def test_a_site_runs_installed_code_that_its_settings_name(monkeypatch, tmp_path, mine, tiny_llama_folder):
    spec = load_recipe({"model": tiny_llama_folder, "method": "fedmine", "plugins": [str(mine)]})
    raw = for_sites(spec)
    assert raw["plugins"] == []
    mine_too = SiteSettings(data="d", store=str(tmp_path / "s"), models=[tiny_llama_folder])
    with pytest.raises(Refused, match=r"a site never loads code from a recipe: plugins = .*: install the met"):
        admitted({**raw, "plugins": spec.model_dump()["plugins"]}, mine_too)
    plugged([])  # a site's own process has none
    with pytest.raises(Refused, match=r"the method is not installed here, .*'fedmine'"):
        admitted(raw, mine_too)
    bring(monkeypatch, Point("fedmine", "fedllm.methods.baselines.fedavg"))
    with pytest.raises(Refused, match=r"comes from the installed package 'theirs' and not from fedllm; name it in"):
        admitted(raw, mine_too)
    assert admitted(raw, mine_too.model_copy(update={"methods": ["fedmine"]})).method.name == "fedmine"


def test_the_command_line_takes_plugins(tmp_path, mine, capsys):
    with pytest.raises(SystemExit) as end:
        main(["methods", "fedmine", "--plugin", str(mine)])
    shown = re.sub(r"[\s│]", "", capsys.readouterr().out)  # however the panel breaks the path
    assert end.value.code == 0 and "fedmine.py" in shown
    with pytest.raises(SystemExit) as end:
        main(["methods", "fedmine", "--plugin", str(tmp_path / "none.py")])
    assert end.value.code == 2 and "cannot be read" in capsys.readouterr().err


def test_every_room_holds_what_its_folder_does():
    assert {"lora", "full", "st_adapter"} <= set(SPACES) and not {"params", "space", "adapters"} & set(SPACES)
    folder = Path(registry.__file__).parent
    assert {p.stem for p in folder.glob("*/*.py")} == set(modules())
    assert not list(folder.glob("*/__init__.py"))
    with pytest.raises(RecipeError, match="did you mean 'lora'"):
        SPACES.find("lorra", "space.name")
