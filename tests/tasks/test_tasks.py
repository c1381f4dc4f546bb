"""Every task: from a file to a scored run, its figures against a plain reckoning, and rows that are refused."""

import json
import math

import numpy as np
import pytest
import torch

import fedllm
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.data.load import load_federation
from fedllm.data.sources import resolve
from fedllm.report.facts import falls, headline, is_share, number
from fedllm.tasks.registry import metrics, task_of, tasks
from fedllm.tasks.row import IGNORE
from fedllm.tasks.task import How
from fedllm.tasks.tokens import spans
from tests.conftest import WORDS, word_tokenizer

IDS = ("classification", "documents", "environment", "forecast", "generation", "image_text", "masked_words",
       "next_item", "pairs", "preference", "regression", "tokens")


def rows_of(task, count=48):
    """Rows that can be learned: what is asked for hangs on the color."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(count):
        color, animal = rng.choice(["red", "green", "blue"]), rng.choice(["cat", "dog", "bird"])
        text = f"the {color} {animal} is good"
        out.append({
            "generation": {"prompt": f"say {color} {animal}", "response": str(animal)},
            "classification": {"text": text, "label": str(color)},
            "tokens": {"tokens": text.split(), "tags": ["O", f"B-{color}", f"I-{color}", "O", "O"]},
            "masked_words": {"text": text},
            "regression": {"text": text, "target": {"red": -1.0, "green": 0.0, "blue": 2.0}[color]},
            "preference": {"prompt": text, "chosen": ("no", "yes")[color == "red"],
                           "rejected": ("yes", "no")[color == "red"]},
        }[task])
    return out


@pytest.fixture
def write(tmp_path):
    def make(rows, name="rows.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return str(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def tiny_masked_folder(tmp_path_factory):
    from transformers import BertConfig, BertForMaskedLM

    folder, tokenizer = tmp_path_factory.mktemp("tiny_masked"), word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                               num_attention_heads=4, max_position_embeddings=64, pad_token_id=0)
                    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_room_holds_these_tasks_and_an_unknown_one_is_refused():
    assert tuple(tasks()) == IDS
    with pytest.raises(RecipeError, match=r"data\.task = 'token' is unknown; did you mean 'tokens'\? Allowed: class"):
        task_of("token")


def test_metrics_know_which_way_is_better():
    assert list(metrics())[-1] == "loss" and {"exact_match", "entity_f1", "rmse"} < set(metrics())
    assert falls("rmse", {}) and falls("loss", {}) and not falls("entity_f1", {})
    assert is_share("entity_f1") and not is_share("rmse")
    assert headline({"loss": 1.0, "rmse": 2.0}, {}) == "rmse"
    assert headline({"loss": 1.0, "entity_f1": 0.5}, {}) == "entity_f1"
    assert (number(0.5, "entity_f1"), number(0.5, "rmse")) == ("50.0 %", "0.500")


@pytest.mark.parametrize("task, model, better", [
    ("tokens", "bert", "entity_f1"), ("regression", "bert", "rmse"), ("masked_words", "masked", "masked_accuracy"),
    ("preference", "llama", "preference_accuracy")])
def test_a_run_learns_and_reports_under_the_tasks_own_names(task, model, better, write, tmp_path, tiny_bert_folder,
                                                            tiny_masked_folder, tiny_llama_folder):
    folder = {"bert": tiny_bert_folder, "masked": tiny_masked_folder, "llama": tiny_llama_folder}[model]
    result = fedllm.run({
        "name": task, "model": folder, "rounds": 5, "local": {"lr": 0.02, "epochs": 2}, "space": "full",
        "data": {"source": write(rows_of(task)), "task": task, "test": 0.25, "client_test": 0.0,
                 "partition": {"kind": "iid", "clients": 3}}, "evaluate": {"samples": 0}}, root=tmp_path)
    before, after = result.evaluation["before"]["global"], result.evaluation["global"]
    assert set(tasks()[task].metrics) | {"loss", "n"} == set(after)
    assert after["loss"] < before["loss"]
    assert (after[better] < before[better]) if falls(better, {}) else (after[better] > before[better])
    assert f"global test, {better.replace('_', ' ')}" in result.report_path.read_text()
    assert result.adapter_path is not None


def test_spans_as_the_shared_task_counts_them():
    assert spans(["B-a", "I-a", "O", "B-a", "B-a"]) == {("a", 0, 2), ("a", 3, 4), ("a", 4, 5)}
    assert spans(["I-a", "I-b", "b"]) == {("a", 0, 1), ("b", 1, 3)} and spans(["O"]) == set()


def test_entity_f1_by_hand():
    labels = ("O", "B-a", "I-a", "B-b")
    # per row: loss, targets, hits, then (right, said, there) for a and for b
    figures = np.array([[1.0, 4, 3, 1, 2, 1, 0, 0, 1], [1.0, 4, 4, 1, 1, 1, 1, 1, 1]])
    got = task_of("tokens").measured(figures, labels)
    assert got["entity_f1"] == pytest.approx(2 * 3 / (4 + 4))  # right 3, said 4, there 4
    assert got["macro_f1"] == pytest.approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert got["tag_accuracy"] == 7 / 8


def test_rmse_and_mae_by_hand():
    figures = np.array([[4.0, 1, 0, 2.0], [0.0, 1, 0, 0.0]])
    assert task_of("regression").measured(figures, ()) == {"rmse": math.sqrt(2), "mae": 1.0}


def test_the_first_piece_of_a_word_has_its_tag():
    row = {"tokens": ["cat", "red"], "tags": [2, 1]}
    (encoded,) = task_of("tokens").encode([row], How(word_tokenizer()))
    assert encoded.labels.tolist() == [2, 1] and encoded.n_target == 2
    (cut,) = task_of("tokens").encode([{"tokens": WORDS[:5], "tags": [1] * 5}], How(word_tokenizer(), 3))
    assert cut.labels.tolist() == [1, 1, 1]


def test_hidden_words_are_the_same_at_every_reading():
    tokenizer = word_tokenizer()
    with pytest.raises(CompositionError, match="has no mask token"):
        task_of("masked_words").encode([{"text": "red"}], How(tokenizer))
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    rows = [{"text": " ".join(WORDS[:20])}, {"text": "red"}]
    one, other = (task_of("masked_words").encode(rows, How(tokenizer)) for _ in range(2))
    assert [e.ids.tolist() for e in one] == [e.ids.tolist() for e in other]
    assert [e.n_target for e in one] == [3, 1]
    at = one[0].labels != IGNORE
    assert one[0].labels[at].tolist() == np.array(tokenizer(rows[0]["text"])["input_ids"])[at].tolist()


def test_a_preference_has_both_responses_after_one_prompt():
    (row,) = task_of("preference").encode(
        [{"prompt": "say", "chosen": "cat dog", "rejected": "bird"}], How(word_tokenizer()))
    ids = word_tokenizer()("say cat dog bird")["input_ids"]
    assert row.ids.tolist() == [1, *ids[:3], 2] and row.parts["rejected_ids"].tolist() == [1, ids[0], ids[3], 2]
    assert row.parts["rejected_labels"].tolist() == [IGNORE, IGNORE, ids[3], 2]


@pytest.mark.parametrize("task, change, said", [
    ("tokens", {"tags": ["O"]}, r"rows\.jsonl, row 1 \(line 1\) has 5 tokens and 1 tags"),
    ("tokens", {"tags": None}, r"row 1 \(line 1\): 'tags' is None; it must be a list"),
    ("regression", {"target": "tall"}, r"row 1 \(line 1\): 'target' is 'tall'; it must be a finite number"),
    ("regression", {"target": float("nan")}, r"line 1: NaN is no JSON"),
    ("regression", {"target": True}, r"'target' is True"),
    ("preference", {"rejected": "yes", "chosen": "yes"}, r"'chosen' and 'rejected' are the same text"),
    ("preference", {"chosen": 3}, r"'chosen' is 3; it must be a string"),
    ("masked_words", {"text": None}, r"'text' is None; it must be a string"),
])
def test_rows_that_are_no_rows_of_the_task(task, change, said, write):
    rows = rows_of(task)
    source = write([rows[0] | change, *rows[1:]])
    with pytest.raises(DataError, match=said):
        load_federation({"source": source, "task": task}, 0)


@pytest.mark.parametrize("task", ["generation", "classification", "tokens", "masked_words", "regression",
                                  "preference"])
def test_a_column_that_is_not_there(task, write):
    column = task_of(task).columns[-1]
    source = write([{k: v for k, v in row.items() if k != column} for row in rows_of(task)])
    with pytest.raises(DataError, match=rf"row 1 \(line 1\) has no field '{column}'"):
        load_federation({"source": source, "task": task}, 0)


def test_unknown_tags_and_labels(write):
    with pytest.raises(DataError, match=r"row 1 .*'tags' is 'B-(red|green|blue)'; the labels are O, B-read"):
        load_federation({"source": write(rows_of("tokens")), "task": "tokens", "labels": ["O", "B-read"]}, 0)
    with pytest.raises(DataError, match=r"'label' is .*; the labels are rot, blau"):
        load_federation({"source": write(rows_of("classification")), "task": "classification",
                         "labels": ["rot", "blau"]}, 0)
    with pytest.raises(RecipeError, match=r"data\.labels = \['a'\] is of no use to data\.task = 'regression'"):
        load_federation({"source": write(rows_of("regression")), "task": "regression", "labels": ["a"]}, 0)


def test_labels_by_name_here_and_by_number_there(write):
    source = write([{"text": "a", "label": "calm"}, {"text": "b", "label": 1}])
    with pytest.raises(DataError, match=r"'label' is one of the names calm, urgent in .*row 1 .* a number in .*2"):
        load_federation({"source": source, "task": "classification", "labels": ["calm", "urgent"]}, 0)


def test_a_masked_model_has_no_place_for_virtual_tokens(tiny_masked_folder, write, tmp_path):
    with pytest.raises(CompositionError, match=r"'soft_prompt' puts virtual tokens before the text, and data\.task"):
        fedllm.run({"model": tiny_masked_folder, "space": "soft_prompt", "data": {
            "source": write(rows_of("masked_words")), "task": "masked_words"}}, root=tmp_path)


@pytest.mark.shared
def test_real_entities_load_with_their_tags():
    try:
        source = str(resolve("shared:wnut17_train.jsonl"))
    except DataError as error:
        pytest.skip(str(error))
    found = load_federation({"source": source, "task": "tokens", "limit": 300}, 0)
    assert found.labels[0] == "O" and found.labels[1:3] == ("B-corporation", "I-corporation")
    assert len(found.labels) == 13 and all(len(r["tokens"]) == len(r["tags"]) for r in found.test)


def test_rooms_that_know_texts_and_classes_alone_refuse_other_tasks(write, tmp_path, tiny_bert_folder):
    data = {"source": write(rows_of("tokens")), "task": "tokens", "partition": {"kind": "iid", "clients": 3}}
    recipe = {"name": "tagged", "model": tiny_bert_folder, "rounds": 1, "space": "head", "data": data}
    with pytest.raises(CompositionError, match=r"'att_label_flip' and data\.task = 'tokens' do not fit together"):
        fedllm.run({**recipe, "layers": [{"name": "att_label_flip", "clients": 1}]}, root=tmp_path)
    with pytest.raises(RecipeError, match=r"data\.canaries = 2 and data\.task = 'tokens'"):
        fedllm.run({**recipe, "data": {**data, "canaries": 2}}, root=tmp_path)
    with pytest.raises(CompositionError, match=r"'fedner_tagset' completes tags|'zoopfl' and data\.task = 'tokens'"):
        fedllm.run({**recipe, "method": "zoopfl"}, root=tmp_path)
