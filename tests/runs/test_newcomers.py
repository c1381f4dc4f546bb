"""What a newcomer writes into a recipe or a command, and what is said of it."""

import json
import subprocess
import sys

import pytest

import fedllm
from fedllm.cli.main import main
from fedllm.core.errors import ModelError, RecipeError
from fedllm.models.checks import complete
from fedllm.models.model import Model
from fedllm.runs.build import _take_threads
from fedllm.runs.complaints import parse_yaml
from fedllm.runs.folder import RunFolder
from fedllm.runs.recipe import load_recipe
from fedllm.runs.seal import _against_result
from fedllm.spaces.registry import make_space


@pytest.mark.parametrize("text, value", [
    ("010", "010"), ("0", 0), ("-7", -7), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("1_000", 1000), ("0x10", 16),
    ("3e-3", 0.003), (".5", 0.5), ("1.", 1.0), ("1.5e3", 1500.0), ("yes", True), ("08", "08"), ("1e5", 1e5),
    (".inf", float("inf")), ("1.2.3", "1.2.3"), ("-", "-")])
def test_a_number_is_what_people_expect(text, value):
    got = parse_yaml(f"[{text}]" if text != "-" else "['-']", "x")[0]
    assert got == value and type(got) is type(value)


def test_mappings_are_taken_in_and_a_key_twice_names_its_line():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n", "x")["b"] == {"x": 1, "y": 3}
    with pytest.raises(RecipeError, match=r"line 3: .*'a' is given twice"):
        parse_yaml("a: 1\nb: 2\na: 3\n", "x")
    with pytest.raises(RecipeError, match="'<<' is given twice"):
        parse_yaml("a: &a {x: 1}\nb: &b {y: 1}\nc:\n  <<: *a\n  <<: *b\n", "x")


@pytest.mark.parametrize("key, here", [("lr", "local.lr"), ("batch_size", "local.batch_size"),
                                       ("batch-size", "local.batch_size"), ("partition", "data.partition"),
                                       ("per_round", "clients.per_round"), ("dtype", "model.dtype")])
def test_a_key_at_the_top_that_belongs_into_a_section_is_told_where(key, here):
    with pytest.raises(RecipeError, match=rf"{key}: unknown key; here it is '{here}'\. Allowed"):
        load_recipe({key: 1})


@pytest.mark.parametrize("changes, said", [
    ({"space": {"alpha": 1e300}}, r"space\.alpha = 1e\+300 .*<= 1000000\.0 \("),
    ({"space": {"alpha": 1e-300}}, "alpha"),
    ({"clients": {"latency": 1e300}}, r"clients\.latency = 1e\+300"),
    ({"clients": {"step_seconds": 1e300}}, "step_seconds = 1e"),
    ({"clients": {"speed": 1e-300}}, r"clients\.speed = 1e-300.*1e-9"),
    ({"energy": {"utilization": 1e-300}}, r"energy\.utilization = 1e"),
    ({"local": {"neftune": 1e15}}, r"local\.neftune .*<= 1e?0"),
    ({"name": "x" * 300}, "has 300 bytes; allowed are 200"),
    ({"method": {"name": "fedavg", "server_lr": 1e300}}, r"server_lr = 1e\+300 .*<= 1e\+15"),
    ({"clients": {"profiles": {"nobody": {"speed": 2}}}}, r"no such client\. The data has")])
def test_numbers_without_a_meaning_are_refused_with_what_is_allowed(recipe, tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        fedllm.run(recipe, root=tmp_path, **changes)
    assert not list(tmp_path.glob("small*"))


def test_more_threads_than_a_machine_can_use_are_refused():
    with pytest.raises(RecipeError, match=r"engine\.threads = 4096: this machine has"):
        _take_threads(4096)


@pytest.mark.parametrize("local", [{"lr": 1e-300}, {"lr": 1e-3, "clip_norm": 1e-300}])
def test_rounds_that_move_nothing_are_said(recipe, tmp_path, local):
    result = fedllm.run(recipe | {"local": {**local, "steps": 1}}, root=tmp_path, rounds=1)
    said = [e["why"] for e in RunFolder(result.folder).events() if e["kind"] == "caution"]
    assert any("numbers that are trained moved" in why for why in said)


def test_rounds_that_move_something_say_nothing(recipe, tmp_path):
    result = fedllm.run(recipe, root=tmp_path, rounds=1, clients={"per_round": 90})
    said = [e["why"] for e in RunFolder(result.folder).events() if e["kind"] == "caution"]
    assert any("clients.per_round = 90, and there are 5 clients: all of them are asked" in why for why in said)
    assert not [e for e in RunFolder(result.folder).events() if e["kind"] == "caution" and "moved" in e["why"]]
    done = json.loads((result.folder / "result.json").read_text())
    assert _against_result([done], [], {}) == _against_result({"audit": []}, [], {}) == [
        "result.json holds no head of the chain (written before there was one, or taken out)"]


def test_the_version_is_told_and_the_module_is_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code and capsys.readouterr().out == f"fedllm {fedllm.__version__}\n"
    told = subprocess.run([sys.executable, "-c", "import fedllm.__main__ as m; print(m.main.__module__)"],
                          capture_output=True, text=True, timeout=120)
    assert told.stdout.strip() == "fedllm.cli.main"


def test_other_shapes_than_the_config_says_are_told_by_name():
    told = {"mismatched_keys": {("lm_head.weight", (1,), (2,))}, "missing_keys": {"lm_head.weight"}}
    import torch

    net = torch.nn.Module()
    net.lm_head = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"'lm_head.weight' have other shapes than its config says"):
        complete("m", net, told)


def test_end_tokens_are_numbers(word_model):
    with pytest.raises(ModelError, match="eos_token_id of its generation_config is 'x'"):
        word_model.ends  # noqa: B018


@pytest.fixture
def word_model(tiny_llama_folder):
    from fedllm.models.load import load_model

    model: Model = load_model(tiny_llama_folder, "generation", make_space("lora", rank=2))
    model.net.generation_config.eos_token_id = [1, "x"]
    model.__dict__.pop("ends", None)
    return model
