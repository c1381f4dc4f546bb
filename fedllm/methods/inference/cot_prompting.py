"""Chain-of-thought prompting: clients share worked examples, their rows choose among them, a model reasons aloud."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER, Client
from fedllm.core.errors import RecipeError
from fedllm.core.form import aligned, need
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.methods.asking import Asking
from fedllm.models import questions as qa

THINK, EXTRACT = "Let's think step by step.", "The answer is"
VALUE = r"\s*\$?(-?\d+(?:,\d{3})*(?:\.\d+)?)"
ANSWER = rf"(?:[Tt]he )?[Aa]nswer is:?{VALUE}|####{VALUE}"
COLUMNS = ("questions", "rationales", "answers")
Example = Mapping[str, str]


@dataclass(frozen=True)
class CoTPrompting(Asking):
    """Question, rationale, answer: examples in front of a question, n samples of the model's own, and the majority."""

    card = Card(
        title="Chain-of-thought prompting with shared examples",
        paper="Wei et al., Chain-of-Thought Prompting Elicits Reasoning in Large Language Models, NeurIPS 2022, arXiv "
              "2201.11903; votes: Wang et al., Self-Consistency, ICLR 2023, arXiv 2203.11171",
        topic="prompt learning: chain of thoughts",
        sends="up: TEXT of at most `offered` rows a client, none of those marked `withheld`, and how often each "
              "example helped; down: the examples",
        needs="rows with prompt and response (the rationale, and the answer as `answer_pattern` finds it); a text "
              "model, ours or an endpoint; no training", kinds=("text",),
        claim=Claim("a small model that learned sums of four numbers with their steps written down is right more "
                    "often, asked so, than one that learned answers alone from as many tokens", rig="steps",
                    metric="accuracy", baseline="cot_prompting", relative="difference", holds=">", threshold=0.0,
                    options={"knobs": {"mode": "cot"}}, against={"knobs": {"mode": "standard"}}),
        evidence="From memory and a dossier. The paper's gains appear in models of about 1e11 weights, which no test "
                 "here has: the claim is the honest small form. An example is scored by itself, not in company.",
    )
    trial = Trial({"max_new_tokens": 6, "candidates": 3, "validation": 1, "answer_pattern": r"(w\d+)"},
                  far={"rounds": 1, "method.answer_pattern": r"(\w+)"})
    mode: Literal["cot", "standard", "zero_shot_cot"] = knob(
        "cot", "examples with their rationales, examples with answers alone, or none and an invitation to think",
        options=("cot", "standard", "zero_shot_cot"))
    exemplars: int = knob(8, "examples in front of a question", ge=0, le=32)
    offered: int = knob(4, "rows that a client offers as examples: its first", ge=0)
    candidates: int = knob(16, "offered examples that are tried, from all clients by turns", ge=1)
    validation: int = knob(4, "own rows, the last, on which a client tries each; 0: they are taken as they come", ge=0)
    n_samples: int = knob(1, "answers that vote", ge=1, le=64)
    temperature: float = knob(0.0, "of sampling; above 0 where several samples vote", ge=0)
    answer_pattern: str = knob(ANSWER, "regular expression whose first filled group is the answer")
    max_new_tokens: int = knob(256, "longest rationale", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples > 1 and not self.temperature:
            raise RecipeError(f"CoTPrompting.temperature = 0 is not allowed with n_samples = {self.n_samples}: all "
                              "would say the same; it must be > 0")
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise RecipeError(f"CoTPrompting.answer_pattern = {self.answer_pattern!r}: {error}") from None
        if not groups:
            raise RecipeError(f"CoTPrompting.answer_pattern = {self.answer_pattern!r} has no group; the answer must "
                              "stand in one")

    def init(self, model: Any) -> State:
        return {"theta": {}, "shown": [], "scores": []}

    def round(self, state: State, clients) -> Program:
        """Collect examples, let every client try each on rows of its own, and keep the best."""
        if self.mode == "zero_shot_cot" or not self.exemplars:
            return state
        out = yield Ask(self.offer, {c.id: {} for c in clients})
        each = [[dict(zip(COLUMNS, row, strict=True)) for row in zip(*(r[k] for k in COLUMNS), strict=True)]
                for r in out.values()]
        turns = [own[i] for i in range(max(map(len, each), default=0)) for own in each if i < len(own)]
        some, scores = turns[: self.candidates], [0.0] * len(turns[: self.candidates])
        if self.validation and some:
            told = {k: [e[k] for e in some] for k in COLUMNS}
            tried = yield Ask(self.tried, {c.id: told for c in clients})
            n = sum(r["n"] for r in tried.values()) or 1
            scores = [sum(r["right"][i] for r in tried.values()) / n for i in range(len(some))]
        best = sorted(range(len(some)), key=lambda i: -scores[i])[: self.exemplars]
        return {**state, "shown": [some[i] for i in best], "scores": [scores[i] for i in best]}

    def answer(self, query: str, clients, asker: str | None = None, state: State | None = None) -> Program:
        """Returns `Voted` for one query; its answer is None where no sample states one."""
        shown, query = (state or {}).get("shown", []), qa.one_line(query)
        heads = [self.preamble(shown) + self.asked(query)] * self.n_samples
        said = yield from self.say(heads, [SERVER] * len(heads), self.max_new_tokens, self.temperature)
        ways = [qa.one_turn(s.text) for s in said]
        if self.mode == "zero_shot_cot":  # a second call asks for the answer alone
            more = [f"{h} {w} {EXTRACT}" for h, w in zip(heads, ways, strict=True)]
            last = yield from self.say(more, [SERVER] * len(more), 16)
            ways = [f"{w} {EXTRACT} {qa.one_turn(t.text)}" for w, t in zip(ways, last, strict=True)]
        return qa.vote([qa.Thought(query, w, qa.stated(w, self.answer_pattern), s.logprob,
                                   (s.prompt_tokens, s.completion_tokens))
                        for w, s in zip(ways, said, strict=True)], "logprob")

    def asked(self, question: str) -> str:
        return f"Q: {question}\nA:" + f" {THINK}" * (self.mode == "zero_shot_cot")

    def preamble(self, shown: Sequence[Example]) -> str:
        way = (lambda e: f"{e['rationales']} ".lstrip()) if self.mode == "cot" else (lambda e: "")
        return "".join(f"Q: {e['questions']}\nA: {way(e)}{EXTRACT} {e['answers']}.\n\n" for e in shown)

    def example(self, row: Mapping[str, Any]) -> tuple[str, str, str] | None:
        """Question, rationale and answer of a row; None where its response states no answer."""
        said, answer = str(row["response"]), qa.stated(str(row["response"]), self.answer_pattern)
        at = [m.start() for m in re.finditer(self.answer_pattern, said)]
        return (qa.one_line(row["prompt"]), qa.one_line(said[: at[-1]]), answer) if answer is not None else None

    @on_client(gives="questions: texts, rationales: texts, answers: texts",
               fits=lambda self, msg, reply: aligned(reply, COLUMNS, len(reply["questions"])))
    def offer(self, msg: Payload, client: Client) -> Payload:
        mine = [e for row in client.data if not row.get("withheld") and (e := self.example(row))][: self.offered]
        return {k: [e[i] for e in mine] for i, k in enumerate(COLUMNS)}

    def counted(self, msg: Payload, reply: Payload) -> None:
        need(len(reply["right"]) == len(msg["questions"]) and all(0 <= x <= reply["n"] for x in reply["right"]),
             f"'right' has {len(reply['right'])} counts of {reply['n']}; allowed is one for each example")

    @on_client(gives="right: numbers, n: count", fits=counted)
    def tried(self, msg: Payload, client: Client) -> Payload:
        """On how many of its own rows the model is right behind each example."""
        mine = [e for row in client.data[-self.validation :] if (e := self.example(row))]
        rows = [e for e in mine if e[0] not in msg["questions"]]
        shown = [dict(zip(COLUMNS, e, strict=True)) for e in zip(*(msg[k] for k in COLUMNS), strict=True)]
        said = client.complete([self.preamble([e]) + self.asked(q) for e in shown for q, _, _ in rows],
                               self.max_new_tokens) if rows else []
        told = iter(qa.stated(qa.one_turn(s.text), self.answer_pattern) for s in said)
        return {"right": [float(sum(next(told) == a for _, _, a in rows)) for _ in shown], "n": len(rows)}
