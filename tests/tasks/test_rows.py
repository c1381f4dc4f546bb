"""Rows as people have them: several columns in one text, preferences as conversations, labels as TRL makes them."""

import json

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from fedllm.core.errors import DataError, RecipeError
from fedllm.data.encode import encode_rows
from fedllm.data.load import load_federation
from fedllm.data.section import DataSpec
from fedllm.models.load import resolve
from fedllm.runs.recipe import load_recipe
from fedllm.tasks.row import IGNORE
from fedllm.tasks.templates import template
from tests.conftest import word_tokenizer
from tests.tasks.test_chat import said, talker, turns


def file_of(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def loaded(tmp_path, rows, **spec):
    spec = {"source": file_of(tmp_path, rows), "test": 0.0, "client_test": 0.0,
            "partition": {"kind": "iid", "clients": 1}, **spec}
    (shard,) = load_federation(spec, 0).clients.values()
    return sorted(shard.train, key=lambda r: r.row)


def test_several_columns_are_one_text(tmp_path):
    rows = [{"instruction": "say", "input": i, "output": o} for i, o in (("red", "cat"), (" ", "a"), (None, 3))]
    fields = {"prompt": ["instruction", "input"], "response": "output"}
    assert [(r["prompt"], r["response"]) for r in loaded(tmp_path, rows, fields=fields)] == [
        ("say\n\nred", "cat"), ("say", "a"), ("say", "3")]
    (one, *_) = loaded(tmp_path, rows, fields=fields, template="chat")
    assert one["messages"] == turns("say\n\nred", "cat")
    with pytest.raises(DataError, match=r"row 1 .*has no field 'inputs'.*did you mean 'input'"):
        loaded(tmp_path, rows, fields={"prompt": ["instruction", "inputs"], "response": "output"})
    with pytest.raises(ValidationError, match=r"data\.fields\.label = \['a', 'b'\]: several columns"):
        DataSpec(fields={"label": ["a", "b"]}, task="classification")
    with pytest.raises(RecipeError, match=r"data\.fields"):
        load_recipe({"data": {"fields": {"prompt": []}}})


@pytest.mark.parametrize("talk, why", [
    ([{"role": "system", "content": "say"}, {"role": "assistant", "content": "cat"}], "no turn of the user"),
    ([*turns("red", "cat"), {"role": "assistant", "content": "dog"}], "turns 2 and 3 are both the assistant's"),
    ([*turns("red"), {"role": "system", "content": "say"}, {"role": "assistant", "content": "cat"}],
     "turn 2 is the system's; it can only come first"),
    ([*turns("red"), {"role": "asistant", "content": "cat"}, *turns("blue", "dog")], "turn 2: the role is 'asistant'"),
    (turns("red", "cat", "blue", " "), "the last turn .* is empty"),
    (turns("red"), "must hold two turns or more"),
])
@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_turns_that_nobody_can_have_said_are_told_with_file_and_row(tmp_path, talk, why, shape):
    if shape == "conversations":
        talk = [{"from": t["role"], "value": t["content"]} for t in talk]
    good = {shape: turns("red", "cat")}
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 2 \(line 2\): '{shape}'.*{why}|row 2.*{why}") as caught:
        loaded(tmp_path, [good, {shape: talk}], template="chat")
    assert caught.value.row == 2 and caught.value.file.endswith("rows.jsonl")


PREFERRED = {
    "texts": {"prompt": "red", "chosen": "cat", "rejected": "dog"},
    "last turns": {"prompt": turns("red"), "chosen": turns("", "cat")[1:], "rejected": turns("", "dog")[1:]},
    "whole talks": {"chosen": turns("red", "cat"), "rejected": turns("red", "dog")},
    "text and turns": {"prompt": "red", "chosen": turns("", "cat")[1:], "rejected": turns("", "dog")[1:]},
    "sharegpt": {"chosen": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "cat"}],
                 "rejected": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "dog"}]},
}


@pytest.mark.parametrize("shape", PREFERRED)
def test_preferences_of_every_shape_are_the_same_conversations(tmp_path, shape):
    (row,) = loaded(tmp_path, [PREFERRED[shape]], task="preference", template="chat")
    tokenizer = talker()
    (one,) = encode_rows([row], tokenizer, "preference", 64)
    whole = tokenizer.decode(one.ids)
    assert whole == "<turn> user red <end> <turn> assistant cat <end>" and said(tokenizer, one) == "cat <end>"
    other = one.parts["rejected_labels"]
    assert tokenizer.decode([int(i) for i in other if i != IGNORE]) == "dog <end>"


@pytest.mark.parametrize("row, why", [
    ({"chosen": turns("red", "cat"), "rejected": turns("blue", "dog")}, "differ before their last turn"),
    ({"chosen": turns("red", "cat"), "rejected": turns("red", "cat")}, "are the same"),
    ({"prompt": "red", "chosen": "cat", "rejected": turns("red")}, "end with the role 'assistant'"),
])
def test_preferences_that_are_none_are_refused(tmp_path, row, why):
    with pytest.raises(DataError, match=rf"row 1.*{why}"):
        loaded(tmp_path, [row], task="preference", template="chat")


def test_preferences_as_turns_need_the_chat_template(tmp_path):
    with pytest.raises(DataError, match=r"'chosen' is a list of turns; data\.template = 'chat' reads those"):
        loaded(tmp_path, [PREFERRED["whole talks"] | {"prompt": "red"}], task="preference")


def trl(tokenizer, prompt, whole):
    """Ids and labels by TRL's rule (1.16, checked against its trainer): the completion begins where the tokens of the
    prompt and of prompt and completion part."""
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = next((i for i, (a, b) in enumerate(zip(asked, ids, strict=False)) if a != b), len(asked))
    return ids, [IGNORE] * start + ids[start:]


@pytest.mark.parametrize("make", [lambda: AutoTokenizer.from_pretrained(resolve("embedded")), word_tokenizer])
def test_labels_of_prompt_and_completion_are_trls(make):
    tokenizer = make()
    tokenizer.pad_token = tokenizer.eos_token  # the end is learned all the same
    pairs = [("Note of the ward:\n", "It is red and late."), ("say the word\n", "no"), ("", "yes")]
    ours = encode_rows([{"prompt": p, "response": r} for p, r in pairs], tokenizer, "generation", 64)
    bos = tokenizer.bos_token_id
    for (prompt, response), one in zip(pairs, ours, strict=True):
        ids, labels = trl(tokenizer, prompt, prompt + response + tokenizer.eos_token)
        assert one.ids.tolist() == [bos, *ids] and one.labels.tolist() == [IGNORE, *labels]
        assert one.labels[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_labels_of_conversations_are_trls():
    tokenizer = talker()
    talk = turns("red", "cat", "blue", "bird", system="say")
    rows = [template("chat")({"messages": talk}, "x")]
    (last,) = encode_rows(rows, tokenizer, "generation", 64, every_turn=False)
    texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=ask)
             for t, ask in ((talk[:-1], True), (talk, False))]
    ids, labels = trl(tokenizer, *texts)
    assert last.ids.tolist() == ids and last.labels.tolist() == labels
