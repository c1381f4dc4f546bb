"""Fed-SP-SC and Fed-DP-CoT: many users' wordings of one question vote on its answer, and voted answers teach others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_client
from fedllm.core.client import SERVER
from fedllm.core.form import aligned
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.methods.asking import Asking
from fedllm.models import questions as qa
from fedllm.models.similar import nearest

THINK, EXTRACT = "Let's think step by step.", "Therefore, the answer is"
ANSWER_TOKENS = 16
DISCLAIMER = "The examples below come from other users; their answers may contain mistakes.\n\n"


@dataclass(frozen=True)
class FedSPSC(Asking):
    """Ask a question in the words of several users and let the answers vote, or show voted answers as examples.

    The server sees the questions that it uses; with `pool="hash_match"` only hashes of others, which hide no numbers.
    """

    card = Card(
        title="Fed-SP-SC: synonymous questions with self-consistency (and Fed-DP-CoT)",
        paper="Liu, Pang, Fan, Federated Prompting and Chain-of-Thought Reasoning, KSEM 2023, arXiv 2304.13911",
        topic="prompt learning: chain of thoughts",
        sends="up: questions, or two hashes of each and the text of those that match; down: the answer",
        needs="a text model, ours or an endpoint; no training", kinds=("text",),
        claim=Claim("a vote over five wordings is right more often than the mean wording", rig="synonyms",
                    metric="gain", holds=">", threshold=0.0),
        evidence="written from a dossier, not the paper; no code is public. Ours: prompts, hashes, thresholds")
    trial = Trial({"max_new_tokens": 16, "embed": "tfidf"}, far={"rounds": 1})
    mode: Literal["sp_sc", "dp_cot"] = knob("sp_sc", "vote over synonyms, or show voted answers of like questions",
                                            options=("sp_sc", "dp_cot"))
    pool: Literal["raw", "hash_match"] = knob("raw", "clients send questions, or hashes and then what matches",
                                              options=("raw", "hash_match"))
    model_at: Literal["server", "clients"] = knob("server", "whose model answers a wording: the server's, its author's",
                                                  options=("server", "clients"))
    n_synonyms: int = knob(4, "other wordings that vote beside the question", ge=0)
    similarity_threshold: float | None = knob(None, "least cosine; None: 0.8, and 0.15 with tfidf", ge=-1, le=1)
    vote_tiebreak: Literal["logprob", "first"] = knob("logprob", "of equally many: the likeliest, or the first asked",
                                                      options=("logprob", "first"))
    n_demos: int = knob(4, "worked examples in front of the question (dp_cot)", ge=0)
    disclaimer: bool = knob(True, "say that the examples may contain mistakes (dp_cot)")
    min_agreement: float = knob(0.0, "least share of agreeing wordings for an example (dp_cot)", ge=0, le=1)
    temperature: float = knob(0.0, "of sampling; 0 is greedy, since the wordings differ already", ge=0)
    max_new_tokens: int = knob(256, "longest rationale", ge=1)
    embed: str = knob("auto", "similarity by 'minilm', 'tfidf', 'auto' (whichever is installed) or a callable")

    def init(self, model: Any) -> State:
        return {"theta": {}, "pool": []}

    def round(self, state: State, clients) -> Program:
        """Collect the pool once, for many queries; with dp_cot, vote on each question ahead of time."""
        pool = yield from self.gather(clients)
        if self.mode == "dp_cot" and self.pool == "raw":
            votes = yield from self.votes([(e.text, e.client) for e in pool], pool)
            pool = [replace(e, answer=v.answer, rationale=v.rationale, agreement=v.agreement)
                    for e, v in zip(pool, votes, strict=True)]
        return {**state, "pool": [asdict(e) for e in pool]}

    def answer(self, query: str, clients, asker: str | None = None, state: State | None = None) -> Program:
        """Returns `Voted` for one query; `asker` is the client who gets the answer, `state` holds a collected pool."""
        query = qa.one_line(query)
        pool = [qa.Entry(**e) for e in state["pool"]] if state else (yield from self.gather(clients))
        pool = [e for e in pool if e.client != asker]
        if self.mode == "sp_sc":
            [got] = yield from self.votes([(query, asker)], pool)
        else:
            demos = yield from self.demonstrations(query, pool)
            [own] = yield from self.think([(query, asker)], self.preamble(demos))
            got = replace(qa.vote([own]), demos=tuple(demos))
        if asker is not None:
            yield Ask(self.told, {asker: {"question": query, "answer": got.answer, "agreement": got.agreement}})
        return got

    def votes(self, asked: Sequence[tuple[str, str | None]], pool: Sequence[qa.Entry]) -> Program:
        """Each (question, author)'s answer by the majority of its wordings, the question's own first."""
        groups = []
        for q, author in asked:
            same, _ = qa.skeleton(q)
            match = [e for e in pool if self.n_synonyms and e.same == same]  # none wanted, none asked for
            alike = [e for e in (yield from self.nearest(q, match, qa.one_line))
                     if qa.numbers(e.text) == qa.numbers(q)]  # a hash is only the client's word
            groups.append([(q, author), *((e.text, e.client) for e in alike[: self.n_synonyms])])
        thoughts = iter((yield from self.think([wording for group in groups for wording in group])))
        return [qa.vote([next(thoughts) for _ in group], self.vote_tiebreak) for group in groups]

    def demonstrations(self, query: str, pool: Sequence[qa.Entry]) -> Program:
        """Voted answers to questions of the query's pattern with other numbers, the nearest first."""
        same, pattern = qa.skeleton(query)
        others = [e for e in pool if self.n_demos and e.same != same and (self.pool == "raw" or e.pattern == pattern)]
        near = (yield from self.nearest(query, others, qa.mask))[: self.n_demos]
        fresh = iter((yield from self.votes([(e.text, e.client) for e in near if not e.agreement], pool)))
        voted = [replace(qa.Voted(e.text, e.answer, e.rationale, e.agreement) if e.agreement else next(fresh),
                         author=e.client) for e in near]
        return [v for v in voted if v.answer is not None and v.agreement >= self.min_agreement]

    def nearest(self, query: str, entries: Sequence[qa.Entry], view: Callable[[str], str]) -> Program:
        """Entries whose texts are alike enough to the query under `view`, the nearest first, none twice."""
        hidden = {c: [e for e in entries if e.client == c and e.text is None] for c in {e.client: 0 for e in entries}}
        wanted = {c: {"wanted": [e.same + e.pattern for e in es]} for c, es in hidden.items() if es}
        out = (yield Ask(self.reveal, wanted)) if wanted else {}
        shown = [e for e in entries if e.text] + [replace(e, text=qa.one_line(t)) for c, reply in out.items()
                                                  for e, t in zip(hidden[c], reply["texts"], strict=False)]
        found = {e.text: e for e in sorted(shown, key=lambda e: e.client, reverse=True) if e.text not in ("", query)}
        return [found[t] for t in nearest(query, list(found), view, self.embed, self.similarity_threshold)]

    def think(self, asked: Sequence[tuple[str, str | None]], preamble: str = "") -> Program:
        """Zero-shot chain of thought: let the model reason on each wording, then ask it for the answer alone."""
        at = [author if author and self.model_at == "clients" else SERVER for _, author in asked]
        heads = [f"{preamble}Q: {q}\nA: {THINK}" for q, _ in asked]
        said = yield from self.say(heads, at, self.max_new_tokens, self.temperature)
        ways = [qa.one_turn(s.text) for s in said]
        asks = [f"{h} {w} {EXTRACT}" for h, w in zip(heads, ways, strict=True)]
        told = yield from self.say(asks, at, ANSWER_TOKENS)  # greedy: the answer is in the rationale
        return [qa.Thought(q, w, qa.parse(qa.one_turn(t.text), q, before=w), t.logprob,
                           (s.prompt_tokens + t.prompt_tokens, s.completion_tokens + t.completion_tokens), author)
                for (q, author), w, s, t in zip(asked, ways, said, told, strict=True)]

    def preamble(self, demos: Sequence[qa.Voted]) -> str:
        shown = "".join(f"Q: {d.question}\nA: {THINK} {d.rationale} {EXTRACT} {d.answer}.\n\n" for d in demos)
        return DISCLAIMER * bool(shown and self.disclaimer) + shown

    def gather(self, clients) -> Program:
        """The pool: each question, or only its hashes."""
        out = yield Ask(self.offer, {c.id: {} for c in clients})
        return ([qa.Entry(c, *qa.skeleton(t), qa.one_line(t)) for c, r in out.items() for t in r.get("texts", ())]
                + [qa.Entry(c, h[: qa.HASH], h[qa.HASH :]) for c, r in out.items() for h in r.get("hashes", ())])

    @on_client(gives="texts?: texts, hashes?: names")
    def offer(self, msg, client):
        mine = qa.pooled(client.data)
        return {"texts": mine} if self.pool == "raw" else {"hashes": ["".join(qa.skeleton(t)) for t in mine]}

    @on_client(gives="texts: texts", fits=lambda self, msg, reply: aligned(reply, ("texts",), len(msg["wanted"])))
    def reveal(self, msg, client):
        mine = {"".join(qa.skeleton(t)): t for t in qa.pooled(client.data)}
        return {"texts": [mine.get(h, "") for h in msg["wanted"]]}

    @on_client(gives="")
    def told(self, msg, client):
        client.memory["answers"] = [*client.memory.get("answers", []), dict(msg)]
        return {}
