"""Sums of four digits, modulo ten: a small model learns them with its steps written down, or the answers alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.trials import Metrics
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
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.spaces import make_space

BATCH, TOKENS = 48, 300_000
"""Rows of a step, and tokens that either way of writing is trained on."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Digits, and what stands around them."""
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *"QA:+.", "The", "answer", "is", *map(str, range(10))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>")


def written(digits: np.ndarray, steps: bool) -> dict[str, str]:
    """A question, and its answer in words; the rationale is the sum so far after each number but the first."""
    sums = np.cumsum(digits)[1:] % 10
    way = " ".join(map(str, sums)) + " " if steps else ""
    return {"prompt": question(digits), "response": f" {way}The answer is {sums[-1]}."}


def question(digits: np.ndarray) -> str:
    """As the method puts it to a model."""
    return f"Q: {' + '.join(map(str, digits))}\nA:"


@functools.lru_cache(maxsize=4)
def solver(seed: int, steps: bool, held: int) -> tuple[LocalText, np.ndarray]:
    """The model, and so many sums that it never saw [held, 4]."""
    rng = numpy_stream(seed, "sums")
    every = rng.permutation(10_000)
    digits = np.stack([every // 10**k % 10 for k in range(4)], 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer()), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
            eos_token_id=2))
    model = Model(net, tokenizer(), "generation", make_space("full"), seed=seed)
    coded = encode_rows([written(d, steps) for d in digits[held : held + 4000]], model.tokenizer, "generation", 64)
    count = TOKENS // (BATCH * len(coded[0].ids))  # all rows of one way are alike long
    spec = LocalSpec(lr=4e-3, steps=count, batch_size=BATCH, schedule="cosine", clip_norm=1.0)
    plan = [rng.choice(len(coded), BATCH, replace=False) for _ in range(count)]
    theta = run_fits([Fit("solver", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
    return LocalText(model, theta), digits[:held]


def steps(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, held: int = 60) -> Metrics:
    """`accuracy` on sums that the model never saw, asked by the method in the way that it learned; `abstained`, the
    share of questions to which no answer was stated."""
    torch.set_num_threads(1)
    own = {"exemplars": 0, "max_new_tokens": 12, **(knobs or {})}
    text, digits = solver(seed, own.get("mode", "cot") == "cot", held)
    asker: Any = make_method(method, **own)
    world = World(text, Federation({"c0": Shard([])}, (), "generation"), seed=seed)  # type: ignore[arg-type]
    engine = InProcess((asker,), world)
    got = [drive(asker.answer(question(d)[3:-3], world.infos()), engine).answer for d in digits]
    right = [a == str(d.sum() % 10) for a, d in zip(got, digits, strict=True)]
    return {"accuracy": float(np.mean(right)), "abstained": float(np.mean([a is None for a in got]))}


RIGS = {"steps": steps}
