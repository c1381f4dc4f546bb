"""Questions whose answer hangs on two things at once, and a template that says which two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.trials import Metrics, Trial
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Row, Shard
from fedllm.engines.world import World
from fedllm.local.forward import run_measures
from fedllm.local.objectives.verbalized import Said
from fedllm.local.requests import Limits, Measure
from fedllm.local.spec import LocalSpec
from fedllm.models.endpoint import Completion, Usage
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.spaces import make_space

WORDS, OWN, LENGTH, EACH = 48, 8, 6, 120
SIZES, STATES, ANSWERS = ("big", "small"), ("wet", "dry"), ("yes", "no")


@dataclass
class Template:
    """What stands for a large model that can reason: it counts the words of a question."""

    words: np.ndarray
    usage: Usage = field(default_factory=Usage)

    def complete(self, prompts: Sequence[str], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
                 ) -> list[Completion]:
        """`big dry`, or as the words have it."""
        out = []
        for p in prompts:
            hits = [sum(int(w[1:]) in own for w in p.split() if w[1:].isdigit()) for own in self.words]
            out.append(Completion(f"{SIZES[hits[1] > hits[0]]} {STATES[hits[3] > hits[2]]}", None, len(p.split()), 2))
        self.usage.book(out)
        return out


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w47 and what is said of them."""
    names = ["<pad>", "<eos>", "<unk>", "[why]", *SIZES, *STATES, *ANSWERS, *(f"w{i}" for i in range(WORDS))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def questions(rng: np.random.Generator, words: np.ndarray, n: int) -> list[Row]:
    """Three words of a size and three of a state, mixed; `yes` where it is big and wet, or small and dry."""
    out = []
    for _ in range(n):
        a, b = int(rng.integers(2)), int(rng.integers(2))
        said = [*rng.choice(words[a], LENGTH // 2), *rng.choice(words[2 + b], LENGTH // 2)]
        out.append({"prompt": " ".join(f"w{w}" for w in rng.permutation(said)), "response": ANSWERS[a ^ b]})
    return out


def reasons(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
            local: Mapping[str, Any] | None = None) -> Metrics:
    """Two clients with 120 questions each and a model of two blocks, from random weights. `accuracy`: how often their
    models find the right answer likelier, on 300 questions."""
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "reasons")
    words = rng.permutation(WORDS)[: 4 * OWN].reshape(4, OWN)
    tok = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=1))
    model = Model(net, tok, "generation", make_space("full"), seed=seed)
    fed = Federation({f"client-{k}": Shard(questions(rng, words, EACH)) for k in range(2)},
                     questions(rng, words, 300), "generation")
    spec = LocalSpec(**{"optimizer": "adamw", "lr": 3e-3, "steps": 25, "batch_size": 32, "max_length": 32,
                        **(local or {})})
    world = World(model, fed, spec, seed, exact_match=False, models=Shelf({"teacher": lambda: Template(words)}))
    told = {"mark": "[why] ", "ask": "{question}", "repair": "none", "seed": seed, **(knobs or {})}
    run = Trial(method, world, told if method == "fedcot" else dict(knobs or {})).rounds(rounds)
    coded = encode_rows(list(fed.test), tok, "generation", 32)
    ids = tuple(tok.convert_tokens_to_ids(list(ANSWERS)))
    right = []
    for c in fed.clients:
        z = run_measures([Measure("x", model, run.engine.memory[c]["theta"], None, coded, fn=Said(ids))], Limits())[0]
        right.append(np.mean([ANSWERS[i] == r["response"] for i, r in zip(z.argmax(1), fed.test, strict=True)]))
    return {"accuracy": float(np.mean(right)), **run.work()}


RIGS = {"reasons": reasons}
