"""Findings of docs/results/security.md that no other test holds, each as the tester tried it; and that the tests which
that page and docs/security.md name are there."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from fedllm.api import run
from fedllm.core.ask import Ask
from fedllm.core.errors import RecipeError
from fedllm.core.payload import pack
from fedllm.core.program import Fold
from fedllm.engines.far.reasons import Refused
from fedllm.federation.admission import admitted
from fedllm.federation.operate import Tally
from fedllm.federation.settings import SiteSettings
from fedllm.methods.baselines.fedavg import FedAvg
from fedllm.privacy.he_ckks import HECKKS
from fedllm.report.report import write_report
from fedllm.runs.build import build
from fedllm.runs.complaints import parse_yaml
from fedllm.runs.recipe import load_recipe, read_recipe
from tests.methods.conftest import begin

ROOT = Path(__file__).parents[2]
ALIASES = "versions: &a {x: y}\n" + "".join(f"k{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '*a'] * 9)}]\n"
                                            for i in range(9))


@pytest.mark.parametrize("odd, why", [
    ({"n": -1000}, "'n'"), ({"n": True}, "'n'"), ({"n": "abc"}, "'n'"), ({"n": 1e308}, "'n'"), ({"n": 10**9}, "'n'"),
    ({"loss": float("inf")}, "infinity"), ({"delta/w": torch.full((2,), 3e38)}, "long, allowed is"),
    ({"delta/w": torch.ones(2, dtype=torch.int64)}, "delta/w"), ({"delta/w": "x"}, "delta/w"),
    ({"delta/w": torch.ones(2, dtype=torch.bool)}, "delta/w"), ({"delta/w": torch.ones(3)}, "delta/w")])
def test_an_odd_reply_that_comes_first_is_refused_by_name_and_the_others_count(odd, why):
    told = {c: pack(theta={"w": torch.zeros(2)}) for c in "abc"}
    fold = Fold(Ask(FedAvg().local, told), rows=dict.fromkeys("abc", 5))
    good = {**pack(delta={"w": torch.ones(2)}), "n": 5, "loss": 0.5}
    assert not fold.take("a", {**good, **odd}) or fold.outvoted()
    assert fold.take("b", good) and fold.take("c", good)
    out = fold.done()
    assert out.answered == ("b", "c") and why in out.missing["a"]
    torch.testing.assert_close(out.value["delta/w"], torch.ones(2))


def test_a_quorum_that_nobody_can_meet_is_refused_and_a_count_works_under_encryption(recipe):
    with pytest.raises(RecipeError, match=r"clients.quorum = 100 is not allowed with 3 clients a round"):
        build(load_recipe(recipe, {"clients.quorum": 100}))
    secret = begin("fedavg", engine="in_process", sizes=(2, 2, 2), layers=(HECKKS(),))
    secret.engine.quorum = 2
    assert secret.go(1).state


def test_what_would_never_end_is_refused_soon(recipe):
    began = time.monotonic()
    for text in (ALIASES, "a: " + "[" * 500, "x: 0x" + "f" * 5000):
        with pytest.raises(RecipeError):
            read_recipe({**recipe, "versions": parse_yaml(text, "r.yaml")})
    with pytest.raises(RecipeError, match="and more: 2000 complaints"):
        read_recipe({**recipe, **{f"key{i}": i for i in range(2000)}})
    for key, value in {"rounds": 10**9, "engine.threads": 100_000, "data.canaries": 2**31, "rounds ": True}.items():
        with pytest.raises(RecipeError):
            read_recipe(recipe, {key: value})
    assert time.monotonic() - began < 30


def test_a_hostile_member_is_text_in_the_report_and_counted_in_status(recipe, tmp_path):
    evil = "<script>alert(1)</script>"
    folder = run(recipe, root=tmp_path, rounds=1, evaluate={"exact_match": False, "samples": 0}).folder
    clients = json.loads((folder / "clients.json").read_text())
    clients[0] |= {"id": evil, "rank": evil}
    (folder / "clients.json").write_text(json.dumps(clients))
    with (folder / "events.jsonl").open("a") as log:
        for kind in ("refused", "missing", "left_out"):
            log.write(json.dumps({"kind": kind, "round": 0, "client": evil, "why": evil}) + "\n")
    assert evil not in write_report(folder).read_text()
    assert Tally(folder).look().as_json()["sites"][evil]["refused"] == 1


def test_a_coordinators_recipe_imports_nothing_at_a_site(recipe, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("judge = 1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = SiteSettings(data=recipe["data"]["source"], store=str(tmp_path / "s"), models=[recipe["model"]])
    asked = read_recipe(recipe, {"evaluate.metric": "call:evil:judge"}).model_dump()
    with pytest.raises(Refused, match=r"call:evil:judge; named here are none"):
        admitted(asked, settings)
    assert "evil" not in sys.modules


@pytest.mark.parametrize("page", ["docs/security.md", "docs/results/security.md"])
def test_every_test_that_the_pages_name_is_there(page):
    text = (ROOT / page).read_text()
    tests = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "tests").rglob("test_*.py")}
    whole = "\n".join(tests.values())
    for path in set(re.findall(r"`(tests/[\w/]+\.py)", text)):
        assert path in tests, path
    named = set(re.findall(r"\b(test_[a-z0-9_]+)(\.\.\.)?(?![\w/]|\.py)", text))  # `...` ends a name that is cut
    assert len(named) > 20
    for name, cut in named:
        assert re.search(rf"def {name}" + ("" if cut else r"\("), whole), name
