"""Rigs of the span test on a small decoder: `RIGS[name](attack, seed, **options)` gives metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.rigs.audit import DP, WORDS, against_guess, bound_layers, small_gpt, zipf_rows
from evidence.rigs.leak import PAIRS
from evidence.rigs.trials import Metrics, Trial
from fedllm.audits.att_dager import DAGER
from fedllm.audits.att_lora_leak import LoraLeak
from fedllm.audits.view import ServerView
from fedllm.core.payload import part
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.spaces import make_space


def small_llama(seed: int) -> LlamaForCausalLM:
    """Three blocks of width 96 over 500 tokens; weights are five times the usual, or attention hardly looks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=WORDS, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.1))


def span(attack: str, seed: int, *, rows: int = 1, length: int = 16, clients: int = 1, layers: Sequence[str] = (),
         rank: int = 0, rounds: int = 1, steps: int = 1, optimizer: str = "sgd", gpt: bool = False,
         epsilon: float = 8.0) -> Metrics:
    """DAGER on what the server sees of client 0 after a round of one step on its batch (of a LoRA where `rank` > 0).

    The last token of a row is a label and never an input, so that it does not count. `recall_of_all` is of everybody's
    tokens, where the server sees a sum; `over_guess` the recall over that of the commonest public tokens.
    """
    torch.set_num_threads(1)
    rng = numpy_stream(seed, "span rows")
    data = {f"client-{k}": zipf_rows(rng, rows, length) for k in range(clients)}
    view, model = _seen(seed, data, layers, rank, rounds, LocalSpec(
        optimizer=optimizer, lr=0.5 if optimizer == "sgd" else 1e-3, steps=steps, batch_size=rows), gpt, epsilon)
    said = (view.value or {}) if view.sums else view.each.get("client-0", {})
    got = DAGER().read(model, part(view.told["client-0"], "theta"), part(said, "delta"))
    real = [e.ids.tolist()[:-1] for e in data["client-0"]]
    everybody = [e.ids.tolist()[:-1] for held in data.values() for e in held]
    public = [e.ids.tolist() for e in zipf_rows(numpy_stream(seed, "public"), 200, length)]
    out = against_guess(got.rows, real, public)
    return {**out, "recall_of_all": against_guess(got.rows, everybody, public)["recall"], "rank": float(got.rank),
            "width": float(got.width), "bag": float(len(got.bag)),
            "bag_errors": float(len(set(got.bag) ^ {t for r in everybody for t in r}))}


def rank_rule(attack: str, seed: int, *, inputs: int = 7, rank: int = 8, factor: str = "B", layers: Sequence[str] = ()
              ) -> Metrics:
    """One row with so many different inputs: what passes the test of a LoRA's factor. `errors` are tokens that pass
    and were not there, and the other way round, over all modules; `told` the share of modules that say anything."""
    torch.set_num_threads(1)
    ids = numpy_stream(seed, "rank rule").choice(np.arange(1, WORDS), inputs + 1, replace=False)
    data = {"client-0": [_row(ids.tolist())]}
    view, model = _seen(seed, data, layers, rank, 2 if factor == "A" else 1, LocalSpec(
        optimizer="sgd", lr=0.5, steps=1, batch_size=1), targets=("v_proj",))
    got = LoraLeak(factors=(factor,)).read(model, part(view.told["client-0"], "theta"),
                                           part(view.each["client-0"], "delta"))
    real = {int(t) for t in ids[:-1]}
    return {"errors": float(sum(len(real ^ set(c.tokens)) for c in got)) if got else float(len(real)),
            "told": float(np.mean([bool(c.tokens) for c in got])) if got else 0.0, "modules": float(len(got)),
            "seen": float(max((c.seen for c in got), default=0))}


def _seen(seed: int, data: dict[str, list[Encoded]], layers: Sequence[str], rank: int, rounds: int, local: LocalSpec,
          gpt: bool = False, epsilon: float = 8.0, targets: Sequence[str] = ()) -> tuple[ServerView, Model]:
    net = small_gpt(seed) if gpt else small_llama(seed)
    where = ("c_attn",) if gpt else ("q_proj", "v_proj")
    made = make_space("lora", rank=rank, targets=targets or where) if rank else make_space("full")
    model = Model(net, None, "generation", made, seed=seed)
    return _view(model, data, layers, rounds, local, seed, epsilon), model


def _view(model: Model, data: dict[str, list[Encoded]], layers: Sequence[str], rounds: int, local: LocalSpec, seed: int,
          epsilon: float) -> ServerView:
    fed = Federation({c: Shard(r) for c, r in data.items()}, [], "generation")  # type: ignore[arg-type]
    world = World(model, fed, local, seed, exact_match=False)
    many = bound_layers(layers, len(data), len(next(iter(data.values()))), local, seed, rounds,
                        {**DP, "epsilon": epsilon})
    view = ServerView(many)
    Trial("fedavg", world, {}, layers=[view, *many]).rounds(rounds)
    return view


def spoken(attack: str, seed: int, *, model: str = "smollm2", rank: int = 16, words: int = 8, rows: int = 1,
           layers: Sequence[str] = (), steps: int = 1) -> Metrics:
    """DAGER on a real language model's first LoRA upload, after one step of SGD on sentences of so many tokens.

    The whole vocabulary is tried. `rank`, `width` and `inputs` say what the test hung on.
    """
    torch.set_num_threads(1)
    held = load_model(model, "generation", make_space("lora", rank=rank, targets=("q_proj", "v_proj")), seed=seed)
    texts = [t for pair in PAIRS for t in pair]
    ids = [held.tokenizer(t)["input_ids"][:words] for t in texts]
    chosen = numpy_stream(seed, "spoken").permutation(len(ids))[:rows]
    data = {"client-0": [_row(ids[i]) for i in chosen]}
    view = _view(held, data, layers, 1, LocalSpec(optimizer="sgd", lr=0.5, steps=steps, batch_size=rows), seed, 8.0)
    got = DAGER(longest=words).read(held, part(view.told["client-0"], "theta"), part(view.each["client-0"], "delta"))
    real = [e.ids.tolist()[:-1] for e in data["client-0"]]
    out = against_guess(got.rows, real, [ids[i] for i in range(len(ids)) if i not in chosen])
    return {**out, "rank": float(got.rank), "width": float(got.width), "bag": float(len(got.bag)),
            "inputs": float(len({t for row in real for t in row}))}


def _row(ids: Sequence[int]) -> Encoded:
    labels = np.array(ids, np.int64)
    labels[0] = -100
    return Encoded(np.array(ids, np.int32), labels, len(ids) - 1)


RIGS = {"span": span, "rank_rule": rank_rule, "spoken": spoken}
