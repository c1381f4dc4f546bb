"""What share of planted secrets leaves as text under each method, with the gate and without: `python -m
evidence.text_leaks [ARM ...]`.

Three clients hold rows among which canaries stand. The embedded model works, and a tape next to the wire hears every
text that leaves a client and every text that the server hands to one. Cells that docs/results/text_leaks.json holds are
not measured again (`--fresh`: they are); the page beside it is written from it.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evidence.leak_arms import APART, ARMS
from evidence.rigs.text_leak import canary, sentence, word
from fedllm.core.client import SERVER
from fedllm.core.errors import ClientError, FedLLMError
from fedllm.core.layer import Facts, Layer
from fedllm.core.program import drive
from fedllm.data.federation import Federation, Shard
from fedllm.engines import Vectorized
from fedllm.engines.world import World
from fedllm.gate.verdict import spoken
from fedllm.local.spec import LocalSpec
from fedllm.methods.registry import make_method
from fedllm.models.load import load_model
from fedllm.models.model import Model
from fedllm.models.shelf import Shelf
from fedllm.privacy.responsible_gate import ResponsibleGate
from fedllm.runs.layers import make_layer
from fedllm.runs.store import write_atomic
from fedllm.spaces import make_space

log = logging.getLogger(__name__)
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
CLIENTS, ROWS, PLANTED, SEEDS = 3, 8, 8, (0, 1, 2)
KINDS = ("code", "address", "number to call", "eight words")
LABELS = ("praise", "blame")


class Tape(Layer):
    """Next to the wire: what leaves a client as text, and what it is told."""

    def __init__(self, words: Tensor | None = None) -> None:
        """With `words` [V, d], the token embeddings, tensors of as many columns are read as their nearest tokens."""
        self.up: list[tuple[str, str]] = []
        self.down: list[tuple[str, str]] = []
        self.words, self.read = words, list[tuple[str, Tensor]]()

    def client(self, fn: Callable, msg: Mapping[str, Any], client: Any, call: Callable) -> Any:
        if client.id == SERVER:
            return call(msg)
        self.down += [(client.id, text) for _, _, text in spoken(msg)]
        reply = call(msg)
        self.up += [(client.id, text) for _, _, text in spoken(reply)]
        if self.words is not None:
            self.read += [(client.id, x) for x in reply.values()
                          if isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == self.words.shape[1]]
        return reply

    def decoded(self, tokenizer: Any) -> None:
        """What tensors of embeddings say, as text that left."""
        for who, x in self.read:
            for row in x:
                self.up.append((who, tokenizer.decode(torch.cdist(row.float(), self.words.float()).argmin(1))))  # type: ignore[union-attr]


@functools.lru_cache(maxsize=8)
def loaded(task: str, seed: int) -> Model:
    """The embedded model."""
    labels = LABELS if task == "classification" else ()
    return load_model("embedded", task, make_space("lora", rank=8), labels=labels, seed=seed, device="cpu")


def planted(task: str, seed: int) -> tuple[Federation, dict[str, list[str]], list[str]]:
    """Clients' rows, the secrets of each client in the order of `KINDS`, and a question about each secret."""
    rng = Random(f"text-leaks-{seed}")
    lexicon, shards, secrets, asks = [word(rng) for _ in range(300)], {}, {}, []
    for k in range(CLIENTS):
        texts, mine = [sentence(rng, lexicon, 10) for _ in range(ROWS)], []
        for i in range(PLANTED):
            text, secret = canary(rng, i)
            texts.append(text)
            mine.append(secret)
            asks.append(" ".join(text.split()[4:6]))  # whose
        shards[f"client-{k}"] = Shard([row(task, t, i, rng) for i, t in enumerate(texts)])
        secrets[f"client-{k}"] = mine
    public = [row(task, sentence(rng, lexicon, 10), i, rng) for i in range(8)]
    return Federation(shards, [], task, LABELS if task == "classification" else (), public), secrets, asks


def row(task: str, text: str, i: int, rng: Random) -> dict[str, Any]:
    """A row with this text; answers are numbers."""
    if task == "classification":
        return {"text": text, "label": i % len(LABELS)}
    return {"prompt": text, "response": f"So the answer is {rng.randrange(100)}."}


def measure(name: str, gated: bool, seed: int) -> dict[str, Any]:
    """One cell: the arm's rounds (and answers) with canaries among the rows."""
    torch.set_num_threads(1)
    arm = ARMS[name]
    fed, secrets, asks = planted(arm.task, seed)
    model, named = loaded(arm.task, seed), {m: functools.partial(loaded, "generation", seed) for m in arm.models}
    spec = LocalSpec(lr=1e-2, steps=2, batch_size=8, max_length=128)
    world = World(model, fed, spec, seed, exact_match=False, models=Shelf(named))
    tape = Tape(model.words if name == "fed_synth_upload" else None)
    facts = Facts({c.id: c.n for c in world.infos()}, CLIENTS, arm.rounds, spec)
    layers: list[Any] = [make_layer(n, dict(k), "layers").bind(facts) for n, k in arm.layers]
    layers += [*([ResponsibleGate(encoder="off")] if gated else []), tape]
    method = make_method(arm.method, **arm.knobs)
    engine, ended = Vectorized((method, *layers), world), ""
    states, state = [layer.init() for layer in layers], method.init(model)
    try:
        for t in range(arm.rounds):
            engine.begin(t)
            state = drive(method.round(state, world.infos()), engine, layers, states)
            engine.commit()
        for text in asks if arm.asks else ():
            drive(method.answer(text, world.infos(), state=state), engine, layers, states)
    except ClientError:  # the arm itself does not run here: what did not leave says nothing
        raise
    except FedLLMError as error:  # whatever had left by then has left
        ended = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    if tape.words is not None:
        tape.decoded(model.tokenizer)
    return {**told(tape, secrets), "ended": ended}


def told(tape: Tape, secrets: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Shares of the canaries that left their client, by kind, and that another client was told."""
    up, down = ({c: "\n".join(t for who, t in side if who == c).lower() for c in secrets}
                for side in (tape.up, tape.down))
    left = {c: [s.lower() in up[c] for s in mine] for c, mine in secrets.items()}
    reached = [any(s.lower() in down[o] for o in secrets if o != c) for c, mine in secrets.items() for s in mine]
    kinds = {kind: float(np.mean([hit for hits in left.values() for hit in hits[i :: len(KINDS)]]))
             for i, kind in enumerate(KINDS)}
    return {"left": float(np.mean([x for hits in left.values() for x in hits])), "reached": float(np.mean(reached)),
            "kinds": kinds, "texts_up": len(tape.up), "texts_down": len(tape.down)}


def cell_of(name: str, gated: bool, seed: int) -> str:
    """What the cell is called in the file."""
    return f"{name} {'gated' if gated else 'open'} {seed}"


def run(names: Sequence[str], file: Path, fresh: bool = False, budget: float | None = None) -> dict[str, Any]:
    """Measure what the file lacks of these arms, and write it and the page beside it after every cell; all cells."""
    cells, began = ({} if not file.is_file() else json.loads(file.read_text())), time.process_time()
    for name in names:  # of ARMS the quick ones come first
        for seed in SEEDS:
            for gated in (False, True):
                key = cell_of(name, gated, seed)
                late = budget is not None and time.process_time() - began > budget
                if late or (key in cells and not fresh):
                    continue
                try:
                    cell = measure(name, gated, seed)
                except ClientError as error:
                    log.error("%s is no cell: %s", key, error)
                    continue
                if cell["ended"] and not gated:  # only a gate may stop an arm: else 0 % would be no finding
                    log.error("%s is no cell: %s", key, cell["ended"])
                    break
                cells[key] = cell
                write_atomic(file, (json.dumps(dict(sorted(cells.items())), indent=1) + "\n").encode())
                write_atomic(file.with_suffix(".md"), page(cells).encode())
    return cells


HEAD = f"""# What leaves as text: planted secrets, with the gate and without

<!-- written by `python -m evidence.text_leaks`; the figures are those of text_leaks.json -->

Three clients hold {ROWS + PLANTED} rows each, of which {PLANTED} hold a secret: in turn a code, an address, a number to
call and eight words in a row. The embedded model works at clients and at the server, and a tape next to the wire hears
every text. *Left* is the share of secrets that stand word for word in a text that left their client; *reached* the
share that the server told another client. The gate is the layer `responsible_gate` as it comes, without the encoder for
paraphrases. Means over seeds (least to most). What trained weights remember is no text: `fedllm audit` looks for that.

| arm | what leaves | texts up | left, open | left, gated | reached, open | reached, gated |
|---|---|---:|---:|---:|---:|---:|
"""


def page(cells: Mapping[str, Any]) -> str:
    """The table, and what has to be said of it."""
    lines, ends, by_kind = [], [], []
    for name, arm in ARMS.items():
        got = {gated: [c for s in SEEDS if (c := cells.get(cell_of(name, gated, s)))] for gated in (False, True)}
        if not all(got.values()):
            lines.append(f"| `{name}` | {arm.says} | | not measured | | | |")
            continue
        shares = [spread([c[key] for c in got[gated]]) for key in ("left", "reached") for gated in (False, True)]
        texts = round(np.mean([c["texts_up"] for c in got[False]]))
        lines.append(f"| `{name}` | {arm.says} | {texts} | {' | '.join(shares)} |")
        for gated, some in got.items():
            ends += [f"- `{name}`, {'gated' if gated else 'open'}: {why}" for why in sorted({
                c["ended"] for c in some} - {""})]
            if any(c["left"] for c in some):
                each = ", ".join(f"{kind} {np.mean([c['kinds'][kind] for c in some]):.0%}" for kind in KINDS)
                by_kind.append(f"- `{name}`, {'gated' if gated else 'open'}: {each}")
    out = HEAD + "\n".join(lines) + "\n"
    out += f"\nSeeds: {', '.join(map(str, SEEDS))}. Cells measured: {len(cells)} of {2 * len(ARMS) * len(SEEDS)}.\n"
    out += "\n## By kind of secret, where any left\n\n" + "\n".join(by_kind) + "\n" if by_kind else ""
    out += "\n## Runs that ended before their end\n\n" + "\n".join(ends) + "\n" if ends else ""
    apart = "\n".join(f"- `{name}`: {why}" for name, why in APART.items())
    return f"{out}\n## Not here, though their cards say that text leaves\n\n{apart}\n"


def spread(values: Sequence[float]) -> str:
    """A mean share, with the least and the most where they differ."""
    ends = "" if max(values) == min(values) else f" ({min(values):.0%} to {max(values):.0%})"
    return f"{np.mean(values):.0%}{ends}"


def main() -> None:
    """Measure the arms named (none: all), and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("arm", nargs="*", help=", ".join(ARMS))
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds")
    parser.add_argument("--budget", type=float, help="no cell is begun after so many CPU-seconds")
    given = parser.parse_args()
    if odd := [a for a in given.arm if a not in ARMS]:
        parser.error(f"there is no arm '{odd[0]}'; there are {', '.join(ARMS)}")
    logging.disable(logging.WARNING)
    run(given.arm or list(ARMS), RESULTS / "text_leaks.json", given.fresh, given.budget)


if __name__ == "__main__":
    main()
