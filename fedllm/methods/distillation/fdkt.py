"""FDKT: clients send texts of a private generator, the server's model writes more like them, and all learn these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import Ask, Program, on_client, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Moves, State, Trial, knob
from fedllm.core.rng import seed_of
from fedllm.methods._own import Own, own
from fedllm.methods._written import few_shots, fresh, grouped, need_parts, need_variety, one_line, said_by
from fedllm.privacy.by_row import booked, need_book, need_silence, private_fits, spent_by

LR, FREE = {"local.lr": (1e-3, 3e-3, 1e-2)}, {"knobs": {"target_epsilon": None}}


@dataclass(frozen=True)
class FDKT(Own):
    """First a generator is trained with DP-SGD, and what it writes, as much of each label, leaves; then the server has
    its model go on from examples of a group of it, and from there on clients learn their own rows and those."""

    card = Card(
        title="FDKT: federated domain-specific knowledge transfer with synthetic data",
        paper="Li et al., Federated Domain-Specific Knowledge Transfer on Large Language Models Using Synthetic Data, "
              "2024, arXiv 2405.14212",
        topic="transfer", kinds=("text",), moves=Moves("text", "to clients", "clients", ("rows", "model", "designs")),
        sends="up, once: texts with labels, made under example-level DP; down, once: texts with labels; no weights",
        needs="task classification; a `generator` for clients and a `writer` (or endpoint) for the server among the "
              "`models`, of which clients may hold any; clients that remember",
        claim=Claim("at epsilon 8 clients are right more often than when each trains alone for as many steps",
                    rig="transferred", metric="accuracy", baseline="local_only", relative="difference", holds=">",
                    threshold=0.0, grid=LR),
        also={"free": Claim("and without privacy", rig="transferred", metric="accuracy", baseline="local_only", grid=LR,
                            relative="difference", holds=">", threshold=0.0, options=FREE),
              "canary": Claim("a row planted once is none of 1000 texts of an overfitted generator at epsilon 3",
                              rig="generated_canary", metric="leaked", holds="<=", threshold=0.0),
              "leak": Claim("which it is more often without privacy", rig="generated_canary", metric="leaked",
                            baseline="fdkt", relative="difference", holds="<", threshold=0.0, against=FREE),
              "epsilon": Claim("what is booked is no more than the target", rig="transferred", metric="over",
                               holds="<=", threshold=0.0, kind="exact")},
        evidence="Authors' code read by the dossier: epsilon 3, k-means, few-shot prompts. Ours: as many texts of each "
                 "label whoever sends; the large model does not choose among them; generators have their own round.",
    )
    trial = Trial({"texts": 2, "more": 1, "max_new_tokens": 4, "generator_steps": 1, "least_new": 0.0, "embed": "tfidf",
                   "target_epsilon": None}, task="classification", rounding="texts are sampled",
                  models={"generator": "generation", "writer": "generation"})
    serves, mixes, only_fits = False, "models", False

    generator: str = knob("generator", "the clients' generator, by its name among the recipe's `models`")
    writer: str = knob("writer", "the server's large model, by its name among them")
    prompt: str = knob("{label}:", "what the generator learns to go on from, and the writer is shown")
    target_epsilon: float | None = knob(3.0, "of the generator's training, a client; null: no privacy", gt=0)
    target_delta: float | None = knob(None, "null: 1e-5, or rows ** -1.1 if less", gt=0, lt=1)
    clip_norm: float = knob(1.0, "largest L2 norm of a row's gradient", gt=0)
    generator_steps: int = knob(100, "steps of the generator", ge=1)
    texts: int = knob(16, "texts of each label that a client sends", ge=1)
    cluster_size: int = knob(8, "texts of a group at the server, on average", ge=1)
    more: int = knob(2, "texts that the server's model writes for each that it was sent", ge=1)
    shown: int = knob(4, "examples in front of it", ge=1)
    weight: float = knob(0.5, "of a made text's loss beside a row's", ge=0, le=1)
    temperature: float = knob(1.0, "of writing", gt=0)
    max_new_tokens: int = knob(48, "longest text, in tokens", ge=1)
    least_new: float = knob(0.25, "least share of texts that are new and not empty, or none leaves", ge=0, le=1)
    embed: str = knob("auto", "groups by this; auto: by whichever is installed", options=("auto", "minilm", "tfidf"))
    seed: int | None = knob(None, "seeds noise and batches for tests, which voids the claim; null: from the OS")

    def check(self, model: Any) -> None:
        need_parts("FDKT", "prompt", self.prompt, "label")
        if model.task != "classification":
            raise CompositionError(f"method 'fdkt' makes texts of labels, and data.task is {model.task!r}")

    def check_layers(self, layers):
        need_silence(layers, "fdkt", self.target_epsilon)

    def asks_for(self):
        return (self.generator,)

    def server_asks_for(self):
        return (self.writer,)

    def init(self, model: Any) -> State:
        self.check(model)
        return {"labels": list(model.labels), "texts": [], "of": [], "books": {}, "deltas": {}, "stage": "invent",
                "open": [], "whys": {}}

    def round(self, state: State, clients) -> Program:
        """One thing that may not be repeated a round: what the generators spent is in the state before all else."""
        if state["stage"] == "invent":
            out = yield Ask(self.invent, {c.id: {"classes": len(state["labels"])} for c in clients}, quorum=0)
            told = {n: [x for c in out for x in out[c][n]] for n in ("texts", "of")}
            silent = [c.id for c in clients if c.id not in out]  # they may have spent it all the same
            return {**state, **told, "stage": "write" if told["texts"] else "learn" if out else "invent",
                    "books": {c: [list(r) for r in out[c]["rows"]] for c in out}, "open": [*state["open"], *silent],
                    **{n: {c: out[c][n[:-1]] for c in out} for n in ("deltas", "whys")}}
        if state["stage"] == "write":
            wrote = (yield Ask(self.write, {SERVER: {n: state[n] for n in ("texts", "of", "labels")}}))[SERVER]
            state = {**state, "texts": wrote["texts"], "of": wrote["of"], "stage": "learn"}
        yield Ask(self.local, {c.id: {"texts": state["texts"], "of": state["of"]} for c in clients})
        return state

    def fits(self, msg: Any, reply: Any) -> None:
        need_book(reply)
        need(len(reply["texts"]) == len(reply["of"]) and all(
            isinstance(y, int) and 0 <= y < msg["classes"] for y in reply["of"]), "'of' is not a label for each text")

    @on_client(gives="texts: texts, of: numbers, rows: layout, delta: number, why: code", fits=fits)
    def invent(self, msg, client):
        gen = client.holding(self.generator)
        leads = [self.prompt.format(label=x) for x in client.model.labels]
        rows = gen.encode([{"prompt": leads[r["label"]], "response": r["text"]} for r in client.data])
        with private_fits(client, self.generator_steps, self.target_epsilon, self.target_delta, self.clip_norm,
                          self.seed) as delta:
            theta = gen.fit(gen.model.initial(), on=rows, steps=self.generator_steps).theta
        of = [y for y in range(len(leads)) for _ in range(self.texts)]
        said = gen.generate([leads[y] for y in of], theta, max_new_tokens=self.max_new_tokens,
                            temperature=self.temperature)
        new, why = fresh(self.generator, said, self.least_new)  # by what it wrote alone, and by no private row
        wrote = {"texts": [said[i] for i in new], "of": [of[i] for i in new]}
        return {**wrote, "rows": booked(client), "delta": float(delta), "why": why}  # what was spent leaves at any rate

    @on_server
    def write(self, msg, client):
        leads = [self.prompt.format(label=x) for x in msg["labels"]]
        group = grouped(msg["texts"], self.cluster_size, self.embed)
        prompts, meant = few_shots(msg["texts"], msg["of"], group, leads, self.more, self.shown, client.rng("fdkt"))
        said = [one_line(t) for t in said_by(client, self.writer, prompts, self.max_new_tokens, self.temperature,
                                             seed_of(client.model.seed, "fdkt") % 2**31)]
        new = need_variety(self.writer, said, self.least_new)
        return {"texts": [said[i] for i in new], "of": [meant[i] for i in new]}

    @on_client(gives="loss?: number")
    def local(self, msg, client):
        made = client.encode([{"text": t, "label": y} for t, y in zip(msg["texts"], msg["of"], strict=True)])
        fitted = client.fit(own(client), on=[*client.tokens, *made], objective="weighted",
                            side={"weight": [1.0] * client.n + [self.weight] * len(made)})
        client.memory["theta"] = fitted.theta
        return {"loss": fitted.loss} if self.target_epsilon is None else {}  # a loss would be a release without noise

    def statement(self, state: State) -> Any:
        books, unknown = state["books"], state["open"]
        silent = self.target_epsilon is None or not (books or unknown)
        return None if silent else spent_by(books, state["deltas"], self.seed is not None, "fdkt", unknown)

    def report(self, state: State) -> Any:
        return {"texts": len(state["texts"]), "withheld": {c: why for c, why in state["whys"].items() if why}}

