"""The arena's worlds: `WORLDS[name](seed, clients, rows)` is a federation whose frozen parts are computed only once."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from evidence.rigs.topics import CLASSES, cache_dir, keep, pretrained, topic_federation
from evidence.rigs.trials import Trial
from fedllm.core.payload import Tree
from fedllm.data.federation import Federation, Shard
from fedllm.data.load import load_federation
from fedllm.data.office import ANSWER_MARK, office_federation
from fedllm.data.section import DataSpec
from fedllm.engines.world import World
from fedllm.local.requests import Limits
from fedllm.local.spec import LocalSpec
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.spaces import make_space


class Stopwatch:
    """CPU seconds of this process that went into computing what is then remembered."""

    seconds = 0.0

    def __enter__(self) -> None:
        self.began = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self.began


REMEMBERING = Stopwatch()


class Remembered(nn.Module):
    """A frozen body that computes each row once: its pooled state stands at every position of the row."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.config = body, body.config
        self.path = cache_dir() / "arena" / f"features-{self.config.hidden_size}-v1.safetensors"
        kept = load_file(self.path) if self.path.is_file() else {}
        self.kept: dict[bytes, Tensor] = {bytes.fromhex(name): t for name, t in kept.items()}
        self.fresh = False

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.body.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        n, t = input_ids.shape
        names = names_of(input_ids, attention_mask.sum(1))
        if missing := [i for i, name in enumerate(names) if name not in self.kept]:
            with REMEMBERING:
                for at in range(0, len(missing), 64):
                    self._remember(input_ids, attention_mask, missing[at : at + 64], names)
        states = torch.stack([self.kept[name] for name in names])[:, None].expand(n, t, -1)
        return type("Output", (), {"last_hidden_state": states})()

    @torch.no_grad()
    def _remember(self, ids: Tensor, masks: Tensor, some: Sequence[int], names: Sequence[bytes]) -> None:
        mask = masks[some]
        h = self.body(input_ids=ids[some], attention_mask=mask).last_hidden_state
        m = mask.to(h.dtype)[..., None]
        pooled = (h * m).sum(1) / m.sum(1)
        self.kept.update({names[i]: p.clone() for i, p in zip(some, pooled, strict=True)})
        self.fresh = True

    def save(self) -> None:
        """Keep what was computed for the next process."""
        if self.fresh:
            keep(self.path, {name.hex(): t for name, t in self.kept.items()})
            self.fresh = False


def names_of(ids: Tensor, lengths: Tensor) -> list[bytes]:
    """A name for each row of [N, T] up to its length."""
    return [row[:k].tobytes() for row, k in zip(ids.to(torch.int32).numpy(), lengths.tolist(), strict=True)]


class Answering:
    """A Llama body of which only the answer is computed, and of that only what the last block's queries, output and MLP
    change: states below it, its keys and values are computed once a row.

    Positions before `mark`, the token behind which the answer stands, come out as zeros; nothing is learned there.
    """

    def __init__(self, body: Any, pad: int, mark: int) -> None:
        self.body, self.pad, self.mark = body, pad, mark
        self.last = body.layers[-1]
        self.kept: dict[bytes, tuple[int, Tensor, Tensor, Tensor]] = {}
        body.__dict__["forward"] = self.forward

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        n, t = input_ids.shape
        lengths = t - (input_ids != self.pad).flip(1).long().argmax(1)  # right padded
        names = names_of(input_ids, lengths)
        if missing := [i for i, name in enumerate(names) if name not in self.kept]:
            with REMEMBERING:
                self._remember(input_ids[missing], lengths[missing].tolist(), [names[i] for i in missing])
        begin, *parts = zip(*(self.kept[name] for name in names), strict=True)
        x, k, v = (pad_sequence(list(p), batch_first=True) for p in parts)  # [N, R, d], [N, T, H, h] twice
        place = torch.tensor(begin)[:, None] + torch.arange(x.shape[1])  # [N, R]
        seen = torch.arange(k.shape[1]) <= place[..., None]  # [N, R, T]
        y = self._block(x, k.transpose(1, 2), v.transpose(1, 2), place, seen[:, None])
        good = place < lengths[:, None]
        out = y.new_zeros(n, t, y.shape[-1]).index_put((good.nonzero(as_tuple=True)[0], place[good]), y[good])
        return type("Output", (), {"last_hidden_state": out})()

    def _block(self, x: Tensor, k: Tensor, v: Tensor, place: Tensor, seen: Tensor) -> Tensor:
        """The last block and the last norm on x [N, R, d], which stand at `place` [N, R] of their rows."""
        last, attend = self.last, self.last.self_attn
        q = attend.q_proj(last.input_layernorm(x)).unflatten(-1, (-1, attend.head_dim)).transpose(1, 2)
        q = turned(q, *(c[:, None] for c in self.body.rotary_emb(x, place)))
        seat = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
        x = x + attend.o_proj(seat)
        return self.body.norm(x + last.mlp(last.post_attention_layernorm(x)))

    @torch.no_grad()
    def _remember(self, ids: Tensor, lengths: Sequence[int], names: Sequence[bytes]) -> None:
        place = torch.arange(ids.shape[1])[None]
        x = self.body.embed_tokens(ids)
        turns = self.body.rotary_emb(x, place)
        for block in self.body.layers[:-1]:
            x = block(x, position_embeddings=turns)
        attend, h = self.last.self_attn, self.last.input_layernorm(x)
        k, v = (p(h).unflatten(-1, (-1, attend.head_dim)) for p in (attend.k_proj, attend.v_proj))  # [N, T, H, h]
        k = turned(k, *(c[:, :, None] for c in turns))
        k, v = (y.repeat_interleave(attend.num_key_value_groups, 2) for y in (k, v))
        for i, name in enumerate(names):
            begin = int((ids[i] == self.mark).long().argmax())  # 0 where there is no mark: all of the row
            parts = x[i, begin : lengths[i]], k[i, : lengths[i]], v[i, : lengths[i]]
            self.kept[name] = begin, *(y.clone() for y in parts)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


@functools.lru_cache(maxsize=2)
def sst2(seed: int, clients: int, rows: int) -> World:
    """Movie reviews on MiniLM's frozen features: the head is trained. IID, each client as many rows."""
    data = DataSpec.model_validate({
        "source": "shared:sst2_train.jsonl", "test": "shared:sst2_dev.jsonl", "task": "classification",
        "labels": ["negative", "positive"], "fields": {"text": "text", "label": "label"}, "limit": rows + 100,
        "public": 100 / (rows + 100), "test_limit": 300, "client_test": 0.0,
        "partition": {"kind": "iid", "clients": clients}})
    federation = load_federation(data, seed)
    model = _minilm(tuple(federation.labels))
    model.seed = seed
    spec = LocalSpec(optimizer="adamw", lr=1e-2, steps=10, batch_size=16, max_length=64)
    return World(model, federation, spec, seed, limits=Limits(batch_tokens=1 << 17))  # rows are single vectors here


@functools.cache
def _minilm(labels: tuple[str, ...]) -> Model:
    model = load_model("minilm", "classification", make_space("head"), labels=labels)
    model.net.body, model.net.pooling = Remembered(model.net.body), "cls"
    return model


@functools.lru_cache(maxsize=2)
def topics(seed: int, clients: int, rows: int) -> World:
    """Documents of eight topics on a small pre-trained encoder, LoRA and head; needs no data from outside."""
    fed = topic_federation(seed, share=0.35)
    pooled = [r for s in fed.clients.values() for r in s.train]
    order = np.random.default_rng(seed).permutation(len(pooled))
    public, kept = order[:80], order[80:]
    shards = {f"c{k}": Shard([pooled[i] for i in part]) for k, part in enumerate(np.array_split(kept, clients))}
    fed = Federation(shards, fed.test, "classification", CLASSES, [pooled[i] for i in public])
    lora = make_space("lora", rank=4, alpha=8.0, targets=("query", "value"))
    model = Model(pretrained(seed), None, "classification", lora, labels=CLASSES, seed=seed)
    return World(model, fed, LocalSpec(optimizer="adamw", lr=3e-3, steps=10, batch_size=16), seed)


LAST = tuple(f"layers.3.{m}" for m in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
                                       "mlp.down_proj"))
BEGUN = 7
"""Rounds without attackers that the office's federation has behind it when they join."""


@functools.lru_cache(maxsize=2)
def office(seed: int, clients: int, rows: int) -> World:
    """The embedded language model on the routing slips of an office: LoRA on its last block, keys and values frozen.

    Attackers join a federation that is at work: it begins with what seven rounds without them have come to.
    """
    fed = office_federation(clients=clients, rows=max(1, rows // clients), test_rows=96, client_test_rows=0,
                            public_rows=100, seed=seed)
    model = load_model("embedded", "generation", make_space("lora", rank=8, alpha=16.0, targets=LAST), seed=seed)
    mark = model.tokenizer(ANSWER_MARK, add_special_tokens=False)["input_ids"][0]  # type: ignore[misc]
    Answering(model.net.model, model.pad, mark)
    world = World(model, fed, LocalSpec(optimizer="adamw", lr=1e-2, steps=4, batch_size=4, max_length=96), seed,
                  exact_match=False)
    model.start = begun(world, cache_dir() / "arena" / f"office-{seed}-{clients}-{rows}-v1.safetensors")
    return world


def begun(world: World, path: Path) -> Tree:
    """The trainables after the rounds without attackers; trained once, then read from the cache."""
    if path.is_file():
        return load_file(path)
    trial = Trial("fedavg", world, {"weighting": "uniform"}).rounds(BEGUN)
    return keep(path, trial.method.served(trial.state)[0])


WORLDS = {"sst2": sst2, "topics": topics, "office": office}
