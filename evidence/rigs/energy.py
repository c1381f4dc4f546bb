"""Rigs of the energy meter: its identities, its bandwidth, its operations beside torch's own count, thrifty choices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from evidence.rigs.time import bag_race
from evidence.rigs.trials import Metrics, Scripted, Trial, _chain, _tiny_llama
from fedllm.core.client import Profile
from fedllm.core.energy import LINKS
from fedllm.core.rng import numpy_stream
from fedllm.data.federation import Federation, Shard
from fedllm.engines.world import World
from fedllm.local.fit import run_fits
from fedllm.local.flops import work_of
from fedllm.local.forward import run_losses
from fedllm.local.requests import Fit, Limits, Losses
from fedllm.local.spec import LocalSpec
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.spaces import make_space
from fedllm.wire.edge_energy import EdgeEnergy

KINDS = (("phone", "wifi"), ("raspberry_pi", "lte"), ("jetson_orin", "5g"), ("laptop", "lan"))
def dealt(clients: Iterable[str]) -> dict[str, Profile]:
    """Devices and links in turn."""
    return {c: Profile(device=d, link=x, bandwidth=LINKS[x].bandwidth, latency=LINKS[x].latency)
            for c, (d, x) in zip(clients, itertools.cycle(KINDS), strict=False)}


IN_PLACE = {torch.ops.aten.baddbmm_: lambda _, a, b, *rest, **more: 2 * a[0] * a[1] * a[2] * b[2]}
"""A product that adds to what is there, which torch's counter knows only in its other form."""


def energy(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 3) -> Metrics:
    """FedAvg on a tiny Llama over a fleet of phones, boards and laptops on all four kinds of links.

    `identity_error` is the largest relative error of the meter's identities, beside the record's own count of bytes;
    `bandwidth_error` is how far half the bandwidth is from half the granularity, without latency.
    """
    torch.set_num_threads(1)
    got, run = _metered(seed, dict(knobs or {}), rounds)
    wire = run.engine.record.totals()
    parts = got["joules_by"].values()
    trained = rounds * 5 * 8 * sum(len(e.ids) for e in _chain(seed).test) / len(_chain(seed).test) * len(KINDS)
    errors = {
        "trained": _off(got["tokens"], trained), "tokens": _off(got["tokens_per_joule"] * got["joules"], got["tokens"]),
        "joules": _off(sum(parts), got["joules"]), "shares": abs(sum(got["shares"].values()) - 1),
        "seconds": _off(got["granularity"] * (got["receive_seconds"] + got["send_seconds"]), got["compute_seconds"]),
        "up": _off(got["bytes_up"], wire["up"]), "down": _off(got["bytes_down"], wire["down"])}
    whole, half = (_metered(seed, {"link": {"bandwidth": b, "up": 1e-7, "down": 1e-7}}, 1, fleet=False)[0]
                   for b in (1e6, 5e5))
    ratio = half["granularity"] / whole["granularity"]
    return {"identity_error": max(errors.values()), "bandwidth_error": abs(ratio / 0.5 - 1),
            "tokens_per_joule": got["tokens_per_joule"], "granularity": got["granularity"],
            **{f"share_{who}": s for who, s in got["shares"].items()}}


def _metered(seed: int, knobs: Mapping[str, Any], rounds: int, fleet: bool = True) -> tuple[dict[str, Any], Trial]:
    model = Model(_tiny_llama(32, seed), None, "generation", make_space("lora", rank=4), seed=seed)
    fed = _chain(seed)
    profiles = dealt(fed.clients) if fleet else {}
    spec = LocalSpec(steps=5, batch_size=8)
    run = Trial("fedavg", World(model, fed, spec, seed, profiles), {}, layers=[EdgeEnergy(**knobs)]).rounds(rounds)
    return dict(run.layers[0].report(run.states[0]) or {}), run


def _off(got: float, want: float) -> float:
    return abs(got - want) / abs(want)


def energy_minilm(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """Computing over sending of MiniLM by the meter: LoRA of rank 8 on query and value, and the whole model.

    Clients' training is scripted: what it would cost follows from the requests that they make.
    """
    torch.set_num_threads(1)
    rng, ratio = numpy_stream(seed, "sentences"), {}
    rows = [{"text": " ".join(f"word {i}" for i in rng.integers(0, 999, rng.integers(8, 40))), "label": 0}
            for _ in range(16)]
    for name, more in (("full", {}), ("lora", {"rank": 8, "targets": ("query", "value")})):
        model = load_model("minilm", "classification", make_space(name, **more), labels=("a", "b"), seed=seed)
        fed = Federation({"client-0": Shard(rows)}, [], "classification", ("a", "b"))
        run = Trial("fedavg", World(model, fed, LocalSpec(steps=20, batch_size=8), seed), {}, Scripted,
                    [EdgeEnergy(**(knobs or {}))]).rounds(1)
        said: Any = run.layers[0].report(run.states[0])
        ratio[name] = said["granularity"]
    return {"granularity_gain": ratio["lora"] / ratio["full"], **ratio}


def energy_flops(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None) -> Metrics:
    """Relative error of our count beside torch's, for one step of 8 rows of 16 tokens of a tiny Llama."""
    torch.set_num_threads(1)
    fed, out = _chain(seed), {}
    rows = list(fed.clients["client-0"].train)[:8]
    plan, spec = [np.arange(len(rows))], LocalSpec(optimizer="sgd", lr=0.1)
    for mode, space in (("full", "full"), ("lora", "lora"), ("forward", "lora")):
        model = Model(_tiny_llama(32, seed), None, "generation", make_space(space), seed=seed)
        theta = model.initial()
        fit = Fit("c", model, theta, None, rows, plan, spec)  # type: ignore[arg-type]
        request: Any = Losses("c", model, theta, None, rows) if mode == "forward" else fit  # type: ignore[arg-type]
        work: Any = run_losses if mode == "forward" else run_fits
        work([request], Limits())  # kernels are checked when they are first used
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            work([request], Limits())
        out[mode] = _off(work_of(request).flops, counter.get_total_flops())
    return {**out, "worst": max(out.values())}


def energy_select(method: str, seed: int, *, knobs: Mapping[str, Any] | None = None, rounds: int = 150,
                  target: float = 0.6) -> Metrics:
    """Joules of FedAvg under a selector until the test accuracy is 0.60 (never: ten times those of the run), on 60
    clients of strong label skew, 10 a round, whose devices and links are dealt in order."""
    meter = EdgeEnergy()
    race, score = bag_race(method, seed, dict(knobs or {}), 60, 0.1, rounds, below=[meter], declared=dealt)
    book, at = race.states[-1], None
    for _ in range(rounds):
        race.round()
        if score(race.theta)[1] >= target and at is None:
            at = float((meter.report(book) or {})["joules"])
    spent = float((meter.report(book) or {})["joules"])
    return {"joules_to_target": 10 * spent if at is None else at, "joules": spent, "accuracy": score(race.theta)[1]}


RIGS: dict[str, Callable[..., Metrics]] = {
    "energy": energy, "energy_minilm": energy_minilm, "energy_flops": energy_flops,
    "energy_select": energy_select}
