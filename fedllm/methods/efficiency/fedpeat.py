"""FedPEAT: offsite tuning where a controller says each round how large an emulator each device works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, RunError
from fedllm.core.layer import name_of
from fedllm.core.method import Card, Claim, Moves, State, Trial, knob
from fedllm.core.payload import Payload, add, pack, part, scale, sub
from fedllm.core.reduce import Mean
from fedllm.core.rng import numpy_stream
from fedllm.methods._control import OUT, SABPPO, Chance, Controller, Fixed, Greedy
from fedllm.methods._offsite import held_to
from fedllm.methods._sizes import Sized, assembled, back, scene
from fedllm.models.emulator import renamed

SIX = {"bottom_layers": 1, "adapter_layers": 1, "ratios": (0.2, 0.4, 0.8)}
FIXED = {**SIX, "controller": "fixed"}
CUT = {"prealign_steps": 0}
WORLD = {"rig": "sized", "options": {"knobs": {**SIX, "prealign_steps": 20}}}
COUNTED = {"rig": "sized", "kind": "exact", "holds": "<=", "options": {"rounds": 12, "knobs": {**SIX, **CUT}}}
FULL = {"space": {"name": "full"}}
RATES = {"local.lr": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class FedPEAT(Sized):
    """A, the LoRA of both ends, is averaged; a device trains it over an emulator of its own size, of which it is sent
    the blocks that it lacks. The server may train A too, on public rows and with the whole model."""

    card = Card(
        title="FedPEAT: emulator-assisted tuning with adaptive control",
        paper="Chua, Yu, Zhao, Lam, FedPEAT: Convergence of Federated Learning, Parameter-Efficient Fine Tuning, and "
              "Emulator Assisted Tuning for AI Foundation Models with Mobile Edge Computing, 2023, arXiv 2310.17491",
        topic="convergence analysis", moves=Moves("adapters", "both", "owner", ("rows", "model", "compute")),
        sends="down: A, and of a size that is new to the device the blocks that it lacks and E; up: the change of A; "
              "never a block that the largest size leaves out",
        needs="a language model of blocks and LoRA; what devices declare (memory_bytes, bandwidth, speed); public rows "
              "at the server where emulators are aligned or the server trains",
        claim=Claim("where of six devices two have the memory for each of three sizes, the model with A plugged in "
                    "has a lower loss than with offsite tuning on the one emulator that fits all of them",
                    baseline="offsite_tuning", metric="plugin", relative="difference", holds="<", threshold=0.0,
                    grid=RATES, against={"knobs": {"bottom_layers": 1, "adapter_layers": 1, "drop_ratio": 0.8,
                                                   "prealign_steps": 20}}, **WORLD),
        also={"one_size": Claim("and than with the largest for all, which four devices cannot hold", baseline="fedpeat",
                                metric="plugin", relative="difference", holds="<", threshold=0.0, grid=RATES,
                                against={"knobs": {**FIXED, "prealign_steps": 20}}, **WORLD),
              "memory": Claim("no device is given more than its memory holds, where one size for all is refused by "
                              "four in each of 12 rounds (refusals, less the fixed controller's)", baseline="fedpeat",
                              metric="refused", relative="difference", threshold=-48, against={
                                  "knobs": {**FIXED, **CUT}}, **COUNTED),
              "bytes": Claim("all that crosses the wire in 12 rounds, blocks of emulators included, is a third or less "
                             "of what federated full tuning takes", baseline="fedavg", metric="bytes",
                             relative="ratio", threshold=1 / 3, against=FULL, **COUNTED),
              "seconds": Claim("and so is the time, on lines that take 13 s for the whole model where ten steps in it "
                               "take 10 s", baseline="fedavg", metric="seconds", relative="ratio", threshold=1 / 3,
                               against=FULL, **COUNTED),
              "sabppo": Claim("the learned controller's mean reward over the last 100 of 400 rounds is above a random "
                              "one's, on eight devices whose lines fade", baseline="fedpeat", metric="reward",
                              relative="difference", holds=">", threshold=0.0, rig="fleet_game",
                              options={"knobs": {"controller": "sabppo", "ppo_lr": 3e-3}},
                              against={"knobs": {"controller": "random"}})},
        evidence="Written from a dossier; no code of the authors was found. Sizes are nested here, so that a change "
                 "costs only what is new. SABPPO's branches share their weights (a round may ask any devices), it "
                 "chooses size or rest and no power or share of the band, and never what does not fit. Greedy, which "
                 "needs no rounds to learn in, earned 0.11 more than it learned to (seeds 1 to 3 of the game).",
    )
    trial = Trial({"bottom_layers": 0, "adapter_layers": 1, "ratios": (0.5, 1.0), "prealign_steps": 0})
    controller: Literal["fixed", "greedy", "random", "sabppo"] = knob(
        "greedy", "who gets which size: all the largest, each the largest that fits its memory and the deadline, any "
        "that fits, or what was learned from rewards", options=("fixed", "greedy", "random", "sabppo"))
    deadline: float = knob(1e9, "seconds that greedy lets a device take where a smaller size is quicker", gt=0)
    work_seconds: float = knob(10.0, "seconds that a round's steps take in the whole model at speed 1", gt=0)
    headroom: float = knob(1.0, "times the bytes of weights and A's moments that a device is to have", ge=1)
    server_trains: bool = knob(False, "the server trains A too: the whole model, on public rows, one client more")
    lambda_c: float = knob(0.0, "how strongly A is held to where the round began", ge=0)
    time_weight: float = knob(0.1, "of a round's seconds by work_seconds, in the reward", ge=0)
    rest_weight: float = knob(1.0, "of the share of devices that did not take part, in the reward", ge=0)
    ppo_lr: float = knob(3e-4, "sabppo's learning rate", gt=0)
    ppo_every: int = knob(8, "rounds from one update of sabppo to the next", ge=2)

    def public_at(self):
        return ("server",) if self.prealign_steps or self.server_trains else ()

    def check_layers(self, layers: Sequence[Any]) -> None:
        dp = [name_of(x) for x in layers if x.algebra.kind == "dp"]
        if dp and self.server_trains:
            raise CompositionError(f"method.server_trains = true and layer '{dp[0]}' do not fit together: its noise is "
                                   "for what clients send, and the server would outweigh them; leave it out")
        if dp and self.controller == "sabppo":
            raise CompositionError(f"method.controller = 'sabppo' and layer '{dp[0]}' do not fit together: it learns "
                                   "from clients' losses, which are not told there; use 'greedy'")

    def controls(self) -> Controller:
        return {"fixed": Fixed(len(self.ratios) - 1), "greedy": Greedy(self.deadline), "random": Chance(),
                "sabppo": SABPPO(self.ppo_lr, 0.2, 0.99, self.ppo_every)}[self.controller]

    def reward(self, loss: float, seconds: float, rest: float) -> float:
        return -(loss + self.time_weight * seconds / self.work_seconds + self.rest_weight * rest)

    def init(self, model: Any) -> State:
        state = super().init(model)
        return {**state, "control": self.controls().begin(5, len(state["kept"]), model.seed), "rounds": []}

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        if state["aligned"] is None:
            state = yield from self.aligned(state)
        seen = scene(state, clients, self.work_seconds, self.headroom)
        draw = numpy_stream(state["seed"], "fedpeat", len(state["rounds"]))
        choice, control = self.controls().choose(state["control"], seen, draw)
        size = {c.id: int(i) for c, i in zip(clients, choice, strict=True) if i != OUT}
        if not size:
            raise RunError(f"none of {len(clients)} clients declares memory_bytes enough for the smallest emulator: "
                           "give method.ratios a smaller one, or lower method.headroom")
        asks = [Ask(self.local, (yield from self.told(state, size)))]
        asks += [Ask(self.own, {SERVER: pack(A=state["A"])})] if self.server_trains else []
        out, *own = yield asks
        seconds = max(float(seen.seconds[i, size[c.id]]) for i, c in enumerate(clients) if c.id in out.answered)
        rest, loss = 1 - len(out.answered) / len(clients), float(out.value.get("loss", 0.0))
        control = self.controls().learn(control, self.reward(loss, seconds, rest))
        done = {"loss": loss, "seconds": seconds, "rest": rest, "sizes": size}
        return {**self.sent(state, size, out.answered), "control": control, "loss": loss,
                "A": self.averaged(state["A"], [out.value, *(o[SERVER] for o in own)]),
                "rounds": [*state["rounds"], done]}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg: Payload, client: Any) -> Payload:
        thin, e, place = assembled(client, msg)
        a, e = renamed(part(msg, "A"), place), renamed(e, place)
        # min L(A, E_rho) + lambda_c ||merge(A) - merge(A_t)||^2 over A, with the size rho of this device and round
        fitted = thin.fit({**e, **a}, freeze=[*e], terms=held_to(thin.model.space, a, self.lambda_c))
        delta = sub({n: fitted.theta[n] for n in a}, a)
        return pack(delta=back(delta, place), n=client.n, loss=fitted.loss)

    def averaged(self, a: Any, replies: Sequence[Payload]) -> Any:
        """A + sum_k n_k D_k / sum_k n_k, over what the devices' mean says, and the server's own where there is one."""
        total = sum(float(r["n"]) for r in replies)
        for r in replies:
            a = add(a, scale(part(r, "delta"), float(r["n"]) / total))
        return a

    def report(self, state: State) -> dict[str, Any] | None:
        """What bounds the error and can be seen: how far each emulator was off, and who took part with which size."""
        return {"emulator_loss": state["aligned"], "blocks": [len(k) for k in state["kept"]], "rounds": state["rounds"]}
