"""FedYolo: you only load once; one frozen backbone, and for every task a small module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.errors import CompositionError, DataError, QuorumError
from fedllm.core.form import need
from fedllm.core.method import Card, Claim, Method, State, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.spaces.full import Full

FORGETS = {"rig": "two_tasks", "metric": "forgotten", "relative": "difference", "holds": "<=", "threshold": -0.10,
           "wins": 4}

MOST_TASKS = 1000
"""A client names no more tasks."""


@dataclass(frozen=True)
class FedYolo(Method):
    """A round has one ask a task, side by side: only clients that hold the task's rows move its module."""

    card = Card(
        title="FedYolo: you only load once",
        paper="Zhang et al., FedYolo: Augmenting Federated Learning with Pretrained Transformers, 2023, "
              "arXiv 2307.04905",
        topic="training efficiency",
        sends="down: the modules of the tasks that a client holds; up: their change, the number of the task's rows, "
              "the training loss; once: the names of its tasks",
        needs="a space that leaves the backbone frozen (lora, adapter, prefix, soft_prompt, ...); rows that name their "
              "task where a client holds several",
        kinds=("text",),
        claim=Claim("after task A and then task B it is on the mean at most 2 points less accurate than FedAvg's one "
                    "adapter for both tasks on as much work, when that sees both tasks at once and has nothing to "
                    "forget", baseline="fedavg", rig="two_tasks", metric="accuracy", relative="difference",
                    holds=">=", threshold=-0.02, against={"together": True}, grid={"local.lr": (3e-3, 1e-2)}),
        also={"adapter": Claim("where tasks come one after the other it has lost at least 10 points less on A than "
                               "FedAvg with one adapter for both (it cannot lose any)", baseline="fedavg",
                               rig="two_tasks", metric="forgotten", relative="difference", holds="<=",
                               threshold=-0.1),
              "exact": Claim("task B leaves the loss of every test row of A as it was to the last bit",
                             rig="two_tasks", metric="changed", holds="<=", threshold=0.0, kind="exact"),
              "backbone": Claim("the backbone's hash is the same after all rounds", rig="two_tasks",
                                metric="backbone_changed", holds="<=", threshold=0.0, kind="exact"),
              "bytes": Claim("a module of MiniLM (LoRA of rank 4 on query and value) is sent in at most a hundredth of "
                             "the bytes of the whole model", rig="minilm_bytes", metric="ratio", holds=">=",
                             threshold=100.0, kind="exact",
                             options={"space": {"name": "lora", "rank": 4, "targets": ["query", "value"]}})},
        evidence="Abstract read; no code of the authors was found. The head is a part of each task's module. Modules "
                 "that stay at home (the paper's local arm) are local_only's matter here.",
    )
    serves = only_fits = False

    by: str = knob("category", "column of the rows that names their task; where no row of a client has it, the client "
                               "holds one task without a name")

    def check(self, model) -> None:
        if isinstance(model.space, Full):
            raise CompositionError("method 'fedyolo' keeps one frozen backbone for all tasks and the space 'full' "
                                   "trains it, so they do not fit together; use the space 'lora' or 'adapter'")

    def init(self, model) -> State:
        return {"first": model.initial(), "modules": {}, "holds": {}}

    def round(self, state: State, clients) -> Program:
        holds = dict(state["holds"])
        if new := [c.id for c in clients if c.id not in holds]:
            met = yield Ask(self.enroll, {c: {} for c in new}, quorum=0)
            holds |= {c: list(met[c]["tasks"]) for c in met}
        mine = {c.id: holds.get(c.id, []) for c in clients}
        modules = dict(state["modules"])
        tasks = sorted({t for held in mine.values() for t in held})
        outs = yield [Ask(self.local, {c: pack(theta=modules.get(t, state["first"]), task=t)
                                       for c, held in mine.items() if t in held}, quorum=0) for t in tasks]
        for t, out in zip(tasks, outs, strict=True):
            if out.answered:  # m_t <- m_t + sum_k n_kt / n_t (m_kt - m_t), over those that hold task t
                modules[t] = add(modules.get(t, state["first"]), part(out.value, "delta"))
        if not any(out.answered for out in outs):
            raise QuorumError(f"FedYolo.local: none of {len(clients)} clients answered for any of their tasks")
        return {**state, "modules": modules, "holds": holds}

    def few(self, msg, reply):
        need(len(set(reply["tasks"])) == len(reply["tasks"]) <= MOST_TASKS,
             f"'tasks' names {len(reply['tasks'])}; allowed are {MOST_TASKS}, each once")

    @on_client(gives="tasks: names", fits=few)
    def enroll(self, msg, client):
        return {"tasks": sorted(self.tasks(client))}

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number")
    def local(self, msg, client):
        theta, tokens = part(msg, "theta"), client.tokens
        rows = self.tasks(client)[msg["task"]]
        fitted = client.fit(theta, on=[tokens[i] for i in rows])
        return pack(delta=sub(fitted.theta, theta), n=len(rows), loss=fitted.loss)

    def tasks(self, client) -> dict[str, list[int]]:
        """Task -> the client's rows of it."""
        found: dict[str, list[int]] = {}
        for i, row in enumerate(client.data):
            found.setdefault(str(row.get(self.by, "")), []).append(i)
        if "" in found and len(found) > 1:
            raise DataError(f"client '{client.id}' holds {len(found[''])} rows without a '{self.by}' beside rows of "
                            f"the tasks {sorted(found)[1:]}; name the task of every row, or another column by "
                            "method.by")
        return found

    def modules(self, state: State) -> Mapping[str, Tree]:
        return state["modules"]

    def served(self, state: State) -> tuple[Tree, None]:
        """All modules in one tree: no single one of them is the model."""
        return pack(**state["modules"]), None

    def evaluate(self, state: State, clients, on: str) -> Program:
        """Each client tests the modules of its own tasks, each on that task's rows."""
        msgs = {}
        for c in clients:
            held = state["holds"].get(c.id, [])
            mine = {str(i): state["modules"][t] for i, t in enumerate(held) if t in state["modules"]}
            msgs[c.id] = pack(on=on, tasks=held, **mine)
        return (yield Ask(self.score, msgs))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg, client):
        known = {t: part(msg, str(i)) for i, t in enumerate(msg["tasks"])}
        each = [client.score(known.get(t) or client.model.initial(), on=msg["on"], only={self.by: t} if t else None)
                for t in self.tasks(client)]
        n = sum(s["n"] for s in each)
        each = [s for s in each if s["n"]]
        return {m: sum(s[m] * s["n"] for s in each) / n for s in each[:1] for m in s if m != "n"} | {"n": n}
