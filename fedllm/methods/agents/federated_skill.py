"""FederatedSkill: clients patch their libraries of skills, and the server writes each client a merge of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import Client
from fedllm.core.form import aligned, need
from fedllm.core.method import Card, Claim, Method, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.methods import _library as lib
from fedllm.methods._skills import PATH, merged, solve, used
from fedllm.models import retrieval as rt

RIG = {"rig": "skills", "metric": "right", "relative": "difference", "holds": ">", "baseline": "federated_skill"}


@dataclass(frozen=True)
class FederatedSkill(Method):
    """One library for all breaks where clients' tools differ: a client keeps what works for it, and of what it lacks it
    gets the variant of whoever agrees with it elsewhere.

    A row is a task (`prompt`) and the call that solves it here (`response`). A skill is a file `skills/WORD.md` with
    the form of the call for tasks that have the word; a program fills it in with the task's values.
    """

    card = Card(
        title="FederatedSkill: patches to libraries of skills, merged for each client",
        paper="Yang, Yao, Zhang, Kompella, Liu, Chang, FederatedSkill, arXiv 2606.03143, 2026",
        topic="agents",
        sends="up: skills that were written or dropped, the reward of each here, and how often the client's library "
              "worked; down: the client's new library; no task, value or trace",
        needs="rows of tasks and calls; a program solves tasks and writes skills",
        kinds=("text",),
        claim=Claim("where clients' tools have two dialects, libraries merged for each client solve more of all tasks "
                    "than one library by the highest reward", threshold=0.0,
                    against={"knobs": {"merge_by": "reward"}}, **RIG),
        also={"alone": Claim("and more than skills of one's own", threshold=0.0, against={"alone": True}, **RIG),
              "pooled": Claim("one learner with everybody's tasks, and so one library, solves fewer of them",
                              threshold=0.0, against={"pooled": True}, **RIG),
              "order": Claim("a merge does not depend on the order in which patches came", rig="skills", metric="order",
                             holds="<=", threshold=0.0, kind="exact")},
        evidence="From a dossier that read the released code, where a model writes skills and merges: here programs "
                 "do. `reward` is the code's deterministic merge. Whom a client resembles is ours: the share of skills "
                 "that both have and have alike. Rewards are told by clients, and a liar would win.",
    )
    trial = Trial(far={"data.fields": {"prompt": "task_prompt", "response": "task_response"}},
                  apart="its skills are text and it trains nothing; tests/methods/test_federated_skill tries it")
    metrics: ClassVar = {"right": "max"}
    serves, only_fits, mixes = False, False, "text"

    merge_by: Literal["client", "reward"] = knob("client", "a merge for each client, or one by the highest reward",
                                                 options=("client", "reward"))
    works: float = knob(0.5, "reward from which a skill counts as working", gt=0, le=1)
    least: int = knob(2, "tasks of a word before a skill is written", ge=1)
    share: Literal["patches", "nothing"] = knob("patches", "nothing: each client keeps its own, for comparison",
                                                options=("patches", "nothing"))

    def init(self, model: Any) -> State:
        return {"theta": {}, "libraries": {}, "rewards": {}}

    def round(self, state: State, clients: Sequence[Any]) -> Program:
        out = yield Ask(self.patch, {c.id: self.down(state, c.id) for c in clients})
        mine, rewards = dict(state["libraries"]), dict(state["rewards"])
        for c, r in out.items():
            dropped = set(r["deletes"])
            mine[c] = {p: t for p, t in {**mine.get(c, {}), **dict(zip(r["paths"], r["texts"], strict=True))}.items()
                       if p not in dropped}
            rewards[c] = {**rewards.get(c, {}), **dict(zip(r["tried"], r["rewards"], strict=True))}
        if self.share == "nothing":
            return state
        return {**state, "libraries": merged(mine, rewards, self.works, self.merge_by == "client"), "rewards": rewards}

    def down(self, state: State, client: str) -> Payload:
        library = state["libraries"].get(client, {})
        return {"paths": list(library), "texts": list(library.values())}

    def fits(self, msg: Payload, reply: Payload) -> None:
        aligned(reply, ("paths", "texts"))
        aligned(reply, ("tried", "rewards"))
        bad = [p for p in (*reply["paths"], *reply["deletes"], *reply["tried"]) if not PATH.fullmatch(p)]
        need(not bad, f"a patch writes to {bad[0][:60] if bad else ''!r}; allowed is skills/WORD.md")
        need(all(len(t) <= lib.ENTRY for t in reply["texts"]), f"'texts' holds a skill above {lib.ENTRY} characters")
        need(all(0 <= r <= 1 for r in reply["rewards"]), "'rewards' holds a number that is not from 0 to 1")

    @on_client(gives="paths: names, texts: texts, deletes: names, tried: names, rewards: numbers", fits=fits)
    def patch(self, msg: Payload, client: Client) -> Payload:
        library = client.memory.get("library", {}) | dict(zip(msg["paths"], msg["texts"], strict=True))
        new, dropped, rewards = {}, [], {}
        for word, tasks in self.by_word(client.data).items():
            path = f"skills/{word}.md"
            worth = float(np.mean([solve(t["prompt"], library.get(path, "")) == t["response"] for t in tasks]))
            if worth < self.works:  # a gap, or a skill that does not work here
                forms = [lib.masked(t["response"]) for t in tasks]
                form = max(sorted(set(forms)), key=forms.count)
                mine = float(np.mean([solve(t["prompt"], form) == t["response"] for t in tasks]))
                if mine >= self.works:
                    new[path], worth = form, mine
                elif path in library:
                    dropped.append(path)
            if path in library or path in new:
                rewards[path] = worth
        client.memory["library"] = {p: t for p, t in {**library, **new}.items() if p not in dropped}
        if self.share == "nothing":
            return {"paths": [], "texts": [], "deletes": [], "tried": [], "rewards": []}
        return {"paths": list(new), "texts": list(new.values()), "deletes": dropped, "tried": list(rewards),
                "rewards": list(rewards.values())}

    def by_word(self, rows: Sequence[Any]) -> dict[str, list[Any]]:
        """Tasks by the word that their call has too."""
        out: dict[str, list[Any]] = {}
        for row in rows:
            for w in set(rt.words(row["prompt"])) & set(re.findall(r"[a-z]+", row["response"].lower())):
                out.setdefault(w, []).append(row)
        return {w: tasks for w, tasks in sorted(out.items()) if len(tasks) >= self.least}

    def evaluate(self, state: State, clients: Sequence[Any], on: str) -> Program:
        return (yield Ask(self.score, {c.id: {**self.down(state, c.id), "on": on} for c in clients}))

    @on_client(gives="n: count, *: number", test=True)
    def score(self, msg: Payload, client: Client) -> Payload:
        rows = client.held_out(msg["on"])
        library = dict(zip(msg["paths"], msg["texts"], strict=True)) or client.memory.get("library", {})
        return {"n": len(rows), "right": float(np.mean([used(r["prompt"], library) == r["response"] for r in rows]))
                } if rows else {"n": 0}
