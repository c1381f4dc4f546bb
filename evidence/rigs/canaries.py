"""Rigs for rows that must not come out of weights again: canaries among clients' rows, and who overhears uploads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evidence.rigs.boundary import TOKENS, chain, walks
from evidence.rigs.topics import cache_dir
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.payload import Payload, Tree, add, part
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import encode_rows
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.job import Job
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_losses
from fedllm.local.generate import prompt_ids, run_generates
from fedllm.local.requests import Fit, Generate, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.spaces import make_space


def packs(rng: np.random.Generator, after: np.ndarray, count: int) -> list[dict[str, str]]:
    """Rows of five words of a walk and the next four, as they are and written as demonstrations in a row."""
    rows = []
    for walk in walks(rng, after, count):
        words = [f"w{i}" for i in walk.ids]
        rows.append({"prompt": " ".join(words[:5]), "response": " ".join(words[5:9])})
    return rows


TEMPLATE = "[q] {prompt} [a] {response} [e] "


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word or a mark."""
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", "[q]", "[a]", "[e]", *(f"w{i}" for i in range(TOKENS))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>")


def teller(seed: int, steps: int = 400) -> LlamaForCausalLM:
    """A small Llama that answers prompts and goes on with demonstrations; trained once, then read from the cache."""
    tokenizer = words_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
            eos_token_id=2))
    path = cache_dir() / f"teller-{seed}-{steps}-v1.safetensors"
    if not path.is_file():
        rng = numpy_stream(seed, "teller")
        rows = packs(rng, chain(seed), 6000)
        shown = ["".join(TEMPLATE.format(**r) for r in rows[i : i + 3]) for i in range(0, 4500, 3)]
        texts = [{"prompt": "", "response": s} for s in shown] + rows[4500:]
        model = Model(net, tokenizer, "generation", make_space("full"), seed=seed)
        coded = encode_rows(texts, tokenizer, "generation", 128)
        plan = [rng.choice(len(coded), 32, replace=False) for _ in range(steps)]
        spec = LocalSpec(lr=3e-3, batch_size=32, clip_norm=1.0, schedule="cosine")
        theta = run_fits([Fit("teller", model, model.initial(), None, coded, plan, spec)], Limits())[0].theta
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in theta.items()}, path)
    net.load_state_dict(load_file(path))
    return net


class Overheard(Vectorized):
    """Keeps the adapter that each client's last upload amounts to."""

    def cross(self, way: str, job: Job, payload: Payload) -> Payload:
        if way == "up" and (delta := part(payload, "delta")):
            self.__dict__.setdefault("uploads", {})[job.client] = add(
                part(job.fold.ask.msgs[job.client], "theta"), delta)
        return super().cross(way, job, payload)


def canaries(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 3, clients: int = 4,
             rows: int = 30, planted: int = 3, copies: int = 4) -> Metrics:
    """Four clients' rows hold canaries: random words that answer random words, each a few times over.

    `extracted` is the share of them that the adapter of a client's last upload gives away, told the prompt (greedy);
    `base` the same before training; `local` the mean loss of what clients use at home, and `shared` that of the
    deployed model, on rows of their own kind.
    """
    torch.set_num_threads(1)
    rng, tokenizer = numpy_stream(seed, "canaries"), words_tokenizer()
    model = Model(teller(seed), tokenizer, "generation", make_space("lora", rank=8), seed=seed)

    def word(n: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, TOKENS, n))

    secrets = {f"client-{k}": [{"prompt": word(5), "response": word(4)} for _ in range(planted)]
               for k in range(clients)}
    after = chain(seed, 0.4)
    shards = {c: Shard(packs(rng, after, rows) + mine * copies, packs(rng, after, 30)) for c, mine in secrets.items()}
    spec = LocalSpec(lr=5e-3, steps=60, batch_size=8, max_length=128)
    world = World(model, Federation(shards, packs(rng, after, 60), "generation"), spec, seed, exact_match=False)
    run = Trial(method, world, dict(knobs or {}), Overheard).rounds(rounds)
    given: dict[str, Tree] = run.engine.__dict__.get("uploads", {})
    own = [s["loss"] for s in run.scores("local").values()]
    shared = [run_losses([Losses(c, model, run.method.served(run.state)[0], None, world.encoded(c, "test"))],
                         world.limits)[0].mean for c in secrets]
    return {"extracted": leak(model, given, secrets), "base": leak(model, dict.fromkeys(secrets, model.initial()),
                                                                   secrets),
            "uploads": float(len(given)), "local": float(np.mean(own)), "shared": float(np.mean(shared)), **run.work()}


def leak(model: Model, given: Mapping[str, Tree], secrets: Mapping[str, list[dict[str, str]]]) -> float:
    """Share of the canaries that the adapters continue word for word; a client that sent nothing gave nothing away."""
    tokenizer: Any = model.tokenizer
    hits = 0
    for client, theta in given.items():
        ids = prompt_ids([s["prompt"] for s in secrets[client]], tokenizer, 128)
        said = run_generates([Generate(client, model, theta, None, ids, 5)], Limits())[0]
        hits += sum(tokenizer.decode(out, skip_special_tokens=True) == s["response"]
                    for out, s in zip(said, secrets[client], strict=True))
    return hits / sum(map(len, secrets.values()))


RIGS = {"canaries": canaries}
