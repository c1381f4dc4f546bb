"""Text leak of a run's own configuration: what its server can read of a client's text from one round's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from fedllm.audits._span import BLOCK
from fedllm.audits.att_dager import DAGER
from fedllm.audits.att_decepticons import Decepticons, Forging
from fedllm.audits.att_film import FILM
from fedllm.audits.att_gradient_inversion import Inversion
from fedllm.audits.att_lora_leak import LoraLeak
from fedllm.audits.recovered import compare, guess
from fedllm.audits.view import ServerView
from fedllm.core.errors import RunError
from fedllm.core.layer import Layer
from fedllm.core.payload import Tree, part, sub
from fedllm.core.program import drive
from fedllm.data.encode import Encoded
from fedllm.models.load import eager_encoder
from fedllm.models.model import HeadedEncoder, Model
from fedllm.runs.course import Course
from fedllm.runs.folder import RunFolder
from fedllm.runs.tape import Playback
from fedllm.spaces.space import PEFT

CAUSAL = ("generation", "preference")


def leaks(case: Any) -> dict[str, Any]:
    """`sees`, `from` (the run's transcript or a fresh round), the `client` that was read, and each attack's figures."""
    view, client = _transcript(case) if case.recipe.record.replies else _round(case, [])
    world = case.parts.world
    rows = world.encoded(client, "train")
    public = [e.ids.tolist() for e in world.encoded("__global__", "test")[:500]]
    moved = change(view, client)
    attacks: dict[str, Any] = {}
    table = next((moved[n] for n in names_of(world.model.net, world.model.net.get_input_embeddings().weight)
                  if n in moved), None)
    if table is not None:
        found = FILM().bag(table, _tied(world.model.net))
        attacks["film_bag"] = _figures([found], [sorted({int(t) for e in rows for t in e.ids})], public, bag=True)
    if isinstance(world.model.net, GPT2LMHeadModel) and any(".mlp.c_fc.weight" in n for n in moved):
        attacks["decepticons"] = _forged(case, client, public)
    spans = _spanned(case, moved, part(view.told.get(client, {}), "theta"), rows, public, attacks)
    if isinstance(world.model.net, HeadedEncoder) and moved:
        attacks["gradient_inversion"] = _inverted(case, client, moved, part(view.told.get(client, {}), "theta"), public)
    return {"sees": "sums only" if view.sums else "each reply", "client": client,
            "from": "by the transcript of round 1" if case.recipe.record.replies else "in a fresh round",
            "trainables_seen": len(moved), "embeddings_seen": table is not None, "spans": spans, "attacks": attacks}


def _spanned(case: Any, moved: Tree, told: Tree, rows: Sequence[Encoded], public: Sequence[Sequence[int]],
             attacks: dict[str, Any]) -> dict[str, Any]:
    """The span tests of a causal model, into `attacks`; what they hung on: `rank`, `width`, whether they `leak` or why
    not, and how many different `inputs` the client has."""
    model = case.parts.world.model
    if model.task not in CAUSAL or not isinstance(model, Model) or not any(BLOCK.search(n) for n in moved):
        return {}
    told = told if told.keys() >= moved.keys() else model.initial()
    got = DAGER(longest=max(len(e.ids) for e in rows)).read(model, told, moved)
    real = [e.ids.tolist() for e in rows]
    if got.why == "nothing" and not got.width:
        return {}
    attacks["dager"] = _figures(got.rows, real, public)
    out: dict[str, Any] = {"rank": got.rank, "width": got.width, "verdict": got.why,
                           "inputs": len({t for row in real for t in row[:-1]})}
    if channels := LoraLeak().read(model, told, moved):
        bag = sorted({t for c in channels for t in c.tokens})
        attacks["lora_leak"] = _figures([bag], [sorted({t for row in real for t in row})], public, bag=True)
        out["channels"] = [{"module": c.module, "factor": c.factor, "rank": c.rank, "seen": c.seen,
                            "tokens": len(c.tokens), "verdict": c.verdict} for c in channels]
    return out


def change(view: ServerView, client: str) -> Tree:
    """What the server sees of how this client's trainables moved; the mean of all of them where it sees sums."""
    said = (view.value or {}) if view.sums else view.each.get(client, {})
    if moved := part(said, "delta"):
        return moved
    theta, told = part(said, "theta"), part(view.told.get(client, {}), "theta")
    return sub(theta, told) if theta and theta.keys() == told.keys() and all(
        theta[n].shape == told[n].shape for n in theta) else {}


def names_of(net: nn.Module, weight: Any) -> list[str]:
    """Every name under which this parameter stands in the network."""
    return [n for n, p in net.named_parameters(remove_duplicate=False) if p is weight]


def _tied(net: Any) -> bool:
    head = net.get_output_embeddings() if isinstance(net, nn.Module) and "get_output_embeddings" in dir(net) else None
    return head is not None and head.weight is net.get_input_embeddings().weight


def _round(case: Any, below: Sequence[Layer], may_fail: bool = False) -> tuple[ServerView, str]:
    """One round of the recipe from the start, watched from above its layers."""
    parts = case.parts
    view = ServerView(parts.layers)
    course = Course(parts, parts.method, [view, *parts.layers], below=below)
    facts = course.step(0)
    if "skipped" in facts and not may_fail:
        raise RunError(f"{case.folder.path}: the round that the leak test looks at was skipped: {facts['skipped']}")
    return view, next(iter(view.each), facts["cohort"][0])


def _transcript(case: Any) -> tuple[ServerView, str]:
    """Round 0 of the run again, from the replies that it kept."""
    folder: RunFolder = case.folder
    first = folder.load(0)
    cohorts = [e["cohort"] for e in folder.events(lambda e: e["kind"] == "round" and e["round"] == 0)]
    if first is None or not cohorts:
        raise RunError(f"{folder.path} has no first round to look at")
    parts = case.parts
    view = ServerView(parts.layers)
    engine = Playback(folder.path / "replies", None, case.recipe.clients.quorum)
    engine.begin(0)
    cohort = [c for c in parts.world.infos() if c.id in cohorts[0]]
    layers = [view, *parts.layers]
    states = [{**layer.init(), **kept} for layer, kept in zip(parts.layers, first[1]["layers"], strict=False)]
    drive(parts.method.round(first[1]["state"], cohort), engine, layers, [{}, *states])  # secrets of noise are gone
    return view, next(iter(view.each), cohorts[0][0])


def _forged(case: Any, client: str, public: Sequence[Sequence[int]]) -> Mapping[str, float]:
    """The same round with forged weights in the place of the model: prompts are read too, where the loss spreads."""
    world, how = case.parts.world, Decepticons(spread=True)
    weights = how.forge(world.model.net)
    view, _ = _round(case, [Forging(weights)], may_fail=True)  # vetting clients do not answer
    rows = world.encoded(client, "train")
    seen = {n: -t for n, t in change(view, client).items()}
    found = how.read(world.model.net, weights, seen, len(rows)) if seen else []
    return _figures([[row[p] for p in sorted(row)] for row in found], [e.ids.tolist() for e in rows], public)


ROWS = 4
"""Of a client's round that many rows are looked for at most; a search for more takes long and finds less."""


def _inverted(case: Any, client: str, moved: Tree, told: Tree, public: Sequence[Sequence[int]]) -> Mapping[str, float]:
    """Inverting Gradients on the change, as if it were one step on the client's first rows, whose labels and longest
    length the server is taken to know. Of LoRA it sees what the B factors and the head say."""
    world, recipe = case.parts.world, case.recipe
    net = eager_encoder(recipe.model.name, len(world.model.labels), recipe.model.pooling)
    net.load_state_dict(world.model.net.state_dict())
    own = dict(net.named_parameters())
    words = names_of(net, net.get_input_embeddings().weight)
    seen, views = {}, {}
    for name, t in moved.items():
        plain = name.removeprefix(PEFT)
        path, _, factor = plain.partition(".lora_")
        if factor == "B.weight" and f"{path}.weight" in own:
            plain, views[f"{path}.weight"] = f"{path}.weight", told[f"{PEFT}{path}.lora_A.weight"].T.float()
        if plain in own and plain not in words and (plain in views or own[plain].shape == t.shape):
            seen[plain] = (-t.float(), torch.ones_like(t, dtype=torch.bool))
    with torch.no_grad():
        for name, t in told.items():
            if (plain := name.removeprefix(PEFT)) in own and own[plain].shape == t.shape:
                own[plain].copy_(t)
    rows = world.encoded(client, "train")[:ROWS]
    length = max(len(e.ids) for e in rows)
    found = Inversion.variant("cos", restarts=1, seed=recipe.seed).recover_rows(
        net, seen, length, len(rows), [int(e.labels) for e in rows], views=views)  # type: ignore[arg-type]
    return _figures(found, [e.ids.tolist() for e in rows], public)


def _figures(found: Sequence[Sequence[int]], real: Sequence[Sequence[int]], public: Sequence[Sequence[int]],
             bag: bool = False) -> dict[str, float]:
    """Precision, recall, F1 and ROUGE-L of what was found, and of as long a guess from public text.

    Of a `bag` of different words the guess is one too.
    """
    texts = [sorted(set(r)) for r in public] if bag else public
    blind = compare(guess(texts, [len(r) for r in real]), real)
    got = compare(found, real)
    f1 = lambda r: 2 * r.precision * r.recall / max(1e-12, r.precision + r.recall)  # noqa: E731
    return {**got.as_json(), "f1": f1(got), "guess_precision": blind.precision, "guess_recall": blind.recall,
            "guess_rouge_l": blind.rouge_l, "guess_f1": f1(blind)}
