"""Refusals speak as users write: layers by their names in a recipe, options, keys; and nothing is silently nobody."""

from __future__ import annotations

import re

import pytest
from rich.console import Console

from evidence.pages.composition import examples, rows
from fedllm.api import run as run_recipe
from fedllm.attacks.att_byzantine import AttByzantine
from fedllm.cli.main import main
from fedllm.cli.tables import show_result
from fedllm.core.errors import CompositionError, RecipeError
from fedllm.core.found import load_plugin
from fedllm.core.layer import Facts, name_of
from fedllm.defenses.krum import Krum
from fedllm.defenses.median import CoordinateMedian
from fedllm.privacy.fedml_he import FedMLHE
from fedllm.privacy.he_ckks import HECKKS
from fedllm.runs.complaints import parse_override
from fedllm.runs.layers import layer_classes
from fedllm.runs.result import Result
from fedllm.wire.ring_all_reduce import RingAllReduce

TWO = Facts({"a": 3, "b": 4}, 2, 1)


def test_two_layers_that_clash_are_called_as_in_a_recipe():
    said = [r.says for r in rows() if r.says and r.above in examples()]
    named = {name for text in said for name in re.findall(r"layer '(\w+)'", text)}
    assert len(said) > 100 and "dp_fedavg" in named and named <= set(layer_classes())


def test_a_layer_of_a_plugin_is_called_by_its_file(tmp_path):
    """Its module has a name of its own; one that was typed into a console has its class's."""
    (tmp_path / "shrug.py").write_text("from fedllm.core.layer import Layer\n\n\nclass Loud(Layer):\n    pass\n")
    assert name_of(load_plugin(tmp_path / "shrug.py", "plugins.0").Loud()) == "shrug"
    assert name_of(type("Typed", (), {"__module__": "a_console"})()) == "Typed"
    assert name_of(Krum()) == "krum" and name_of(CoordinateMedian()) == "median"


@pytest.mark.parametrize("layer", [HECKKS(), FedMLHE()], ids=["he_ckks", "fedml_he"])
def test_a_sum_over_two_is_refused_by_name(layer):
    with pytest.raises(CompositionError, match="hides a client among at least 3 and 2 take part") as told:
        layer.bind(TWO)
    assert str(told.value).partition(" ")[0] in layer_classes()
    layer.bind(Facts({"a": 3, "b": 4, "c": 1}, 3, 1))


def test_a_ring_of_two_claims_nothing():
    """It still is a way to send; what it says it hides is void."""
    assert "hides nobody" in RingAllReduce().bind(TWO).statement({})["void"][0]
    assert RingAllReduce().bind(Facts({"a": 3, "b": 4, "c": 1}, 3, 1)).statement({})["void"] == []


def test_a_share_of_clients_that_is_nobody_is_no_attack():
    with pytest.raises(RecipeError, match=r"clients = 0.2 is not allowed: of 2 that is nobody.* share above 0.25"):
        AttByzantine(clients=0.2).bind(TWO)
    assert AttByzantine(clients=0).bind(TWO).clients == () and AttByzantine(clients=0.0).bind(TWO).clients == ()
    assert len(AttByzantine(clients=0.3).bind(TWO).clients) == 1


def test_a_colon_without_its_space_is_said():
    """What a shell leaves of `{"name":"krum","f":3}`, and a usual slip."""
    for text in ("layers=[{name:krum,f:3}]", "data.partition={kind:iid, clients: 2}"):
        with pytest.raises(RecipeError, match=r"has no value; write a space after the colon, as in '\w+: \w+'"):
            parse_override(text)
    assert parse_override("a={<<: {u: 1}, 2: 3}")[1] == {"u": 1, 2: 3}
    with pytest.raises(RecipeError, match="not YAML"):
        parse_override("a={[x, y]: 1}")
    assert parse_override('a={"x":1, y: , "u:v": null, w: "a:b"}')[1] == {"x": 1, "y": None, "u:v": None, "w": "a:b"}


@pytest.mark.parametrize("option, says", [(["--endpoint", "URL"], "--endpoint must start with http"),
                                          (["--endpoint", "http://x", "--parallel", "0"], "--parallel = 0 is not")])
def test_a_judge_is_refused_by_its_options(capsys, option, says):
    with pytest.raises(SystemExit) as end:
        main(["judge", "a", "b", "--data", "q.jsonl", "--model", "m", *option])
    assert end.value.code == 2 and says in " ".join(capsys.readouterr().err.split())


def test_a_column_without_a_figure_takes_no_room(tmp_path):
    told = {"global": {"loss": 1.0, "accuracy": 0.5}, "clients": {}}
    result = Result(tmp_path, "fedavg", "vectorized", 3, 0, {"before": told, **told}, {"up": 1, "down": 1}, 1.0, 1, "d")
    console = Console(record=True, width=80)
    show_result(console, result)
    text = console.export_text()
    assert "global test" in text and "50.0 %" in text and "own tests" not in text


@pytest.mark.parametrize("clients, key", [
    ({"ranks": [2, 4000]}, "clients.ranks"),
    ({"profiles": {"office-01": {"rank": 4000}}}, "clients.profiles.office-01.rank")])
def test_a_rank_above_the_width_is_refused_by_the_key_that_says_it(tmp_path, clients, key):
    recipe = {"data": {"source": "office", "office": {"clients": 2, "rows": 4, "test_rows": 2, "client_test_rows": 0}},
              "method": "flexlora", "clients": clients, "rounds": 1}
    with pytest.raises(RecipeError, match=rf"^{re.escape(key)} = 4000 is not allowed; .* so it must be <= \d+$"):
        run_recipe(recipe, root=tmp_path)


def test_no_empty_table_where_no_text_came_to_a_gate(tmp_path, capsys):
    (tmp_path / "gate.jsonl").write_text("")
    with pytest.raises(SystemExit) as end:
        main(["compliance", str(tmp_path)])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "no text came to a gate" in told and "┃" not in told
