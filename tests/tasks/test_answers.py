"""Metrics against values worked out by hand, in a run, and at sites that judge their own rows."""

import json

import pytest
import torch

import fedllm
from fedllm.core.errors import DataError, RecipeError
from fedllm.models.load import load_model
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe
from fedllm.spaces.registry import make_space
from fedllm.tasks.answers import judge_of, judges_of, listed
from fedllm.tasks.choices import options
from fedllm.tasks.registry import task_of
from fedllm.tasks.task import Shape
from fedllm.tasks.templates import template

TOLD = "#### 72"


@pytest.mark.parametrize("said, wanted, right", [
    ("48 / 2 = 24, 48 + 24 = 72\n#### 72", TOLD, 1), ("#### 72\n\nQuestion: Ann has 7 apples", TOLD, 1),
    ("so it is 72.", TOLD, 1), ("7 and 2", TOLD, 0), ("#### 1,072", "#### 1072.0", 1), ("it costs $1,072", "1072", 1),
    ("9-5 is 4", "4", 1), ("-4", "4", 0), ("#### none, or 5", "5", 1), ("####", "5", 0), ("", "5", 0), ("no", "no", 1)])
def test_a_number_is_what_stands_behind_the_mark_or_last(said, wanted, right):
    assert judge_of("last_number")[1](said, wanted) == right


@pytest.mark.parametrize("said, wanted, f", [
    # LCS "the cat sat" of 3 and 4 words: recall 3/3, precision 3/4
    ("the cat sat down", "The cat sat.", 6 / 7), ("", "a b", 0.0), ("b a", "a b", 0.5),
    ("\u0434\u0430 \u043d\u0435\u0442", "\u043d\u0435\u0442", 2 / 3)])
def test_rouge_is_the_longest_common_subsequence_of_words(said, wanted, f):
    name, rouge = judge_of("rouge")
    assert name == "rouge_l" and rouge(said, wanted) == pytest.approx(f, abs=1e-12)


def test_a_list_of_metrics_and_what_is_refused():
    assert list(judges_of(["exact", "last_number", "rouge"])) == ["exact_match", "last_number", "rouge_l"]
    assert listed("call:no_module:x") == ["call:no_module:x"]  # nothing is imported before it may be
    for wrong in ("bleu", [], ["exact", "exact"], ["call:operator:eq", "call:operator:ne"], "call:operator", "call::x"):
        with pytest.raises(RecipeError, match=r"evaluate\.metric"):
            load_recipe({"evaluate": {"metric": wrong}})
    with pytest.raises(RecipeError, match="cannot be loaded"):
        build(load_recipe({"evaluate": {"metric": "call:no_module:x"}}))


def shaped(row, spec=None):
    return task_of("generation").shape(row, "row 1", Shape(template(spec)))


def test_options_are_written_as_the_template_writes_an_answer():
    row = shaped({"question": "q", "answer": "red", "choices": ["red", "blue"]}, "question_answer")
    assert row["response"] == " red" and row["choices"] == [" red", " blue"]
    (many, right), = options([row])
    assert [r["response"] for r in many] == [" red", " blue"] and right == 0
    talk = shaped({"prompt": "q", "response": "B", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}}, "chat")
    (many, right), = options([talk])
    assert right == 1 and [r["messages"][-1]["content"] for r in many] == ["red", "blue"]
    assert "choices" not in shaped({"prompt": "q", "response": "a", "choices": "red or blue"})
    with pytest.raises(DataError, match="two texts or more"):
        shaped({"prompt": "q", "response": "a", "choices": ["one"]})
    with pytest.raises(DataError, match="none of its 2 choices"):
        options([shaped({"prompt": "q", "response": "D", "choices": ["red", "blue"]})])
    with pytest.raises(DataError, match="in all rows or in none"):
        options([row, {"prompt": "q", "response": "a"}])


@pytest.fixture
def asked(tiny_llama_folder, tmp_path):
    """Twelve questions with three options each, as a recipe."""
    colors = ["red", "green", "blue"]
    rows = [{"prompt": f"say the word {colors[i % 3]}", "response": colors[i % 2],
             "choices": [colors[i % 2], *[c for c in colors if c != colors[i % 2]]]} for i in range(40)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"name": "asked", "model": tiny_llama_folder, "rounds": 0, "local": {"lr": 0.02, "steps": 1},
            "data": {"source": str(tmp_path / "asked.jsonl"), "partition": {"kind": "iid", "clients": 2}, "test": 0.3,
                     "client_test": 0.2},
            "evaluate": {"max_new_tokens": 2, "samples": 1, "metric": ["choice", "exact", "rouge"]}}


def by_hand(folder, rows):
    """The share of rows whose first option is the likeliest, by plain transformers."""
    model = load_model(folder, "generation", make_space("lora"))
    net, tokenizer, right = model.net, model.tokenizer, 0
    for row in rows:
        scores = []
        for option in row["choices"]:
            a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (row["prompt"], option))
            ids = torch.tensor([[*a, *b, tokenizer.eos_token_id]])
            with torch.no_grad(), model.using([model.initial()]):
                logp = net(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[at - 1, ids[0, at]]) for at in range(len(a), ids.shape[1])))
        right += max(range(3), key=scores.__getitem__) == row["choices"].index(row["response"])
    return right / len(rows)


def test_every_metric_stands_in_the_record_and_an_untrained_model_is_tested_once(asked, tiny_llama_folder, tmp_path):
    result = fedllm.run(asked, root=tmp_path)
    want = by_hand(tiny_llama_folder, build(load_recipe(asked)).world.federation.test)
    got = result.evaluation["global"]
    assert got["choice_likelihood"] == pytest.approx(want) and 0 < want < 1
    assert {"choice", "exact_match", "rouge_l"} <= got.keys()
    assert all({"choice_likelihood", "rouge_l"} <= c.keys() for c in result.evaluation["clients"].values())
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    assert [e["round"] for e in events if e["kind"] == "evaluation"] == [0]
    assert result.evaluation["before"]["global"] == got
    assert "choice likelihood" in result.report_path.read_text()
