"""The embedded model: it loads like any transformers folder, it is small, and it can copy."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import fedllm.models
from fedllm.data.office import ANSWER_MARK, TASK_MARK, office_federation, pretraining_rows
from fedllm.models import pretrain
from fedllm.models.examine import examine

FOLDER = Path(fedllm.models.__file__).parent / "embedded"
HELD_OUT_SEED = 987_654_321  # pre-training uses seeds seed * 1_000_000 + chunk, far below this


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def held_out():
    return list(pretraining_rows(400, HELD_OUT_SEED))


def encode(tokenizer, row):
    prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["response"])["input_ids"]
    return [tokenizer.bos_token_id, *prompt], [*answer, tokenizer.eos_token_id]


@torch.no_grad()
def exact(model, tokenizer, rows):
    """Whether each whole answer is the greedy one, by teacher forcing (the same verdict as decoding)."""
    verdicts = []
    for row in rows:
        prompt, answer = encode(tokenizer, row)
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        verdicts.append(logits.argmax(-1).tolist() == answer)
    return sum(verdicts) / len(verdicts)


@torch.no_grad()
def perplexity(model, tokenizer, rows):
    loss, count = 0.0, 0
    for row in rows:
        prompt, answer = encode(tokenizer, row)
        ids = torch.tensor(prompt + answer)
        logits = model(input_ids=ids[None]).logits[0]
        loss += float(functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(loss / count)


def test_the_folder_is_an_ordinary_small_model(model):
    files = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12 * 2**20
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_tokenizer_keeps_text_and_marks(tokenizer, model):
    text = f"{TASK_MARK}Give the reference.\nNaïve order 4071, 15€{ANSWER_MARK}"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("4071")["input_ids"]) == 4
    assert len(tokenizer(TASK_MARK)["input_ids"]) == len(tokenizer(ANSWER_MARK)["input_ids"]) == 1
    assert len(tokenizer) == model.config.vocab_size
    specials = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert specials == (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)


def test_sequences_are_short(tokenizer, held_out):
    routing = office_federation(rows=20).pooled()
    assert max(sum(map(len, encode(tokenizer, row))) for row in [*held_out, *routing]) <= 160


def test_held_out_text_is_far_likelier_than_to_an_untrained_model(model, tokenizer, held_out):
    rows = held_out[:60]
    untrained = pretrain.build_model(seed=1).eval()
    assert perplexity(model, tokenizer, rows) < perplexity(untrained, tokenizer, rows) / 50


def test_fields_are_copied_out_of_held_out_records(model, tokenizer, held_out):
    rows = [row for row in held_out if row["category"] in {"read_one", "prefixed"}]
    assert len(rows) > 100
    # Measured 0.95 (docs/results/embedded.json); firms fall short.
    assert exact(model, tokenizer, rows) >= 0.9
    references = [row for row in rows if row["response"].isdigit()]
    assert len(references) > 30 and exact(model, tokenizer, references) >= 0.95


def test_the_examination_says_what_greedy_answers_say(model, tokenizer):
    found = examine(FOLDER, rows=60)
    rows = [row for row in pretraining_rows(60, 987_654) if row["category"] == "read_one"]
    assert found["parameters"] == model.num_parameters() and found["tasks"]["read_one"]["rows"] == len(rows)
    assert found["tasks"]["read_one"]["exact_match"] == round(exact(model, tokenizer, rows), 3)


def test_kinds_are_named(model, tokenizer, held_out):
    assert exact(model, tokenizer, [row for row in held_out if row["category"] == "name_kind"]) >= 0.9


def test_generation_gives_the_copied_reference(model, tokenizer):
    record = "Order ref 5182: Nora Frost of Graz wants to buy lamps for 70 euros."
    prompt = f"{TASK_MARK}Give the reference.\n{record}{ANSWER_MARK}"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    answer = model.generate(ids)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "5182"


def test_the_base_does_not_know_the_routing_slip(model, tokenizer):
    assert exact(model, tokenizer, office_federation(rows=10, test_rows=96).test) < 0.2


def test_the_recipe_is_deterministic_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CHUNK_BATCHES", 4)
    for name in ("first", "again"):
        pretrain.pretrain(tmp_path / name, minutes=1, seed=0, steps=2, start=FOLDER)
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "again"))
    pairs = zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
