"""Audit of a finished run: what its model and its messages give away, each figure against a limit that can fail."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.audits import epsilon as empirical
from fedllm.audits import membership
from fedllm.audits.case import Audited, Case, Check
from fedllm.audits.memorized import continuations, encoder, memorized
from fedllm.audits.privacy_audit import PrivacyAudit
from fedllm.core.errors import BudgetSpent, RecipeError, RunError
from fedllm.core.payload import Tree
from fedllm.core.rng import numpy_stream
from fedllm.data import canaries as birds
from fedllm.data.federation import Row, Shard
from fedllm.runs.began import same_as_began, stands_on
from fedllm.runs.build import Parts, bound, build
from fedllm.runs.course import Course
from fedllm.runs.folder import RunFolder
from fedllm.runs.more import served
from fedllm.runs.received import received
from fedllm.runs.result import Result
from fedllm.runs.sections import OWN

FILE = "audit.json"
PARTS = ("membership", "canaries", "memorization", "leak")


def audit_run(path: str | Path, *, gates: PrivacyAudit | None = None, only: Sequence[str] = (), shadows: int = 0,
              rows: int = 1000, transcript: bool = False, trust_remote_code: bool = False) -> Audited:
    """Audit the run in this folder; writes `audit.json` into it.

    `only` names parts (none: all that this run can be audited for); `shadows` runs of the recipe on random halves of
    the rows are made for LiRA. `transcript` has the leak test read the replies that the run kept, and not a fresh
    round. Raises RunError for a run that is not finished, kept no replies or planted no canaries where these are
    asked for.
    """
    gates = gates or PrivacyAudit()
    for name in only:
        if name not in PARTS:
            raise RecipeError(f"audit part {name!r} is unknown; allowed are {', '.join(PARTS)}")
    if shadows == 1 or shadows < 0 or rows < 10:
        raise RecipeError(f"shadows = {shadows}, rows = {rows}: allowed are 0 shadows or 2 and more, and 10 rows up")
    case = _case(Path(path), rows, shadows, transcript, trust_remote_code)
    if case.recipe.data.task not in ("generation", "classification"):
        raise RunError(f"data.task = {case.recipe.data.task!r}: allowed for an audit are generation, classification")
    planted = case.recipe.data.canaries
    if "canaries" in only:
        birds.must_be_planted(planted, path)
    checks: list[Check] = []
    details, left = {}, {}
    for name in only or PARTS:
        if name == "canaries" and not planted:
            left[name] = "none were planted (data.canaries)"
        elif name == "memorization" and case.recipe.data.task != "generation":
            left[name] = "a classifier says no text"
        else:
            found, detail = AUDITS[name](case, gates)
            checks += found
            details[name] = detail
    done = Audited(case.folder.path, checks, details, left)
    case.folder.write_json(FILE, done.as_json())
    return done


def _case(path: Path, rows: int, shadows: int, transcript: bool, trust_remote_code: bool) -> Case:
    folder = RunFolder.open(path)
    if not (folder.path / "result.json").is_file():
        raise RunError(f"{path} is not finished, so there is no model to audit; `fedllm resume {path}` goes on with it")
    recipe = received(folder.path, trust_remote_code)
    if recipe.data.source == OWN or folder.at_sites:
        raise RunError(f"{path} is a run of a real federation: its rows are at the sites, and so are the members that "
                       "an audit would need")
    if transcript and not recipe.record.replies:
        raise RunError(f"{path} kept no transcript; run the recipe with record.replies=true, or audit without "
                       "--transcript (a fresh round is then looked at)")
    parts, last = build(recipe), served(folder)
    same_as_began(folder, stands_on(parts))  # members are told from others by the rows that they were
    if last is None:
        raise RunError(f"{path} has no checkpoint that can be read, so there is no model to audit")
    if not parts.method.serves:
        raise RunError(f"method '{recipe.method.name}' ends with a model of each client's own and none that is handed "
                       "out, so there is nothing that outsiders could ask")
    theta, base = parts.method.served(last[1]["state"])
    return Case(folder, Result.load(folder.path), parts, theta, base, rows, shadows, transcript)


def _membership(case: Case, gates: PrivacyAudit) -> tuple[list[Check], dict[str, Any]]:
    """Training rows against held-out rows of the same clients."""
    federation = case.parts.world.federation
    planted = {str(c.row) for c in _canaries(case)}
    pool = [r for r in federation.pooled() if str(r) not in planted]
    known = {str(r) for r in pool}
    held = [r for s in federation.clients.values() for r in s.test] + list(federation.test)
    ins, outs = case.some(pool, "in"), case.some([r for r in held if str(r) not in known], "out")
    if len(outs) < 10:
        raise RunError(f"{case.folder.path}: {len(outs)} held-out rows are too few to tell members from; 10 are "
                       "needed (data.test, data.client_test)")
    mine, theirs = case.scores(ins), case.scores(outs)
    start = case.parts.world.model.initial()
    before = membership.auc(case.scores(ins, start)["loss"], case.scores(outs, start)["loss"])
    detail: dict[str, Any] = {"members": len(ins), "others": len(outs), "before_training": before,
                              "scores": membership.report(mine, theirs)}
    relative = [case.scores(r)["loss"] - case.scores(r, start)["loss"] for r in (ins, outs)]
    detail["scores"] |= membership.report({"against_start": relative[0]}, {"against_start": relative[1]})
    if case.shadows:
        detail["scores"] |= _lira(case, ins, outs, mine["phi"], theirs["phi"])
        detail["shadows"] = case.shadows
    detail["scores"].pop("phi", None)  # for one model it ranks as the loss does
    detail["clients"] = _by_client(case, theirs["loss"], planted)
    best = max(detail["scores"], key=lambda s: detail["scores"][s]["auc"])
    figure = detail["scores"][best]["auc"]
    return [Check("membership", figure, gates.max_auc, f"AUC of {best}, {len(ins)} training rows against "
                  f"{len(outs)} held out; before training {before:.2f}")], detail


def _by_client(case: Case, others: np.ndarray, planted: set[str]) -> dict[str, float]:
    """AUC of each client's own rows, by loss."""
    out = {}
    for client, shard in case.parts.world.federation.clients.items():
        mine = case.some([r for r in shard.train if str(r) not in planted], client)[:100]
        out[client] = membership.auc(case.scores(mine)["loss"], others) if mine else float("nan")
    return out


def _lira(case: Case, ins: Sequence[Row], outs: Sequence[Row], mine: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Runs of the recipe on random halves of all these rows, as many as there are shadows."""
    rows = [*ins, *outs]
    phi, inside = [], []
    for s in range(case.shadows):
        coins = numpy_stream(case.recipe.seed, "shadow", s).random(len(rows)) < 0.5
        theta, base = shadow_run(case.parts, [r for r, c in zip(rows, coins, strict=True) if c], s)
        phi.append(case.scores(rows, theta, base)["phi"])
        inside.append(coins)
    score = membership.lira(np.concatenate([mine, theirs]), np.array(phi), np.array(inside))
    return membership.report({"lira": score[: len(ins)]}, {"lira": score[len(ins) :]})


def shadow_run(parts: Parts, rows: Sequence[Row], number: int) -> tuple[Tree, Tree | None]:
    """The served model of the same recipe on these rows, shared out in the sizes of the real clients."""
    federation = parts.world.federation
    sizes = np.array([len(s.train) for s in federation.clients.values()])
    cuts = np.cumsum(np.maximum(1, sizes * len(rows) // max(1, sizes.sum())))[:-1]
    shares = np.split(np.arange(len(rows)), np.minimum(cuts, len(rows) - 1))
    shards = {c: Shard([rows[i] for i in share] or [rows[0]])
              for c, share in zip(federation.clients, shares, strict=True)}
    world = replace(parts.world, federation=replace(federation, clients=shards), seed=parts.world.seed + 1000 + number)
    recipe = parts.recipe.model_copy(update={"seed": parts.recipe.seed + 1000 + number})
    layers = bound(parts.layers, recipe, {c: len(s.train) for c, s in shards.items()}, world.local)
    course = Course(replace(parts, recipe=recipe, world=world, layers=layers), parts.method, layers)
    with contextlib.suppress(BudgetSpent):  # it may end where the run itself did
        for round in range(recipe.rounds):
            course.step(round)
    return parts.method.served(course.state)


def _canaries(case: Case) -> list[birds.Canary]:
    world, spec = case.parts.world, case.recipe.data
    return birds.canaries(list(world.federation.clients), spec.canaries, case.recipe.seed, world.model.tokenizer,
                          world.federation.labels) if spec.canaries else []


def _canary_audit(case: Case, gates: PrivacyAudit) -> tuple[list[Check], dict[str, Any]]:
    """Exposure, and the epsilon that telling planted from unplanted canaries refutes."""
    world, spec, all_ = case.parts.world, case.recipe.data, _canaries(case)
    rows, inside = [c.row for c in all_], np.array([c.planted for c in all_])
    start = world.model.initial()
    fresh = birds.random_rows(numpy_stream(case.recipe.seed, "canary candidates"), 1000,
                              birds.usual_words(world.model.tokenizer), world.federation.labels)
    now, then = case.scores(rows)["loss"], case.scores(rows, start)["loss"]
    others = case.scores(fresh)["loss"]
    exposed = birds.exposures(-now, -others)
    mean, absent = float(exposed[inside].mean()), float(exposed[~inside].mean())
    detail: dict[str, Any] = {
        "planted": int(inside.sum()), "not_planted": int((~inside).sum()), "copies": spec.canary_copies,
        "exposure": mean, "exposure_not_planted": absent, "most": float(np.log2(len(fresh) + 1)),
        "auc": membership.auc(now[inside], now[~inside])}
    checks = [Check("exposure", mean, gates.max_exposure,
                    f"bits, mean of {int(inside.sum())} planted canaries ({absent:.2f} of those not planted)")]
    claims = [x for x in (case.result.privacy or {}).get("layers", []) if "epsilon" in x]
    low = empirical.one_run(now - then, inside, min([x["delta"] for x in claims], default=0.0))
    detail["empirical_epsilon"] = low | {"claimed": [{k: x.get(k) for k in ("layer", "unit", "epsilon", "delta")}
                                                     for x in claims]}
    for x in claims:
        # a row more or less makes another client of its client, which is one client less and one more
        factor = spec.canary_copies * (2 if x.get("unit") == "client" else 1)
        checks.append(Check("empirical_epsilon", low["epsilon"], factor * float(x["epsilon"]),
                            f"at least so much was spent, by {low['right']} of {low['guesses']} right guesses; "
                            f"{x['layer']} claims {x['epsilon']:.3g} a {x.get('unit')}"))
    return checks, detail


def _memorization(case: Case, gates: PrivacyAudit) -> tuple[list[Check], dict[str, Any]]:
    """Training rows that the model continues word for word or in other words, beside held-out rows."""
    world = case.parts.world
    held = list(world.federation.test) or [r for s in world.federation.clients.values() for r in s.test]
    ins, outs = (replace(case, rows=min(case.rows, 100)).some(r, w)
                 for r, w in ((world.federation.pooled(), "said"), (held, "held")))
    vectors, named = encoder(world.model, case.theta)

    def said(rows: Sequence[Row]) -> dict[str, Any]:
        coded = [e for e in case.encoded(rows)]
        got = continuations(world.model, case.theta, case.base, coded, world.limits)
        tokenizer: Any = world.model.tokenizer
        wanted = [tokenizer.decode(e.ids[len(e.prompt):], skip_special_tokens=True) for e in coded]
        return memorized(got, wanted, vectors)

    mine, other = said(ins), said(outs) if outs else {"verbatim": 0.0, "near": 0.0, "cosine": 0.0, "rows": 0}
    excess = max(0.0, mine["verbatim"] - other["verbatim"])
    near = max(0.0, mine["near"] - other["near"])
    detail = {"trained_on": mine, "held_out": other, "encoder": named}
    return [Check("verbatim", excess, gates.max_memorized, f"{mine['verbatim']:.1%} of training rows said word for "
                  f"word, {other['verbatim']:.1%} of held-out rows"),
            Check("near_duplicates", near, gates.max_memorized, f"{mine['near']:.1%} of training rows said at least in "
                  f"other words, {other['near']:.1%} of held-out rows ({named.partition(' (')[0]})")], detail


def _leak(case: Case, gates: PrivacyAudit) -> tuple[list[Check], dict[str, Any]]:
    from fedllm.audits.audit_leak import leaks

    found = leaks(case)
    over = {name: max(0.0, a["f1"] - a["guess_f1"]) for name, a in found["attacks"].items()}
    best = max(over, key=over.__getitem__, default="")
    needs = _needs(found["spans"], case, best)
    tried = f"{', '.join(over)}; strongest {best}{needs}" if over else "no attack has a hold"
    return [Check("text_leak", max(over.values(), default=0.0), gates.max_leak, "F1 of a client's tokens over a guess "
                  f"({tried}); the server sees {found['sees']}, {found['from']}")], found


def _needs(spans: Mapping[str, Any], case: Case, best: str) -> str:
    """What the span tests need of batch, rank and layer, and what this run gives them."""
    local = case.parts.world.local
    if not spans or best not in ("dager", "lora_leak"):
        return ""
    return (f" on the first block: it saw {spans['rank']} of {spans['width']} directions ({spans['verdict']}), and "
            "needs one step of SGD on fewer different tokens than that in all of a sum; a batch here has "
            f"{local.batch_size} rows, the client {spans['inputs']} different tokens")


AUDITS: Mapping[str, Callable[[Case, PrivacyAudit], tuple[list[Check], dict[str, Any]]]] = {
    "membership": _membership, "canaries": _canary_audit, "memorization": _memorization, "leak": _leak}
