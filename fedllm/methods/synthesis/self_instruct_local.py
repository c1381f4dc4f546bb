"""Self-Instruct at home: a client grows its few instructions by what the model makes of them, and trains on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.core.ask import on_client
from fedllm.core.errors import RecipeError
from fedllm.core.method import Card, Claim, Star, State, Trial, knob
from fedllm.core.payload import Tree, add, pack, part, sub
from fedllm.core.reduce import Mean
from fedllm.methods._bootstrap import Filter, Frame, picked
from fedllm.methods._rewrite import need_generation

Row = Mapping[str, Any]
POOL = "pool"


@dataclass(frozen=True)
class SelfInstructLocal(Star):
    """FedAvg over each client's rows and those that the shared model wrote with some of them before its eyes.

    The pool grows until it has `target` machine-made rows for each of the client's own, or until `max_attempts`
    requests brought nothing more; it is kept at the client, which never sends a row of it. A model that repeats itself
    ends the search, and the client trains on what it has (`novel` says how many of its texts were taken).
    """

    card = Card(
        title="Self-Instruct inside a client",
        paper="Wang, Kordi, Mishra, Liu, Smith, Khashabi, Hajishirzi, Self-Instruct: Aligning Language Models with "
              "Self-Generated Instructions, ACL 2023, arXiv 2212.10560",
        topic="LLMs for federated learning: synthesis",
        sends="down: the adapter; up: its change, and how many rows the model wrote for it",
        needs="a generation task; a model that goes on with demonstrations; clients that remember",
        claim=Claim("clients with six rows each end with a lower loss on fresh rows of their kind than FedIT's after "
                    "as many steps", rig="few_rows", metric="loss", baseline="fedit", relative="difference", holds="<",
                    threshold=0.0, grid={"local.lr": (1e-3, 3e-3)}),
        also={"novel": Claim("no row of a pool is nearer than ROUGE-L 0.7 to any other of it (the nearest)",
                             rig="few_rows", metric="nearest", holds="<=", threshold=0.7, kind="exact",
                             options={"rounds": 1})},
        evidence="Authors' filters, demonstrations (six seeds, two machine-made), temperature and ROUGE-L bound read "
                 "by the dossier. Ours: instruction and response come in one continuation, so that the step which "
                 "tells classification from other tasks falls away, and rows have no third field.",
    )
    trial = Trial({"target": 0.0}, far={"method.target": 0.0})
    only_fits = False
    target: float = knob(2.0, "machine-made rows for each of the client's own; 0 is FedAvg", ge=0)
    num_prompt_instructions: int = knob(8, "demonstrations in a prompt", ge=1)
    machine_share: int = knob(2, "of these at most so many machine-made", ge=0)
    rouge_max: float = knob(0.7, "most ROUGE-L of a new instruction to any other; 1 keeps all", gt=0, le=1)
    least_words: int = knob(4, "words of the shortest instruction", ge=1)
    most_words: int = knob(150, "words of the longest instruction", ge=1)
    ascii_only: bool = knob(True, "take only instructions that begin with ASCII, as the paper does")
    batch: int = knob(5, "prompts in a request", ge=1)
    max_attempts: int = knob(20, "requests of a round, at the most", ge=1)
    temperature: float = knob(0.7, "of sampling", gt=0)
    max_new_tokens: int = knob(256, "longest machine-made row", ge=1)
    template: str = knob("Instruction: {prompt}\nResponse: {response}\n\n", "how a demonstration is written")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            marks = Frame(self.template).marks
        except ValueError as error:
            raise RecipeError(f"SelfInstructLocal.template = {self.template!r} is not allowed; {error}") from None
        assert marks
        if self.machine_share >= self.num_prompt_instructions:
            raise RecipeError(f"SelfInstructLocal.machine_share = {self.machine_share} is not allowed with "
                              f"num_prompt_instructions = {self.num_prompt_instructions}; it must be smaller: some "
                              "demonstration must be a row of the client's own")

    def check(self, model: Any) -> None:
        need_generation("SelfInstructLocal", model)

    @on_client(reduce=Mean(), gives="delta: tree, n: rows, loss?: number, synthetic: count, novel: number")
    def local(self, msg, client):
        w, own = part(msg, "theta"), list(client.data)
        pool, novel = self.grown(client, w, own)
        fitted = client.fit(w, on=[*own, *pool]) if pool else client.fit(w)
        return pack(delta=sub(fitted.theta, w), n=client.n, loss=fitted.loss, synthetic=float(len(pool)), novel=novel)

    def merge(self, state: State, out) -> State:
        return {**state, "theta": add(state["theta"], part(out.value, "delta"))}

    def grown(self, client: Any, w: Tree, own: Sequence[Row]) -> tuple[list[Row], float]:
        """The client's machine-made rows, after this round's requests, and the share of these that was taken."""
        wanted = round(self.target * len(own))
        pool: list[Row] = [dict(r) for r in client.memory.get(POOL, [])]
        rng, frame, asked, taken = client.rng("self_instruct"), Frame(self.template), 0, 0
        judge = Filter(self.least_words, self.most_words, self.rouge_max, self.ascii_only)
        for _ in range(self.max_attempts if len(pool) < wanted else 0):
            prompts = [frame.shown(picked(rng, own, pool, self.num_prompt_instructions, self.machine_share))
                       for _ in range(self.batch)]
            for text in client.generate(prompts, w, max_new_tokens=self.max_new_tokens, temperature=self.temperature):
                asked += 1
                row = frame.read(text)
                if row and len(pool) < wanted and judge.why(row, [*own, *pool]) is None:
                    pool.append(row)
                    taken += 1
            if len(pool) >= wanted:
                break
        client.memory[POOL] = pool
        return pool, taken / asked if asked else 0.0
