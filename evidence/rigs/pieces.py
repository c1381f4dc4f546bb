"""A model in pieces on machines of unequal speeds: a step's time, how far it is from one process, who is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evidence.rigs.trials import Metrics, Trial, _chain
from fedllm.core.client import SERVER, Fleet, Profile
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import batches
from fedllm.engines.far.site import SiteHost, SiteRun
from fedllm.engines.in_process import InProcess
from fedllm.engines.world import World
from fedllm.federation.memory import DiskMemory
from fedllm.local.fit import run_fits
from fedllm.local.flops import FORWARD
from fedllm.local.requests import Fit, Limits
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.model import Model
from fedllm.spaces import make_space

STEP = LocalSpec(optimizer="adamw", lr=3e-3, batch_size=4, accumulate=4)


def machines(seed: int, layers: int = 8, dtype: torch.dtype = torch.float64) -> World:
    """A Llama of width 32 and so many blocks, 64 public rows, and four machines of which one is four times as quick as
    another, on lines of 1 MB/s."""
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=32, tie_word_embeddings=True)).to(dtype)
    fed = _chain(seed)
    rng = numpy_stream(seed, "machines")
    speeds = rng.permutation([1.0, 4.0, *np.exp(rng.uniform(0, np.log(4), 2))])
    profiles = {c: Profile(speed=float(s), bandwidth=1e6, latency=0.005)
                for c, s in zip(fed.clients, speeds, strict=True)}
    model = Model(net, None, "generation", make_space("full"), seed=seed)
    return World(model, replace(fed, public=fed.test), STEP, seed, profiles, fleet=Fleet(), exact_match=False)


def site(seed: int, folder: Path, layers: int, knobs: Mapping[str, Any], name: str) -> SiteHost:
    """A process's own half: its model, its piece's memory."""
    world = replace(machines(seed, layers), fleet=None)
    info = next(c for c in world.infos() if c.id == name)
    host = SiteHost(lambda head: None)  # type: ignore[arg-type, return-value]
    host.run = SiteRun((make_method("fusionai", **knobs),), world, info, DiskMemory(folder / name, None))
    return host


class Losing(InProcess):
    """From its `after`-th answer in round `at` on the machine `who` (or that of piece 1) says nothing any more."""

    who, at, after = "", 0, 0

    def work(self, job: Any, submit: Any) -> Any:
        if job.client == self.who and self.round >= self.at:
            self.after -= 1
            if self.after < 0:
                return "its machine was switched off"
        return super().work(job, submit)


def whole(world: World, rounds: int) -> Tree:
    """One process's trainables after as many steps on the very same rows, its optimizer going on."""
    model, theta, moments = world.model, world.model.initial(), None
    rows: Any = world.encoded(SERVER, "public")
    for t in range(rounds):
        rng = numpy_stream(world.seed, t, SERVER, "draw", 1, "pipeline")
        plan = batches([len(r.ids) for r in rows], world.local.lot, rng, rng, steps=1)
        [fit] = run_fits([Fit("one", model, theta, None, rows, plan, world.local, moments=moments)], Limits())
        theta, moments = fit.theta, fit.moments
    return theta


def apart(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, of its largest entry."""
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-3)) for n in b)


def pieces(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 3,
           kill: tuple[int, int] | None = None) -> Metrics:
    """`seconds` of a step in virtual time; `off_whole` from one process's weights; with `kill` (round, answers) the
    machine of the second piece is lost there, and `resent` is what was sent again, of what the piece, its optimizer's
    state and the step's states and gradients are."""
    world = machines(seed)
    seconds = (1 + FORWARD) / STEP.accumulate  # of the clock: a micro-batch forward, and forward and back once more
    run = Trial(method, world, {"backups": int(kill is not None), "step_seconds": seconds, **(knobs or {})}, Losing)
    if kill:
        run.rounds(1)
        run.engine.who, (run.engine.at, run.engine.after) = run.state["plan"]["machines"][1], kill
        names = {n for op in run.state["ops"][slice(*[*run.state["plan"]["cuts"], None][:2])] for n in op["names"]}
    run.rounds(rounds - run.t)
    out = {"seconds": run.engine.clock.now / rounds, "off_whole": apart(run.state["theta"], whole(world, rounds)),
           "lost": float(sum(run.state["lost"].values())), **run.work()}
    if kill:
        held = 3 * sum(8 * run.state["theta"][n].numel() for n in names)
        crossed = STEP.accumulate * STEP.batch_size * 16 * (2 * 32 * 8 + 1)  # states and gradients in fp64, a mask
        out["resent"] = run.state["resent"] / (held + crossed + 8)
    return out


RIGS: dict[str, Callable[..., Metrics]] = {"pieces": pieces}
