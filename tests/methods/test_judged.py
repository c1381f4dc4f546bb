"""Judges that one stage trains label the pairs of the next: their vote, both engines, whole recipes of stages."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import fedllm
from fedllm.core.errors import CompositionError, RecipeError, Withheld
from fedllm.engines.far.reasons import Refused
from fedllm.federation.admission import may_load
from fedllm.federation.settings import SiteSettings
from fedllm.methods import _judges
from fedllm.methods._judges import sampled, turned, vote
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.runs.build import build
from fedllm.runs.course import Course
from fedllm.runs.recipe import load_recipe
from fedllm.runs.sections import NamedModel
from fedllm.spaces import make_space
from tests.methods.conftest import llama, tokenizer
from tests.methods.test_fed_dpo import write

JUDGES, CHOICES = ("j0", "j1", "j2"), ("w1", "w2")


def judge(g: int) -> Model:
    """A judge whose adapter says something."""
    model = Model(llama(), tokenizer(), "preference", make_space("lora", rank=2), seed=g, fast_kernels=False)
    draw = torch.Generator().manual_seed(g)
    model.start = {n: torch.randn(t.shape, generator=draw, dtype=t.dtype) for n, t in model.initial().items()}
    return model


def asking(begin, **options):
    run = begin("fed_dpo", task="preference", judges=JUDGES, choices=CHOICES, **options)
    run.world.models = Shelf({name: lambda g=g: judge(g) for g, name in enumerate(JUDGES)})
    return run


@pytest.mark.parametrize("answers", ["rows", "sampled"])
def test_engines_agree_and_the_labels_stay(begin, gap, answers):
    one, many = (asking(begin, engine=e, answers=answers).go(1) for e in ("in_process", "vectorized"))
    turns = {c: m["turn"].tolist() for c, m in one.engine.memory.items()}
    assert turns == {c: m["turn"].tolist() for c, m in many.engine.memory.items()}
    assert gap(one.go(1).state["theta"], many.go(1).state["theta"]) <= 1e-10
    assert any(any(t) for t in turns.values()) and not all(all(t) for t in turns.values())
    assert turns == {c: m["turn"].tolist() for c, m in one.engine.memory.items()}
    if answers == "sampled":
        for c, memory in one.engine.memory.items():
            rows = one.world.federation.clients[c].train
            assert {s["prompt"] for s in memory["sampled"]} <= {r["prompt"] for r in rows}
            assert all(s["chosen"] != s["rejected"] for s in memory["sampled"])


def test_judges_of_one_mind_with_the_rows_are_dpo_on_them(begin, gap, monkeypatch):
    """And those that contradict every row are DPO on the rows turned round."""
    monkeypatch.setattr("fedllm.methods.alignment.fed_dpo.vote", lambda c, j, rows, w: np.ones(len(rows)))
    plain = begin("fed_dpo", task="preference").go(2)
    assert gap(asking(begin).go(2).state["theta"], plain.state["theta"]) == 0
    monkeypatch.setattr("fedllm.methods.alignment.fed_dpo.vote", lambda c, j, rows, w: -np.ones(len(rows)))
    other = begin("fed_dpo", task="preference")
    for shard in other.world.federation.clients.values():
        shard.train[:] = [turned(row) for row in shard.train]
    assert gap(asking(begin).go(2).state["theta"], other.go(2).state["theta"]) == 0


def test_most_of_them_decide_and_the_surer_ones_where_they_are_even(monkeypatch):
    said = {"a": [1.0, 9.0, -1.0], "b": [1.0, -2.0, -1.0], "c": [-9.0, -2.0, 0.5]}

    class Holds:
        def holding(self, name):
            self.model = type("M", (), {"initial": lambda self: name})()
            return self

    monkeypatch.setattr(_judges, "liked", lambda client, name, rows, words: np.array(said[name]))
    assert (vote(Holds(), "abc", [], ()) > 0).tolist() == [True, False, False]
    assert (vote(Holds(), "ab", [], ()) > 0).tolist() == [True, True, False]


def test_who_has_nothing_to_judge_says_so():
    class Dull:
        id, data = "c0", [{"prompt": "p", "chosen": "a", "rejected": "b"}]

        def generate(self, prompts, theta, **options):
            return ["same"] * len(prompts)

    with pytest.raises(Withheld, match=r"no two different answers to any of its 1 prompts at temperature 0\.5"):
        sampled(Dull(), {}, 0.5)
    Dull.data = [{"talks": {}}]
    with pytest.raises(Withheld, match="its prompts are conversations; use answers: rows"):
        sampled(Dull(), {}, 0.5)
    talk = {"prompt": "p", "chosen": "a", "rejected": "b", "talks": {"chosen": [1], "rejected": [2]}}
    assert turned(talk)["talks"] == {"chosen": [2], "rejected": [1]} and turned(turned(talk)) == talk


def test_a_site_looks_at_where_a_judge_comes_from():
    """`models.N.space.start_from` is a path that the site did not open, or a name that only the Hub has."""
    for folder, why in (("/etc", "path"), ("owner/adapter", "network")):
        spec = NamedModel.model_validate({"name": "embedded", "space": {"name": "lora", "start_from": folder}})
        with pytest.raises(Refused) as refused:
            may_load(SiteSettings(data="d", store="s"), "models.judge", spec)
        assert refused.value.code == why


STAGES = [{"name": "judges", "method": {"name": "fedbiscuit", "groups": 2, "warmup": 1, "regroup": 1,
                                        "choices": ["one", "two"]}, "rounds": 2},
          {"name": "policy", "judges": "judges", "method": "fed_dpo", "rounds": 2}]


@pytest.fixture
def staged(recipe, tmp_path):
    rows = [{"prompt": f"say the word {a} {b}", "chosen": f"{b} {a}", "rejected": f"{a} {b}"}
            for a in ("red", "green", "blue") for b in ("cat", "dog", "bird") for _ in range(4)]
    write(tmp_path / "pairs.jsonl", rows)
    data = {**recipe["data"], "task": "preference", "source": str(tmp_path / "pairs.jsonl")}
    return {**recipe, "name": "align", "data": data, "local": {"lr": 0.02, "steps": 1}, "clients": {},
            "space": {"name": "lora", "rank": 2}, "evaluate": {"samples": 0, "exact_match": False, "clients": False},
            "stages": json.loads(json.dumps(STAGES))}


def digests(root):
    return [s["state_digest"] for s in json.loads((root / "align" / "stages.json").read_text())["stages"]]


def test_a_recipe_of_stages_hands_its_judges_on_and_resumes_between(staged, tmp_path, monkeypatch):
    result = fedllm.run(staged, root=tmp_path / "whole")
    made = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    rooms = tmp_path / "whole" / "align" / "stages"
    assert made["method"]["judges"] == ["judges-0", "judges-1"] and made["method"]["choices"] == ["one", "two"]
    assert made["models"]["judges-1"]["space"] == {
        "name": "lora", "start_from": str(rooms / "judges" / "modules" / "judge-1")}
    assert "start_from" not in made["space"] and result.adapter_path.is_dir()  # it begins where the judges began
    there = load_file(rooms / "judges" / "modules" / "judge-1" / "adapter_model.safetensors")
    held = build(load_recipe(made)).world.models["judges-1"]
    assert held.task == "preference" and any(
        torch.equal(t, there[n]) and bool(t.any()) for n, t in held.initial().items() if "lora_B" in n)
    step, seen = Course.step, []

    def stopped(self, round):
        seen.append(round)
        if len(seen) == 4:  # within the policy's stage
            raise KeyboardInterrupt
        return step(self, round)

    monkeypatch.setattr(Course, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        fedllm.run(staged, root=tmp_path / "cut")
    monkeypatch.setattr(Course, "step", step)
    fedllm.resume(tmp_path / "cut" / "align")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_one_judge_is_what_its_stage_serves_and_may_see_sampled_answers(staged, tmp_path):
    staged["stages"][0] |= {"method": {"name": "fedbiscuit", "choices": ["one", "two"]}, "rounds": 1}
    staged["stages"][1] |= {"method": {"name": "fed_dpo", "answers": "sampled"}, "rounds": 1}
    result = fedllm.run(staged, root=tmp_path)
    made = yaml.safe_load((result.folder / "recipe.yaml").read_text())
    assert made["models"]["judges-0"]["space"]["start_from"].endswith("stages/judges/adapter")
    assert result.rounds == 1 and not result.skipped


def changed(at, **changes):
    return [{**stage, **(changes if i == at else {})} for i, stage in enumerate(STAGES)]


@pytest.mark.parametrize("stages, error, why", [
    (changed(1, judges="policy"), RecipeError, r"judges = 'policy': allowed are earlier stages: judges"),
    (changed(0, judges="policy"), RecipeError, r"stages\.judges\.judges = 'policy': .* there are none"),
    (changed(0, method="fedavg"), CompositionError, r"'fedavg' trains no judges .*; methods that do: fedbiscuit"),
    (changed(1, method="fedavg"), CompositionError, r"'fedavg' asks no judges; methods that do: fed_dpo"),
    (changed(0, rounds=1), CompositionError, r"has 1 rounds for 2 judges, .* allowed is rounds >= 2"),
    (changed(0, model="embedded"), CompositionError, r"judges are of model 'embedded' and this stage trains"),
    (changed(1, method={"name": "fed_dpo", "judges": ["x"]}), RecipeError, r"method\.judges: the stage 'judges' says"),
    (changed(1, start="judges"), CompositionError, "cannot begin with what stage 'judges' ends with"),
    ([{**STAGES[0], "method": {"name": "fedbiscuit", "choices": ["one", "two"]}}, {**STAGES[1], "start": "judges"}],
     CompositionError, "ends with: a judge of answers, which gives none; give judges: judges"),
    (changed(1, judges="", start="base", method={"name": "fed_dpo", "judges": ["nobody"]}), CompositionError,
     "asks for a model that the recipe does not have: 'nobody'"),
    (changed(1, judges="", start="base", method={"name": "fed_dpo", "answers": "sampled"}), RecipeError,
     "'sampled' is not allowed without method.judges")])
def test_judges_that_cannot_be_asked_are_refused_before_anything_runs(staged, tmp_path, stages, error, why):
    with pytest.raises(error, match=why):
        fedllm.run({**staged, "stages": stages}, root=tmp_path / "none")
    assert not (tmp_path / "none").exists()
