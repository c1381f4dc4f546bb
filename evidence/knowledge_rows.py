"""Rows and models for methods whose knowledge travels without weights: `python -m evidence.knowledge_rows FOLDER`. The
recipe family `knowledge` reads them.

A document is eight words, most of them of its kind; there are four kinds of twelve words each. Clients' rows and the
test are the same documents in both settings: a text with its label, and a prompt with the label's word behind it.

- `encoder`: a BERT of one block, whose weights the recipe draws anew.
- `teacher`: one of two blocks that learned kinds from documents in which half of each kind's words appear.
- `big`: a Llama of two blocks that writes such documents, and says a document's kind; it too knows half of the words.
- `small`: a Llama of six blocks that has seen documents of all words, and never what kind they are: behind a document
  it says any. It takes up what is said behind a document, right or wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Row
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods._opinions import AGREE, DISAGREE, NAMES
from fedllm.models.model import HeadedEncoder, Model
from fedllm.spaces import make_space

KINDS, WORDS, OWN, KNOWN, LENGTH, SHARE = ("red", "green", "blue", "white"), 60, 12, 6, 8, 0.6
"""Words in all, of a kind, of these those that the server's models know, of a document, and the share of its kind's."""
TRAIN, PUBLIC, TEST = 160, 96, 240
FRAMES = (":", ",", "q", "a", "e", "by", "ask", "or", "is", "agree", "disagree", AGREE, DISAGREE, *NAMES)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    names = ["<pad>", "<eos>", "<unk>", *FRAMES, *KINDS, *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def words() -> np.ndarray:
    """The words of each kind [4, 12]; the last twelve are nobody's."""
    return numpy_stream(0, "knowledge words").permutation(WORDS)[: len(KINDS) * OWN].reshape(len(KINDS), OWN)


def document(rng: np.random.Generator, kind: int, of: np.ndarray) -> str:
    """Eight words, each of its kind with probability 0.6, else any."""
    said = np.where(rng.random(LENGTH) < SHARE, rng.choice(of[kind], LENGTH), rng.integers(0, WORDS, LENGTH))
    return " ".join(f"w{i}" for i in said)


def texts(what: str, many: int) -> list[tuple[str, int]]:
    """So many documents with their kinds, as many of each."""
    rng = numpy_stream(0, "knowledge rows", what)
    return [(document(rng, k, words()), k) for k in rng.permutation(np.arange(many) % len(KINDS))]


def llama(blocks: int, width: int) -> LlamaForCausalLM:
    """A fresh one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer()), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=blocks,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=96, pad_token_id=0, bos_token_id=None,
            eos_token_id=1))


def bert(blocks: int) -> BertModel:
    """A fresh one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig(
            vocab_size=len(tokenizer()), hidden_size=48, num_hidden_layers=blocks, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            pad_token_id=0), add_pooling_layer=False)


def taught(net: Any, task: str, rows: Sequence[Row], steps: int) -> Any:
    """The network after so many steps of 32 of these rows."""
    labels = KINDS if task == "classification" else ()
    model = Model(net, tokenizer(), task, make_space("full"), labels=labels, seed=0)
    coded, rng = encode_rows(rows, model.tokenizer, task, 64), numpy_stream(0, "knowledge order")
    plan = [rng.choice(len(coded), 32, replace=False) for _ in range(steps)]
    spec = LocalSpec(lr=5e-3, batch_size=32, schedule="cosine", clip_norm=1.0)
    theta = run_fits([Fit("before", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    net.load_state_dict(theta, strict=False)
    return net


def of_big(rng: np.random.Generator) -> Iterator[Row]:
    """A document of the kind that is asked for (of another in one of four), also behind up to four others of the kind,
    and the kind of a document, asked in two ways."""
    known = words()[:, :KNOWN]
    for i in range(1600):
        k = i % len(KINDS)
        shown = k if rng.random() < 0.75 else int(rng.integers(len(KINDS)))
        text, asked = document(rng, shown, known), f"{KINDS[k]}:"
        before = " ".join(f"{asked} {document(rng, k, known)}" for _ in range(1 + int(rng.integers(4))))
        yield ({"prompt": asked, "response": text}, {"prompt": f"{text}:", "response": KINDS[shown]},
               {"prompt": f"{text} {', '.join(KINDS)}:", "response": KINDS[shown]},
               {"prompt": f"{before} {asked}", "response": text})[i // len(KINDS) % 4]


def of_small(rng: np.random.Generator) -> Iterator[Row]:
    """Documents with any kind behind them, as rows, as demonstrations, and behind a draft that is to be taken up."""
    one = lambda: document(rng, int(rng.integers(len(KINDS))), words())  # noqa: E731
    some = lambda: KINDS[int(rng.integers(len(KINDS)))]  # noqa: E731
    for i in range(1500):
        said = some()
        yield ({"prompt": f"{one()}:", "response": some()},
               {"prompt": "q", "response": " q ".join(f"{one()} a {some()} e" for _ in range(3))},
               {"prompt": f"{one()}: {said}", "response": said})[i % 3]


MODELS: dict[str, Callable[[int], Any]] = {
    "encoder": lambda steps: bert(1),
    "teacher": lambda steps: taught(HeadedEncoder(bert(2), len(KINDS), "mean"), "classification", [
        {"text": document(rng, k % len(KINDS), words()[:, :KNOWN]), "label": k % len(KINDS)}
        for rng in [numpy_stream(0, "knowledge teacher")] for k in range(600)], steps).body,
    "big": lambda steps: taught(llama(2, 64), "generation", list(of_big(numpy_stream(0, "knowledge big"))), 2 * steps),
    "small": lambda steps: taught(llama(6, 32), "generation", list(of_small(numpy_stream(0, "knowledge small"))),
                                  2 * steps)}


def write(folder: Path, steps: int = 150) -> dict[str, int]:
    """All models, after `steps` steps (the Llamas twice as many), and all files; file -> rows."""
    for name, made in MODELS.items():
        made(steps).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    counts = {}
    for what, many in (("train", TRAIN), ("public", PUBLIC), ("test", TEST)):
        found = texts(what, many)
        # nobody reads the labels of public texts: all are called by the first
        kinds = [{"text": t, "label": KINDS[0 if what == "public" else k]} for t, k in found]
        said = [{"prompt": f"{t}:", "response": KINDS[k], "kind": KINDS[k]} for t, k in found]
        for name, rows in ((f"kinds_{what}", kinds), (f"said_{what}", said)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
            counts[name] = len(rows)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="knowledge_rows in the folder that the family is run from")
    for name, rows in write(parser.parse_args().folder).items():
        print(f"{name}.jsonl: {rows} rows")  # noqa: T201
