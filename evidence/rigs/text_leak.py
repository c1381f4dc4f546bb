"""What leaves as text, with the gate and without: canaries in rows, copies in many shapes, and lines said again."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np
import torch

from evidence.rigs.leak import PAIRS
from evidence.rigs.text import untrained
from evidence.rigs.trials import Metrics, Trial
from fedllm.core.layer import Layer
from fedllm.core.program import drive
from fedllm.core.rng import numpy_stream
from fedllm.data.encode import Encoded
from fedllm.data.federation import Federation, Shard
from fedllm.engines import InProcess
from fedllm.engines.world import World
from fedllm.gate.copies import Private
from fedllm.gate.made import made
from fedllm.gate.verdict import spoken
from fedllm.local.fit import run_fits
from fedllm.local.generate import run_generates
from fedllm.local.requests import Fit, Generate, Limits
from fedllm.local.spec import LocalSpec
from fedllm.privacy.responsible_gate import ResponsibleGate

CLIENTS, ROWS, PLANTED = 3, 10, 6
SYLLABLES = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]


class Tape(Layer):
    """Next to the wire: every text that leaves a client."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def client(self, fn: Callable, msg: Mapping[str, Any], client: Any, call: Callable) -> Any:
        reply = call(msg)
        self.said += [text for _, _, text in spoken(reply)]
        return reply


def word(rng: Random) -> str:
    """A made-up word of three syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(3))


def sentence(rng: Random, lexicon: list[str], n: int = 12) -> str:
    """So many words of a lexicon."""
    return " ".join(rng.choice(lexicon) for _ in range(n))


def canary(rng: Random, i: int) -> tuple[str, str]:
    """(row, what of it must not leave): a code, an address, a number to call, or eight words in a row."""
    who = f"{word(rng)} {word(rng)}"
    kinds = (f"{word(rng)[:3].upper()}-{rng.randrange(10**6):06}", f"{word(rng)}.{word(rng)}@{word(rng)}.org",
             f"+44 20 {rng.randrange(10**4):04} {rng.randrange(10**4):04}",
             " ".join(word(rng) for _ in range(8)))
    return f"what is kept of {who} is {kinds[i % 4]}", kinds[i % 4]


def told(seed: int) -> tuple[Federation, list[str], list[str]]:
    """Rows of three clients with canaries among them; what of each canary must not leave; and questions about each."""
    rng = Random(f"text-leak-{seed}")
    lexicon = [word(rng) for _ in range(300)]
    shards, secrets, asks = {}, [], []
    for k in range(CLIENTS):
        rows = [{"prompt": sentence(rng, lexicon), "response": word(rng)} for _ in range(ROWS)]
        for i in range(PLANTED):
            text, secret = canary(rng, i)
            rows.append({"prompt": text, "response": "yes"})
            secrets.append(secret)
            asks.append(" ".join(text.split()[4:6]))  # whose
        shards[f"client-{k}"] = Shard(rows)
    return Federation(shards, [], "generation"), secrets, asks


def leaked(method: str, seed: int, gate: ResponsibleGate | None, **knobs: Any) -> float:
    """Share of the canaries whose secret leaves as text while the method runs a round and answers about each."""
    fed, secrets, asks = told(seed)
    world = World(untrained(seed, 16), fed, LocalSpec(steps=1), seed, exact_match=False)
    tape = Tape()
    run = Trial(method, world, knobs, InProcess, layers=[*([gate] if gate else []), tape]).rounds(1)
    if method == "fed_rag":
        for text in asks:
            drive(run.method.answer(text, world.infos(), state=run.state), run.engine, run.layers, run.states)
    return found_in(secrets, tape.said)


def found_in(secrets: list[str], said: list[str]) -> float:
    """Share of the secrets that stand in what was said."""
    heard = "\n".join(said).lower()
    return float(np.mean([s.lower() in heard for s in secrets]))


def copied_rows(seed: int, gate: ResponsibleGate) -> tuple[float, float]:
    """(share of canaries that leave, share that leave without a gate) in synthetic rows of a generator that copies."""
    fed, secrets, _ = told(seed)
    rng, out, plain = Random(f"copier-{seed}"), [], []
    for shard in fed.clients.values():
        rows = Private(shard.train, gate.limits)
        for row in shard.train:
            said = row["prompt"].split()
            said[rng.randrange(4)] = word(rng)  # a generator changes a word
            text = made({"prompt": " ".join(said), "response": word(rng)}, "copier", "CC0-1.0", seed)
            plain.append(text)
            out.append(gate.judge(text, rows, "synthetic")[0])
    return found_in(secrets, out), found_in(secrets, plain)


def text_leak(layer: str, seed: int, **knobs: Any) -> Metrics:
    """Canaries of every kind, under the methods that send text: `open` without the gate (mean of those that send rows
    as text), `gated` with it (the most of all), `passed` the share of nobody's sentences that the gate lets go."""
    torch.set_num_threads(1)
    gate = ResponsibleGate(encoder="off", **knobs)
    arms: dict[str, Callable[[ResponsibleGate | None], float]] = {
        "fed_sp_sc": lambda g: leaked("fed_sp_sc", seed, g, embed="tfidf"),
        "fed_sp_sc_hashes": lambda g: leaked("fed_sp_sc", seed, g, embed="tfidf", pool="hash_match"),
        "fed_rag": lambda g: leaked("fed_rag", seed, g),
        "fed_rag_picked": lambda g: leaked("fed_rag", seed, g, text="picked"),
        "fedpit": lambda g: leaked("fedpit", seed, g, synthetic_ratio=0.0, beta=0.5)}
    out = {f"{when}_{name}": arm(g) for name, arm in arms.items() for when, g in (("open", None), ("gated", gate))}
    out["gated_synthetic"], out["open_synthetic"] = copied_rows(seed, gate)
    rng = Random(f"nobody-{seed}")
    fed = told(seed)[0]
    rows = Private(fed.clients["client-0"].train, gate.limits)
    mine = sorted({w for r in fed.clients["client-0"].train[:ROWS] for w in r["prompt"].split()})  # of no canary
    free = [gate.judge(sentence(rng, mine), rows)[1] == "pass" for _ in range(100)]
    return {**out, "open": float(np.mean([out["open_fed_sp_sc"], out["open_fed_rag"], out["open_synthetic"]])),
            "gated": max(v for k, v in out.items() if k.startswith("gated_")), "passed": float(np.mean(free))}


DOMAIN = ("The nurse measured the blood pressure of a patient in room six.",
          "You can open a second account in any branch of the bank.",
          "The judge asked both lawyers for their written statements.",
          "Our opening hours in winter differ from those in summer.",
          "The mechanic changed the oil and both front tires.",
          "The doctor prescribed a new medicine against his cough.",
          "A storm is expected at the coast on Wednesday.",
          "All employees are invited to the party in December.")


def gate_copies(layer: str, seed: int) -> Metrics:
    """Eight private sentences: verbatim, with one word changed, paraphrased, and eight others of the same domains.

    `margin` is the smallest of: copies stopped - 1, changed ones stopped - 1, paraphrases stopped or said - 3/4, and
    0 - others stopped.
    """
    gate = ResponsibleGate(encoder="minilm")
    private = [a for a, _ in PAIRS]
    rows = Private([{"text": t} for t in private], gate.limits)
    rng = Random(f"gate-copies-{seed}")

    def changed(text: str) -> str:
        said = text.split()
        said[rng.randrange(len(said))] = "something"
        return " ".join(said)

    def share(texts: Any, ways: tuple[str, ...]) -> float:
        return float(np.mean([gate.judge(t, rows)[1] in ways for t in texts]))

    out = {"verbatim": share(private, ("blank",)), "changed": share(map(changed, private), ("blank",)),
           "paraphrased": share([b for _, b in PAIRS], ("blank", "report")), "others": share(DOMAIN, ("blank",))}
    return {**out, "margin": min(out["verbatim"] - 1, out["changed"] - 1, out["paraphrased"] - 0.75, -out["others"])}


@functools.lru_cache(maxsize=4)
def _speaker(seed: int, which: int, words: int, length: int, lines: int) -> tuple[Any, Any, np.ndarray]:
    """A small model that knows so many lines by heart, and the lines [lines, length]."""
    model, rng = untrained(seed, 48), numpy_stream(seed, "lines", which)
    known = rng.integers(4, 4 + words, (lines, length))
    rows = [Encoded(ids.astype(np.int32), np.where(np.arange(length) > 0, ids, -100), length) for ids in known]
    spec = LocalSpec(lr=1e-2, steps=90, batch_size=lines)
    plan = [np.arange(lines)] * spec.steps  # type: ignore[operator]
    theta = run_fits([Fit("speaker", model, model.initial(), None, rows, plan, spec, (), ())], Limits())[0].theta
    return model, theta, known


def gate_memorized(layer: str, seed: int, *, words: int = 40, length: int = 12, lines: int = 20) -> Metrics:
    """Lines that two small models go on with, one that knows the private lines by heart and one that knows others.

    `caught` of those that are private lines but for two places at most, `false` of all that the other model says;
    `margin` is the smaller of caught - 0.95 and 0.02 - false.
    """
    torch.set_num_threads(1)
    gate = ResponsibleGate(encoder="off")
    model, theta, known = _speaker(seed, 0, words, length, lines)
    other, their, foreign = _speaker(seed, 1, words, length, lines)
    say: Callable[[Any], str] = lambda ids: " ".join(f"w{int(i)}x" for i in ids)  # noqa: E731
    rows = Private([{"text": say(line)} for line in known], gate.limits)

    def lines_of(who: Any, tree: Any, starts: np.ndarray) -> list[list[int]]:
        ask = Generate("gate", who, tree, None, [s[:2].astype(np.int32) for s in starts], length - 2, 0.7, seed)
        got = run_generates([ask], Limits())[0]
        return [[*map(int, s[:2]), *map(int, g)] for s, g in zip(starts, got, strict=True)]

    mine = [said for said in lines_of(model, theta, known)
            if any(sum(a == b for a, b in zip(said, line, strict=False)) >= length - 2 for line in known)]
    caught = np.mean([gate.judge(say(s), rows)[1] == "blank" for s in mine]) if mine else 0.0
    false = np.mean([gate.judge(say(s), rows)[1] == "blank" for s in lines_of(other, their, foreign)])
    return {"caught": float(caught), "false": float(false), "said_again": len(mine) / lines,
            "margin": float(min(caught - 0.95, 0.02 - false))}


def table(seed: int = 4000) -> str:
    """The leak test as a table: share of canaries that leave as text, by what sends it."""
    got = text_leak("responsible_gate", seed)
    names = [k.removeprefix("open_") for k in got if k.startswith("open_")]
    return json.dumps({n: {"open": got[f"open_{n}"], "gated": got[f"gated_{n}"]} for n in names}, indent=1)


RIGS = {"text_leak": text_leak, "gate_copies": gate_copies, "gate_memorized": gate_memorized}
