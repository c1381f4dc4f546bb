"""Where the energy of a federation goes: tokens a joule, computing against sending, clients against links and server.

It stands next to the wire, so that it meters whatever runs above it. Each reply tells what the answer took; joules come
from the machine's own counters where a recipe asks for them and they can be read, and from declared power otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedllm.core.ask import Ask, Program, Replies
from fedllm.core.card import Card, Claim
from fedllm.core.energy import DEVICES, LINKS, device_of, link_of
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Algebra, Layer
from fedllm.core.payload import Payload
from fedllm.local import power
from fedllm.local.flops import Work, steps_of, work_of
from fedllm.wire import codec

NOTE = "note/energy"
TOLD = ("tokens", "flops", "flops_possible", "compute_seconds", "receive_seconds", "send_seconds", "bytes_down",
        "bytes_up", "compute_joules", "radio_joules", "idle_watts", "measured")
"""What a reply tells, fp64: `flops_possible` is compute time at peak, `radio_joules` the client's end of the link."""
BOOKED = (*TOLD[:8], "wait_seconds", "server_seconds", "client_joules", "link_joules", "server_joules", "answers",
          "measured", "unheard")


@dataclass(frozen=True)
class EdgeEnergy(Knobs, Layer):
    """Meters the rounds (tests are not metered); asks that run side by side count one after another."""

    card = Card(
        title="Energy on the very edge: a meter and a report",
        paper="Woisetschlaeger et al., Federated Fine-Tuning of LLMs on the Very Edge: The Good, the Bad, the Ugly, "
              "DEEM 2024, arXiv 2310.03150",
        topic="energy", sends="up: twelve numbers with each reply, under any method",
        needs="clients that tell how many tokens they train on; declared devices and links, or readable counters",
        claim=Claim("tokens a joule times joules are the tokens, and the shares of clients, link and server add up to "
                    "the total, to 1e-9", rig="energy", metric="identity_error", holds="<=", threshold=1e-9,
                    kind="exact"),
        also={"bandwidth": Claim("half the bandwidth halves the ratio of computing to sending, to 1 %", rig="energy",
                                 metric="bandwidth_error", holds="<=", threshold=0.01, kind="exact"),
              "lora": Claim("on MiniLM LoRA of rank 8 raises that ratio at least 20 times over full fine-tuning",
                            rig="energy_minilm", metric="granularity_gain", holds=">=", threshold=20.0, seeds=3),
              "flops": Claim("counted operations are within 10 % of torch's counter on a tiny Llama: full, LoRA and "
                             "forward only, the worst of the three", rig="energy_flops", metric="worst", holds="<=",
                             threshold=0.10, kind="exact")},
        evidence="Abstract read; no code was found. Constants are declared (core/energy.py) and said in the report.",
    )
    algebra: ClassVar[Algebra] = Algebra(kind="meter", reads=True, instead="no energy section")

    device: str | Mapping[str, float] = knob(
        "laptop", "what clients compute on whose profile does not say: a name, or flops, active_watts, idle_watts")
    link: str | Mapping[str, float] = knob(
        "wifi", "how they reach the server: a name, or bandwidth, latency, up, down (joules a bit)")
    server_device: str | Mapping[str, float] = knob(
        "gpu_server", "what the server computes on; it idles while clients work")
    server_link: str | Mapping[str, float] = knob(
        "lan", "the server's own end of the line, of which only joules a bit count")
    utilization: float = knob(0.3, "share of a device's peak that training reaches, where no step_seconds says how "
                                   "long a step takes", gt=0, le=1)
    measure: bool = knob(False, "read RAPL and NVML around each client's work (clients on machines of their own)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts()

    def parts(self) -> tuple[Any, Any, Any, Any]:
        """Device, link, server, and the server's link; a RecipeError for a name that is unknown."""
        return (device_of(self.device, "EdgeEnergy.device"), link_of(self.link, "EdgeEnergy.link"),
                device_of(self.server_device, "EdgeEnergy.server_device"),
                link_of(self.server_link, "EdgeEnergy.server_link"))

    def init(self) -> dict[str, Any]:
        return {"total": dict.fromkeys(BOOKED, 0.0), "round": dict.fromkeys(BOOKED, 0.0), "skipped": ""}

    tells = ("note/unmeasured",)

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        done, steps = Work(), 0.0

        def watch(request: Any) -> Any:
            nonlocal done, steps
            done, steps = done + work_of(request), steps + steps_of(request, client.training.lot)
            return request

        before = power.read() if self.measure else None
        with client.through(watch):
            reply = call(msg)
        after = power.read() if self.measure else None
        spent = after.since(before) if before and after else None
        told = torch.zeros(len(TOLD), dtype=torch.float64)
        skipped = {"note/unmeasured": after.sources} if after and spent is None else {}
        reply = {**reply, NOTE: told, **skipped}
        told.copy_(torch.tensor(self.bill(client, done, steps, msg, reply, spent), dtype=torch.float64))
        return reply

    def bill(self, client: Any, done: Work, steps: float, msg: Payload, reply: Payload,
             spent: float | None) -> list[float]:
        """What this answer took, in the order of `TOLD`."""
        device, link, *_ = self.parts()
        device = DEVICES.get(client.profile.device, device)
        link = LINKS.get(client.profile.link, link)
        down, up = codec.size(msg) if msg else 0, codec.size(reply)
        pace, rate = client.pace, client.profile.bandwidth or link.bandwidth
        compute = done.flops / (device.flops * self.utilization) if pace is None else steps * pace
        delay = client.profile.latency or link.latency
        joules = compute * device.active_watts if spent is None else spent
        return [done.tokens, done.flops, compute * device.flops, compute, (delay + down / rate) * bool(down),
                delay + up / rate, down, up, joules, 8 * (down * link.down + up * link.up), device.idle_watts,
                float(spent is not None)]

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        out = yield ask
        told = heard(out)
        state["skipped"] = next((str(n["unmeasured"]) for n in out.notes.values() if "unmeasured" in n),
                                state["skipped"])
        self.book(state["round"], told, ask, out)
        return out

    def book(self, into: MutableMapping[str, float], told: Mapping[str, Mapping[str, float]], ask: Ask,
             out: Replies) -> None:
        """Clients wait for the last of them (unless the next begins as soon as one is done), and the server for all."""
        _, _, server, line = self.parts()
        took = {c: t["receive_seconds"] + t["compute_seconds"] + t["send_seconds"] for c, t in told.items()}
        last = max(took.values(), default=0.0)
        for c, t in told.items():
            wait = last - took[c] if ask.flight is None else 0.0
            for key in TOLD[:8]:
                into[key] += t[key]
            into["wait_seconds"] += wait
            # idle while the message travels too: the radio's joules come on top
            idle = t["idle_watts"] * (wait + t["receive_seconds"] + t["send_seconds"])
            into["client_joules"] += t["compute_joules"] + idle
            # both ends: what the client sends the server receives
            into["link_joules"] += t["radio_joules"] + 8 * (t["bytes_up"] * line.down + t["bytes_down"] * line.up)
            into["measured"] += t["measured"]
        fold = sum(t["bytes_up"] for t in told.values()) / 2 / server.flops  # two operations for each fp32 number
        into["server_seconds"] += last
        into["server_joules"] += last * server.idle_watts + fold * server.active_watts
        into["answers"] += len(told)
        into["unheard"] += len(out.missing)

    def facts(self, state: MutableMapping[str, Any]) -> Mapping[str, Any]:
        """The round's figures, and its counts go to the total."""
        mine, state["round"] = state["round"], dict.fromkeys(BOOKED, 0.0)
        state["total"] = {k: v + mine[k] for k, v in state["total"].items()}
        return {"energy": figures(mine)}

    def report(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        total = {k: v + state["round"][k] for k, v in state["total"].items()}
        device, link, server, line = (vars(p) for p in self.parts())
        constants = {"device": device, "link": link, "server_device": server, "server_link": line,
                     "utilization": self.utilization, "devices": {n: vars(d) for n, d in DEVICES.items()},
                     "links": {n: vars(x) for n, x in LINKS.items()}}
        skipped = state["skipped"] or ("" if self.measure else "energy.measure is off")
        return {**figures(total), "estimated": total["measured"] < total["answers"] or not total["answers"],
                "not_measured": skipped, "constants": constants}


def heard(out: Replies) -> dict[str, dict[str, float]]:
    """What clients say that their answers took; what is no such bill, or a negative one, is passed over."""
    bills = {c: n.get("energy") for c, n in out.notes.items()}
    return {c: dict(zip(TOLD, b.tolist(), strict=True)) for c, b in bills.items()
            if isinstance(b, torch.Tensor) and b.shape == (len(TOLD),) and bool((b >= 0).all() and (b < 1e30).all())}


def joules_of(t: Mapping[str, float]) -> float:
    """What one answer cost its client: computing, its end of the link, and idling while messages travel."""
    return t["compute_joules"] + t["radio_joules"] + t["idle_watts"] * (t["receive_seconds"] + t["send_seconds"])


def figures(booked: Mapping[str, float]) -> dict[str, Any]:
    """Tokens a joule, computing over sending, use of the peak, operations a token, and who drew how much."""
    joules = {who: booked[f"{who}_joules"] for who in ("client", "link", "server")}
    total, travel = sum(joules.values()), booked["receive_seconds"] + booked["send_seconds"]
    return {"tokens": booked["tokens"], "joules": total, "tokens_per_joule": _over(booked["tokens"], total),
            "granularity": _over(booked["compute_seconds"], travel),
            "mfu": _over(booked["flops"], booked["flops_possible"]),
            "flops_per_token": _over(booked["flops"], booked["tokens"]), "joules_by": joules,
            "shares": {who: _over(j, total) for who, j in joules.items()},
            **{k: booked[k] for k in BOOKED if not k.endswith("_joules") and k not in ("tokens", "flops_possible")}}


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0
