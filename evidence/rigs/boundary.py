"""Rigs for what may not leave: a model that its owner keeps, and what clients' rows weigh under noise."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.rigs.topics import cache_dir
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.client import SERVER
from fedllm.core.layer import Facts, Layer
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.model import Model
from fedllm.runs.layers import make_layer
from fedllm.spaces import make_space

TOKENS, LENGTH = 64, 24


def chain(seed: int, moved: float = 0.0) -> np.ndarray:
    """Each token's four successors [64, 4], the likeliest first; a share of the tokens has `moved` to others."""
    rng = numpy_stream(seed, "boundary chain")
    after = rng.integers(0, TOKENS, (TOKENS, 4))
    other = rng.integers(0, TOKENS, (TOKENS, 4))
    return np.where((rng.random(TOKENS) < moved)[:, None], other, after)


def walks(rng: np.random.Generator, after: np.ndarray, count: int) -> list[Encoded]:
    """Sequences of 24 tokens that follow the chain."""
    ids = np.zeros((count, LENGTH), np.int32)
    ids[:, 0] = rng.integers(0, TOKENS, count)
    for t in range(1, LENGTH):
        ids[:, t] = after[ids[:, t - 1], np.minimum(3, rng.geometric(0.6, count) - 1)]
    labels = ids.astype(np.int64)
    labels[:, 0] = -100
    return [Encoded(i, y, LENGTH - 1) for i, y in zip(ids, labels, strict=True)]


def blank(seed: int, layers: int = 8, width: int = 48) -> LlamaForCausalLM:
    """A Llama of eight blocks with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=TOKENS, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32))


@functools.lru_cache(maxsize=2)
def owned(seed: int, steps: int = 500, layers: int = 8) -> dict[str, torch.Tensor]:
    """The owner's weights: pre-trained on walks of the public chain, then read from the cache."""
    path = cache_dir() / f"boundary-{seed}-{steps}-{layers}-v1.safetensors"
    if path.is_file():
        return load_file(path)
    rng = numpy_stream(seed, "boundary pre-training")
    model = Model(blank(seed, layers), None, "generation", make_space("full"), seed=seed)
    rows, theta = walks(rng, chain(seed), 4000), model.initial()
    spec = LocalSpec(lr=2e-3, batch_size=32, clip_norm=1.0, schedule="cosine")
    plan = [rng.choice(len(rows), 32, replace=False) for _ in range(steps)]
    theta = run_fits([Fit("owner", model, theta, None, rows, plan, spec)], Limits())[0].theta
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in theta.items()}, path)
    return theta


def offsite_world(seed: int, space: str, local: Mapping[str, Any], clients: int, rows: int) -> World:
    """The owner's model and public walks; clients' walks follow a chain of which 40 % of the tokens have moved."""
    net = blank(seed)
    net.load_state_dict(owned(seed))
    model = Model(net, None, "generation", make_space(space, **({"rank": 8} if space == "lora" else {})), seed=seed)
    rng, after = numpy_stream(seed, "boundary rows"), chain(seed, 0.4)
    shards = {f"client-{k}": Shard(walks(rng, after, rows), walks(rng, after, 16)) for k in range(clients)}  # type: ignore[arg-type]
    fed = Federation(shards, walks(rng, after, 200), "generation", (), walks(rng, chain(seed), 400))  # type: ignore[arg-type]
    spec = LocalSpec(**{"lr": 2e-3, "steps": 15, "batch_size": 16, **local})
    return World(model, fed, spec, seed, exact_match=False)


def tuned(method: str, world: World, knobs: Mapping[str, Any], rounds: int, layers: Sequence[Layer] = ()) -> Trial:
    """The method after its rounds, with these layers bound to the run."""
    facts = Facts({c.id: c.n for c in world.infos()}, len(world.infos()), rounds, world.local)
    return Trial(method, world, dict(knobs), layers=[layer.bind(facts) for layer in layers]).rounds(rounds)


def plug_in(world: World, theta: Tree) -> float:
    """Loss on the global test of the owner's whole model with these trainables."""
    return run_losses([Losses("owner", world.model, theta, None, world.encoded(SERVER, "test"))], world.limits)[0].mean


def offsite(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 8, clients: int = 4,
            rows: int = 96, space: str = "lora", local: Mapping[str, Any] | None = None) -> Metrics:
    """Four clients tune the top of a Llama of eight blocks, of which they hold an emulator.

    Losses on the global test: `base` before, `plugin` after, with A in the owner's whole model; `emulator` for what
    clients hold; `static` without any alignment; `whole` for the same A trained with all blocks at the clients.
    `closed` = (static - plugin) / (static - whole).
    """
    torch.set_num_threads(1)
    world, knobs = offsite_world(seed, space, local or {}, clients, rows), dict(knobs or {})
    out: Metrics = {"base": plug_in(world, world.model.initial())}
    still = {"prealign_steps": 0, "align_steps": 0}
    for name, more in {"plugin": {}, "static": still, "whole": {**still, "drop_ratio": 0.0}}.items():
        run = tuned(method, world, {**knobs, **more}, rounds)
        out[name] = plug_in(world, run.method.served(run.state)[0])
        if name == "plugin":
            out["emulator"] = float(np.mean([s["loss"] for s in run.scores("global").values()]))
            wire = run.engine.record.totals()
            out |= {"up": float(wire["up"]), "down": float(wire["down"])}
    return {**out, "closed": (out["static"] - out["plugin"]) / (out["static"] - out["whole"]),
            "margin": out["emulator"] - out["plugin"]}


def private_offsite(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 6,
                    epsilon: float = 8.0) -> Metrics:
    """All eight ways to leave out the emulator, LoRA or DP-SGD, on the rig `offsite`; losses by what is on.

    `base` is the owner's model before. `share` = (base - peft+offsite+dp) / (base - peft+offsite); `epsilon` is what
    the ledger says of the former; `upload` is what LoRA sends as a share of what whole blocks take.
    """
    torch.set_num_threads(1)
    out: Metrics = {}
    up = {}
    for space, drop, noisy in itertools.product(("lora", "full"), (0.5, 0.0), (True, False)):
        name = "+".join(n for n, on in (("peft", space == "lora"), ("offsite", drop), ("dp", noisy)) if on) or "none"
        world = offsite_world(seed, space, {"lr": 2e-3 if space == "lora" else 5e-4}, 4, 96)
        dp = [make_layer("dp_sgd", {"epsilon": epsilon, "seed": seed}, "layers.0")] if noisy else []
        still = {} if drop else {"prealign_steps": 0, "align_steps": 0}
        run = tuned(method, world, {"prealign_steps": 100, **(knobs or {}), **still, "drop_ratio": drop}, rounds, dp)
        out[name] = plug_in(world, run.method.served(run.state)[0])
        up[name] = run.engine.record.totals()["up"]
        if name == "peft+offsite+dp":
            said: Any = run.layers[0].statement(run.states[0])
            out |= {"base": plug_in(world, world.model.initial()), "epsilon": max(said["clients"].values())}
    private, open_ = out["peft+offsite+dp"], out["peft+offsite"]
    return {**out, "share": (out["base"] - private) / (out["base"] - open_),
            "upload": up["peft+offsite"] / up["offsite"]}


def sparse_sums(layer: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 30, clients: int = 10,
                lr: float = 0.3) -> Metrics:
    """FedAvg of all weights of a two-block Llama from scratch, ten clients on walks of one chain, three stacks.

    `dense` under secagg, `sparse` under this layer, `forgetful` the same without error feedback: losses on the test.
    `worst` = max(upload / 0.25, loss / 1.05), both as shares of the dense run's, so at most 1 where both limits hold.
    `paper_clear`: share of a client's largest entries that the paper's sparse masks would leave in the clear at a mask
    fraction of 0.02, drawn for this many clients.
    """
    torch.set_num_threads(1)
    rng, after = numpy_stream(seed, "sparse sums"), chain(seed)
    shards = {f"client-{k}": Shard(walks(rng, after, 48)) for k in range(clients)}  # type: ignore[arg-type]
    fed = Federation(shards, walks(rng, after, 200), "generation")  # type: ignore[arg-type]
    model = Model(blank(seed, 2, 32), None, "generation", make_space("full"), seed=seed)
    world = World(model, fed, LocalSpec(optimizer="sgd", lr=lr, steps=5, batch_size=16), seed, exact_match=False)
    sparse = {"density": 0.01, "density_min": 0.001, **(knobs or {})}
    stacks = {"dense": ("secagg", {}), "sparse": (layer, sparse),
              "forgetful": (layer, {**sparse, "error_feedback": False})}
    out: Metrics = {}
    for name, (kind, values) in stacks.items():
        run = tuned("fedavg", world, {}, rounds, [make_layer(kind, values, "layers.0")])
        out[name] = plug_in(world, run.method.served(run.state)[0])
        out[f"{name}_up"] = float(run.engine.record.totals()["up"])
    near = numpy_stream(seed, "sparse masks").random((clients - 1, 20_000)) < 0.02
    return {**out, "upload": out["sparse_up"] / out["dense_up"], "paper_clear": float(np.mean(~near.any(0))),
            "worst": max(out["sparse_up"] / out["dense_up"] / 0.25, out["sparse"] / out["dense"] / 1.05)}


def private_chain(method: str, seed: int, *, epsilon: float, rates: Sequence[float] = (0.15, 0.3, 0.5, 1.0),
                  rounds: int = 5, rows: int = 512) -> Metrics:
    """A pre-trained Llama of two blocks learns a moved chain from four clients under `dp_sgd` at this epsilon; SGD.

    `best_loss` on the global test, at the best of the learning rates (chosen on that very test for every method alike,
    at no charge to epsilon); `lr` is that rate, `base` the loss before.
    """
    torch.set_num_threads(1)
    net = blank(seed, 2)
    net.load_state_dict(owned(seed, 300, 2))
    model = Model(net, None, "generation", make_space("lora", rank=4, alpha=8.0), seed=seed)
    rng, after = numpy_stream(seed, "private chain"), chain(seed, 0.4)
    shards = {f"client-{k}": Shard(walks(rng, after, rows)) for k in range(4)}  # type: ignore[arg-type]
    fed = Federation(shards, walks(rng, after, 200), "generation")  # type: ignore[arg-type]
    found = []
    for lr in rates:
        spec = LocalSpec(optimizer="sgd", lr=lr, steps=10, batch_size=32)
        noise = make_layer("dp_sgd", {"epsilon": epsilon, "clip_norm": 1.0, "seed": seed}, "layers.0")
        world = World(model, fed, spec, seed, exact_match=False)
        run = tuned(method, world, {}, rounds, [noise])
        loss = plug_in(world, run.method.served(run.state)[0])
        found.append((loss if np.isfinite(loss) else 1e9, lr))
    return {"best_loss": min(found)[0], "lr": min(found)[1], "base": plug_in(world, model.initial()),
            **{f"at_{lr:g}": loss for loss, lr in found}}


RIGS = {"offsite": offsite, "private_offsite": private_offsite, "private_chain": private_chain,
        "sparse_sums": sparse_sums}
