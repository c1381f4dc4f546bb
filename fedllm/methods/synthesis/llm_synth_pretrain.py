"""A large public model filters, writes and rewrites text for a small private one, which learns it before any client."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.core.ask import Ask, Program, on_server
from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.core.method import Card, Claim, State, Trial, knob
from fedllm.core.payload import Payload
from fedllm.gate.copies import distinct
from fedllm.gate.made import made
from fedllm.gate.personal import personal, redacted
from fedllm.methods._warm import WarmStart

WAYS = ("public", "filtered", "generated", "transformed")
PLAIN = {"knobs": {"public": 1.0, "filtered": 0.0, "generated": 0.0, "transformed": 0.0}}
STYLES = {"rig": "styles", "options": {"knobs": {"generated": 0.5, "filtered": 0.5, "transformed": 0.0}}}


@dataclass(frozen=True)
class LLMSynthPretrain(WarmStart):
    """Public text that the large model takes for the target's, text that it writes like it, and public text that it
    rewrites, in shares that add up to one; what is left after the checks trains the small model; then FedAvg.

    Prompts are the recipe's words and public rows. Nothing of a client's is read before the first round.
    """

    card = Card(
        title="Prompting public LLMs to synthesize data for private on-device models",
        paper="Wu, Xu, Zhang, Zhang, Ramage, Prompt Public Large Language Models to Synthesize Data for Private "
              "On-device Applications, 2024, arXiv 2404.04360",
        topic="LLMs for federated learning: synthesis",
        sends="as fedavg, from where the server's training ended",
        needs="a generation task; public text at the server; a language model by name (models), or the run's own",
        claim=Claim("a small model from scratch, pre-trained on text that a large one filtered and wrote, has after "
                    "two rounds a lower loss on the clients' kind of text than one pre-trained on public text for as "
                    "many steps", metric="loss", baseline="llm_synth_pretrain", relative="difference", holds="<",
                    threshold=0.0, grid={"local.lr": (3e-3, 1e-2)}, against=PLAIN, **STYLES),
        also={"before": Claim("and so before any client took part", metric="before", baseline="llm_synth_pretrain",
                              relative="difference", holds="<", threshold=0.0, against=PLAIN, **STYLES),
              "blocked": Claim("every planted notice of copyright is kept out (share left)", metric="notices",
                               holds="<=", threshold=0.0, kind="exact", **STYLES)},
        evidence="Abstract read, and a dossier. The paper's 166 billion tokens are the recipe's few rows here. The "
                 "later filter by a privately tuned model is public_dp_distill's matching.",
    )
    trial = Trial({"warm_steps": 0})
    only_fits = True
    generator: str = knob("", "name of the recipe's model that is asked; empty: the run's own")
    use: str = knob("a chat message", "what the text is for, in words that anybody may know")
    public: float = knob(0.0, "share of public text as it is (for comparison)", ge=0, le=1)
    filtered: float = knob(0.4, "share of public text that the model takes for the target's", ge=0, le=1)
    generated: float = knob(0.4, "share of text that it writes", ge=0, le=1)
    transformed: float = knob(0.2, "share of public text that it rewrites", ge=0, le=1)
    n_synth: int = knob(200, "texts in all, before checks", ge=1)
    topics: tuple[str, ...] = knob(("work", "family", "travel", "food", "music"), "what texts are written about")
    filter_ask: str = knob("Is this likely {use}? Answer yes or no.\n{text}\nAnswer:", "asks about a public text")
    generate_ask: str = knob("Write {use} about {topic}:\n", "asks for a new text")
    transform_ask: str = knob("Rewrite this as {use}:\n{text}\nRewritten:\n", "asks for another wording")
    temperature: float = knob(1.0, "of sampling", gt=0)
    max_new_tokens: int = knob(64, "longest text", ge=1)
    dedupe: float = knob(0.7, "share of common pieces from which a text counts as another again", gt=0, le=1)
    blocked: tuple[str, ...] = knob(("©", "(?i)copyright", "(?i)all rights reserved"), "patterns of what is left out")
    license: Literal["CC0-1.0", "CC-BY-4.0", "MIT", "proprietary"] = knob(
        "CC0-1.0", "of what is synthesized", options=("CC0-1.0", "CC-BY-4.0", "MIT", "proprietary"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(sum(self.shares) - 1) > 1e-6:
            raise RecipeError(f"LLMSynthPretrain.shares = {list(self.shares)} is not allowed; they are of "
                              f"{', '.join(WAYS)}, and must add up to 1")
        try:
            [re.compile(p) for p in self.blocked]
        except re.error as error:
            raise RecipeError(f"LLMSynthPretrain.blocked = {list(self.blocked)} is not allowed: {error}") from None

    @property
    def shares(self) -> Sequence[float]:
        return [getattr(self, way) for way in WAYS]

    def check(self, model: Any) -> None:
        if model.task != "generation":
            raise CompositionError(f"method 'llm_synth_pretrain' writes text and data.task is {model.task!r}, so they "
                                   "do not fit together; data.task = 'generation' works")

    def asks_for(self) -> Sequence[str]:
        return (self.generator,) if self.generator and self.warm_steps else ()

    def public_at(self):
        return ("server",) if self.warm_steps and self.generated < 1 else ()

    def gathered(self, state: State, clients) -> Program:
        out = yield Ask(self.written, {SERVER: {"n": self.n_synth}})
        return out[SERVER]["rows"]

    @on_server
    def written(self, msg: Payload, client: Any) -> Payload:
        """All text, by whom and how, after the checks."""
        said = list[tuple[str, str]]()
        seed = int(client.rng("synth").integers(2**31))
        texts = [client.model.tokenizer.decode(e.ids, skip_special_tokens=True).strip() for e in client.public]
        for i, (way, share) in enumerate(zip(WAYS, self.shares, strict=True)):
            want = round(share * msg["n"])
            got = self.by(way, client, texts, want, seed + 1_000_003 * i) if want else []
            said += [(way, t.strip()) for t in got if t.strip()][:want]
        kept = [(way, redacted(t, personal(t))) for way, t in said if not any(re.search(p, t) for p in self.blocked)]
        keep = distinct([t for _, t in kept], self.dedupe)
        if not keep or len(keep) == 1 < len(said):
            raise DataError(f"method 'llm_synth_pretrain' has {len(keep) or 'no'} text left of {len(said)}: the model '"
                            f"{self.generator or 'of the run'}' wrote nothing, repeats itself, or all is blocked")
        by = self.generator or client.model.name or "main"
        return {"rows": [made({"prompt": "", "response": kept[i][1]}, by, self.license, seed, how=kept[i][0])
                         for i in keep]}

    def by(self, way: str, client: Any, texts: Sequence[str], want: int, seed: int) -> list[str]:
        """So many texts, or as many as there are, made this way."""
        order = [texts[i] for i in client.rng(f"synth {way}").permutation(len(texts))]
        if way == "public":
            return order[:want]
        if way == "generated":
            about = [self.topics[i % len(self.topics)] for i in range(want)]
            return self.said(client, [self.generate_ask.format(use=self.use, topic=t) for t in about], seed)
        ask = self.filter_ask if way == "filtered" else self.transform_ask
        some = order[: 4 * want] if way == "filtered" else order[:want]
        answers = self.said(client, [ask.format(use=self.use, text=t) for t in some], seed, way == "filtered")
        if way == "transformed":
            return answers
        return [t for t, a in zip(some, answers, strict=True) if a.strip().lower().startswith("yes")][:want]

    def said(self, client: Any, prompts: Sequence[str], seed: int, greedy: bool = False) -> list[str]:
        """What the large model says to each prompt."""
        if not prompts:
            return []
        who = client.holding(self.generator) if self.generator else client
        new, heat = (4, 0.0) if greedy else (self.max_new_tokens, self.temperature)
        return [c.text for c in who.complete(prompts, new, heat, seed)]
