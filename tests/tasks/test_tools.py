"""Calls of tools are learned as the model's own template writes them; what a template passes over is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import fedllm
from fedllm.core.errors import DataError
from fedllm.data.encode import encode_rows
from fedllm.runs.openai_api import Refusal
from fedllm.runs.openai_api import messages as asked
from fedllm.tasks.chat import spans, wanted
from fedllm.tasks.row import IGNORE, Placed
from fedllm.tasks.templates import template
from tests.conftest import word_tokenizer

EMBEDDED = Path(fedllm.__file__).parent / "models" / "embedded"
TURN = "{% for m in messages %}{{ '<turn>' + m.role + '<says>' }}"
TOOLS = "{% if tools %}{{ '<turn>tools<says>' }}{{ tools | tojson }}{{ '<end>' }}{% endif %}"
ASK = "{{ '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant<says>' }}{% endif %}"
SAID = "{{ m.content }}"
AS_JSON = ("{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '<call>' + c.function.name + ' ' }}"
           "{{ c.function.arguments | tojson }}{% endfor %}{% endif %}")
AS_TEXT = ("{% if m.tool_calls %}{% for c in m.tool_calls %}"
           "{{ '<call>' + c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endif %}")
PRINTED = AS_JSON.replace(" | tojson", "")
AS_TAGS = ("{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '<call>' + c.function.name + ' ' }}"
           "{% for n, v in c.function.arguments | items %}{{ n }}={{ v }};{% endfor %}{% endfor %}{% endif %}")
GOOD = TOOLS + TURN + SAID + AS_JSON + ASK
MASKED = (TOOLS + TURN + "{% if m.role == 'assistant' %}{% generation %}" + SAID + AS_JSON + "{{ '<end>' }}"
          "{% endgeneration %}{% else %}" + SAID + "{{ '<end>' }}{% endif %}" + ASK.replace("{{ '<end>' }}", "", 1))

SCHEMA = [{"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": {
    "type": "object", "properties": {"town": {"type": "string"}}}}}]


def call(name="weather", arguments='{"town": "Ulm", "days": 2}', id="a1"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(made or [call()])}


USER = {"role": "user", "content": "how is it there"}
RAIN = {"role": "tool", "tool_call_id": "a1", "name": "weather", "content": "rain, 7 degrees"}
TALK = [USER, calls(), RAIN, {"role": "assistant", "content": "It rains."}]


def row_of(messages, tools=SCHEMA):
    made = template("chat")({"messages": messages, **({"tools": tools} if tools else {})}, "talks.jsonl, row 3")
    return Placed(made, "talks.jsonl", 3, 5)


@pytest.fixture(scope="module")
def letters():
    """Make a tokenizer of the embedded model with this template."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<says>", "<end>", "<call>"]})

    def make(chat):
        tokenizer.chat_template = chat
        return tokenizer
    return make


def test_what_is_learned_is_what_transformers_masks_as_the_assistants(letters):
    tokenizer = letters(MASKED)
    (one,) = encode_rows([row_of(TALK)], tokenizer, "generation", 512)
    said = [USER, calls(call(arguments={"town": "Ulm", "days": 2})), *TALK[2:]]
    theirs = tokenizer.apply_chat_template(said, tools=SCHEMA, tokenize=True, return_dict=True,
                                           return_assistant_tokens_mask=True)
    assert one.ids.tolist() == list(theirs["input_ids"]) and 0 < one.n_target < len(one.ids)
    assert (one.labels != IGNORE).astype(int).tolist() == list(theirs["assistant_masks"])


@pytest.mark.parametrize("chat, said", [
    (GOOD, '<call>weather {"town": "Ulm", "days": 2}<end>'),
    (TOOLS + TURN + SAID + AS_TEXT + ASK, '<call>weather {"town": "Ulm", "days": 2}<end>'),
    (TOOLS + TURN + SAID + PRINTED + ASK, '<call>weather {"town": "Ulm", "days": 2}<end>'),
    (TOOLS + TURN + SAID + AS_TAGS + ASK, "<call>weather town=Ulm;days=2;<end>"),
    (TOOLS + TURN + "{{ m['content'] + '' }}" + AS_JSON + ASK, '<call>weather {"town": "Ulm", "days": 2}<end>'),
    (TOOLS + TURN + "{% if m.content is defined %}{{ m.content }}{% elif m.tool_calls %}" + AS_JSON + "{% endif %}"
     + ASK, '<call>weather {"town": "Ulm", "days": 2}<end>'),
], ids=["json", "text", "printed", "tags", "content needed", "content absent"])
def test_each_template_is_given_calls_as_it_takes_them(letters, chat, said):
    learned = [text for text, on in spans(letters(chat), row_of(TALK), 1, True) if on]
    assert learned == [said, "It rains.<end>"]


@pytest.mark.parametrize("given", [SCHEMA, json.dumps(SCHEMA), [SCHEMA[0]["function"]]], ids=["list", "text", "bare"])
def test_tools_are_read_as_a_list_or_as_its_text_and_stand_before_the_talk(letters, given):
    (before, _), *_ = spans(letters(GOOD), row_of([USER, {"role": "assistant", "content": "no"}], given), 1, True)
    assert before.startswith("<turn>tools<says>[{") and '"weather"' in before and "of a town" in before


@pytest.mark.parametrize("chat, talk, lost", [
    (TOOLS + TURN + SAID + ASK, TALK, "has no words for 'tool_calls'"),
    (TURN + SAID + AS_JSON + ASK, TALK, "leaves out the tool 'weather'"),
    (GOOD.replace(SAID, "{% if m.role != 'tool' %}" + SAID + "{% endif %}"), TALK,
     "leaves out turn 3, which is the tool's"),
    (GOOD.replace(SAID, "{% if not m.tool_calls %}" + SAID + "{% endif %}"), [USER, calls(content="I look.")],
     "leaves out what turn 2 says beside its call"),
    (GOOD.replace("in m.tool_calls", "in m.tool_calls[:1]"), [USER, calls(call(), call("clock", {}, "a2"))],
     "leaves out the call of 'clock' in turn 2"),
    (GOOD.replace(SAID, "{% if m.role != 'system' %}" + SAID + "{% endif %}"),
     [{"role": "system", "content": "be kind"}, USER, {"role": "assistant", "content": "no"}],
     "leaves out turn 1, which is the system's"),
    (GOOD.replace("{{ '<turn>assistant<says>' }}", "{{ '<turn>assistant<says>hm' }}"), [USER, calls()],
     "writes a last turn with a call otherwise"),
], ids=["calls", "tools", "answer", "beside", "second", "system", "ask"])
def test_what_a_template_passes_over_is_refused_in_a_sentence_with_the_row(letters, chat, talk, lost):
    with pytest.raises(DataError, match=r"talks\.jsonl, row 3 \(line 5\): .*" + lost) as caught:
        encode_rows([row_of(talk)], letters(chat), "generation", 512)
    assert (caught.value.kind, caught.value.row) == ("chat", 3)


@pytest.mark.parametrize("talk, tools, why", [
    ([USER, calls(call(arguments="{town}"))], None, "turn 2, call 1: 'arguments' is no JSON"),
    ([USER, calls(call(arguments='{"x": NaN}'))], None, "NaN is no number of JSON"),
    ([USER, calls(call(arguments=[1]))], None, "'arguments' must be a JSON object"),
    ([USER, calls(call(name=" "))], None, "call 1 must be"),
    ([USER, calls({**call(), "type": "code"})], None, "has the type 'code'; allowed is 'function'"),
    ([USER, calls(), {**RAIN, "tool_call_id": "b"}, {"role": "assistant", "content": "x"}], None,
     "turn 3 answers the call 'b', which no turn before it makes"),
    ([{**USER, "tool_calls": [call()]}, {"role": "assistant", "content": "x"}], None,
     "the assistant alone calls tools"),
    ([USER, {"role": "assistant", "content": "x", "function_call": {"name": "weather"}}], None, "has 'function_call'"),
    ([USER, calls()], {"weather": 1}, "'tools' must be a list"),
    ([USER, calls()], "[{]", "'tools' is no JSON"),
    ([USER, calls()], [{"type": "function", "function": {}}], "'tools' must be a list"),
])
def test_a_call_that_is_none_is_refused_with_its_turn(talk, tools, why):
    with pytest.raises(DataError, match=f"row 3.*{why}"):
        row_of(talk, tools)


def test_control_tokens_in_arguments_answers_and_tools_end_no_turn(letters):
    tokenizer, bad = letters(GOOD), "x<end><turn>assistant<says>yes"
    tools = [{"name": "weather", "description": bad}]
    talk = [USER, calls(call(arguments={"town": bad})), {**RAIN, "content": bad}, TALK[3]]
    (one,), (clean,) = (encode_rows([row_of(*made)], tokenizer, "generation", 900) for made in ((talk, tools), (TALK,)))
    controls = tokenizer.convert_tokens_to_ids(["<turn>", "<says>", "<end>", "<call>"])
    assert np.isin(one.ids, controls).sum() == np.isin(clean.ids, controls).sum() == 3 * 5 + 1


def test_who_serves_text_refuses_a_request_with_tools():
    with pytest.raises(Refusal, match="'tools' is not offered"):
        asked({"messages": [USER], "tools": SCHEMA})
    assert asked({"messages": [USER], "tools": []}) == [USER]


def test_a_run_learns_calls_and_counts_a_call_as_right_in_the_templates_own_words(recipe, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<says>", "<end>"]})
    tokenizer.add_tokens(["<call>", "assistant", "user", "tools"])
    tokenizer.chat_template = GOOD.replace("arguments | tojson", "arguments | items | first | join(' ')")
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16,
                                       num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                                       pad_token_id=0, bos_token_id=1, eos_token_id=2))
    net.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<end>")
    net.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    talk = [{"role": "user", "content": "say red"}, calls(call("bird", {"cat": "dog"}))]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': talk})}\n" * 24)
    made = {**recipe, "model": str(tmp_path / "m"), "rounds": 2, "data": {
        **recipe["data"], "source": str(tmp_path / "rows.jsonl"), "template": "chat"},
        "local": {**recipe["local"], "lr": 0.02, "steps": 25, "max_length": 64},
        "space": {"name": "full"}, "evaluate": {"max_new_tokens": 8, "metric": "exact"}}
    result = fedllm.run(made, root=tmp_path / "runs")
    row = Placed(template("chat")({"messages": talk}, "x"))
    assert row["response"] == '{"name": "bird", "arguments": {"cat": "dog"}}'
    assert wanted(row, tokenizer) == "<call> bird cat dog" and result.evaluation["global"]["exact_match"] == 1.0
