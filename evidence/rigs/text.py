"""Rigs for methods that query a text model: what they gain, measured with a small model trained on the spot."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.local.text import LocalText
from fedllm.methods.inference.fed_sp_sc import EXTRACT, THINK
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.models.questions import Entry, plain
from fedllm.spaces import make_space
from fedllm.spaces.space import Space

WORDINGS = (
    "Tom has {a} apples, buys {b} and eats {c}. How many are left?",
    "There were {a} apples. Tom added {b} and ate {c}. What number of apples remains?",
    "Tom ate {c} apples, having picked {a} and bought {b}. How many has he?",
    "If Tom has {a} apples, gets {b} and eats {c}, how many has he now?",
    "How many apples are left to Tom: {a} at first, {b} bought, {c} eaten?",
)
"""Five ways to ask for a + b - c."""
STEPS = (
    "{a} + {b} = {ab}. {ab} - {c} = {r}.",
    "{b} - {c} = {bc}. {bc} + {a} = {r}.",
    "{a} - {c} = {ac}. {ac} + {b} = {r}.",
    "{b} + {a} = {ab}. {ab} - {c} = {r}.",
    "{a} - {c} = {ac}. {b} + {ac} = {r}.",
)
"""The order of steps that each wording suggests; that is what makes their errors differ."""
LARGEST = 12
UNSEEN = 80
WARMUP = 40  # steps at a quarter of the rate


class Sum(NamedTuple):
    """a + b - c, with c <= a < b: two problems with the same numbers are one problem."""

    a: int
    b: int
    c: int

    @property
    def swapped(self) -> Sum:
        """b + a - c, for the model to learn from."""
        return Sum(self.b, self.a, self.c)

    @property
    def fields(self) -> dict[str, int]:
        """What the templates need."""
        a, b, c = self
        return {"a": a, "b": b, "c": c, "ab": a + b, "ac": a - c, "bc": b - c, "r": a + b - c}


def word_problems(seed: int) -> list[Sum]:
    """All problems, shuffled."""
    span = range(1, LARGEST + 1)
    found = [Sum(a, b, c) for a in span for b in span if a < b for c in range(1, a + 1)]
    Random(f"word-problems-{seed}").shuffle(found)
    return found


def worked(problem: Sum, wording: int) -> tuple[dict[str, str], dict[str, str]]:
    """The method's two prompts for a question, and how a model should go on: the steps, then the answer."""
    values = problem.fields
    head, steps = f"Q: {WORDINGS[wording].format(**values)}\nA: {THINK}", STEPS[wording].format(**values)
    return {"prompt": head, "response": f" {steps}"}, {
        "prompt": f"{head} {steps} {EXTRACT}", "response": f" {values['r']}"}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, a number or a mark of these problems."""
    texts = [*WORDINGS, *STEPS, THINK, EXTRACT, "Q: A:"]
    words = sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]+", re.sub(r"{\w+}", " ", t))} | {":", "."})
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *words, *map(str, range(2 * LARGEST + 1))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>")


def untrained(seed: int, width: int = 64, space: Space | None = None, task: str = "generation") -> Model:
    """A two-layer Llama with fresh weights, all of them to be trained unless a space says which."""
    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return Model(net, tokenizer, task, space or make_space("full"), seed=seed)


@functools.lru_cache(maxsize=2)
def imperfect_solver(seed: int, steps: int = 640) -> LocalText:
    """A small model that solves word problems and often errs: in every wording it saw the same half of the known ones.

    It never sees the first `UNSEEN` of `word_problems(seed)`, in no wording and no order.
    """
    model, rng, draw = untrained(seed), Random(f"solver-{seed}"), numpy_stream(seed, "solver")
    known = [p for q in word_problems(seed)[UNSEEN:] for p in (q, q.swapped)]
    seen = rng.sample(known, len(known) // 2)  # one half for all: else wordings would be judges of separate schooling
    pairs = [worked(p, w) for w in range(len(WORDINGS)) for p in seen]
    rows = [think for think, _ in pairs] + [answer for _, answer in pairs[::5]]  # to repeat a number is soon learned
    coded = encode_rows(rows, model.tokenizer, "generation", 512)
    theta = model.initial()
    how = LocalSpec(lr=1e-3, steps=WARMUP, batch_size=32, clip_norm=1.0, beta2=0.98, weight_decay=0.1)
    for spec in (how, replace(how, lr=4e-3, steps=steps, schedule="cosine")):
        plan = [draw.choice(len(coded), spec.batch_size, replace=False) for _ in range(spec.steps or 0)]
        theta = run_fits([Fit("solver", model, theta, None, coded, plan, spec)], Limits())[0].theta
    return LocalText(model, theta)


def asked_by_all(problems: Sequence[Sum], wordings: Sequence[str] = WORDINGS) -> Federation:
    """One client a wording; each holds every problem in its own words."""
    shards = {f"c{w}": Shard([{"prompt": text.format(**p.fields), "response": str(p.fields["r"])} for p in problems])
              for w, text in enumerate(wordings)}
    return Federation(shards, (), "generation")


def accuracy(said: Sequence[str | None], problems: Sequence[Sum]) -> float:
    """Share of right answers."""
    return float(np.mean([s == plain(str(p.fields["r"])) for s, p in zip(said, problems, strict=True)]))


def synonyms(method_name: str, seed: int, *, knobs: Mapping[str, Any] | None = None, problems: int = UNSEEN,
             steps: int = 640) -> dict[str, float]:
    """Five users ask the same unseen word problems in five wordings; the server's model is trained and imperfect.

    `accuracy` is the method's, `single` the mean over the five wordings by themselves, `gain` their difference;
    `gain_identical` is the gain when all five users use the same words.
    """
    unseen, text = word_problems(seed)[:problems], imperfect_solver(seed, steps)
    knobs = {"embed": "tfidf", "max_new_tokens": 16, **(knobs or {})}
    out = ask_all(method_name, text, unseen, WORDINGS, seed, knobs)
    same = ask_all(method_name, text, unseen[:20], [WORDINGS[0]] * len(WORDINGS), seed, knobs)
    return {**out, "gain": out["accuracy"] - out["single"], "gain_identical": same["accuracy"] - same["single"]}


def ask_all(method_name: str, text: LocalText, problems: Sequence[Sum], wordings: Sequence[str], seed: int,
            knobs: Mapping[str, Any]) -> dict[str, float]:
    """Client c0 asks each problem in its words: accuracies, voters and calls per question, and bytes up.

    The questions go to the model in one batch, by `votes`, which `answer` calls for one question.
    """
    method: Any = make_method(method_name, **knobs)
    world = World(text, asked_by_all(problems, wordings), seed=seed)  # type: ignore[arg-type]
    engine = InProcess((method,), world)
    state = drive(method.round(method.init(text), world.infos()[1:]), engine)
    queries = [(wordings[0].format(**p.fields), "c0") for p in problems]
    got = drive(method.votes(queries, [Entry(**e) for e in state["pool"]]), engine)
    singles = [accuracy([t.answer for t in v.thoughts], [p] * len(v.thoughts))
               for v, p in zip(got, problems, strict=True)]
    return {"accuracy": accuracy([v.answer for v in got], problems), "single": float(np.mean(singles)),
            "voters": float(np.mean([len(v.thoughts) for v in got])),
            "calls": float(np.mean([v.cost["calls"] for v in got])), "up": float(engine.record.totals()["up"])}


RIGS = {"synonyms": synonyms}
