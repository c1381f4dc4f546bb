"""Noise that sites share, over the line of a real federation: the simulation's sums whoever drops out, and ledgers."""

import importlib.util
import os
import signal

import pytest

from fedllm.api import run
from fedllm.core.errors import RecipeError
from fedllm.core.layer import Facts
from fedllm.core.payload import digest
from fedllm.core.record import Record
from fedllm.engines import InProcess
from fedllm.engines.far.line import Silence
from fedllm.federation.coordinator import drive_run
from fedllm.federation.ledger import SiteLedger
from fedllm.federation.nvflare.loopback import events, until
from fedllm.local.spec import LocalSpec
from fedllm.privacy.accountant import Ledger, Release, noise_for
from fedllm.privacy.dp_sgd import DPSGD
from fedllm.privacy.secagg import SecAgg
from fedllm.runs.build import build
from fedllm.runs.course import Course
from fedllm.runs.recipe import load_recipe
from tests.engines.flare_rig import write_data
from tests.engines.test_flare import QUICK, SITES, Line, far_folder, one_at_a_time, recipe  # noqa: F401

SHARED = {"name": "dp_sgd", "noise": "shared", "epsilon": 8.0, "clip_norm": 0.1}
STEP = {"optimizer": "sgd", "lr": 0.5, "steps": 1, "batch_size": 64}
TREE = {"name": "dp_ftrl", "unit": "example", "epsilon": 8.0, "clip_norm": 0.1, "restart_every": 4}
HIDES = {"name": "secagg", "threshold": 0.5}
"""Of three sites two open a sum."""
PLUS = {**HIDES, "name": "secagg_plus", "degree": 2, "corrupt": 0.0}
FOUR = (*SITES, "site-d")


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path)
    return tmp_path


def private(folder, model, *layers, **more):
    return recipe(folder, model, layers=list(layers), **{
        "rounds": 2, "local": STEP, "evaluate": {"clients": False, "samples": 0},
        "clients": {"quorum": 2, "deadline": 60.0}, **more})


class Lossy(InProcess):
    """The simulation in which site-c does not answer the method's question of round 1."""

    def send(self, asks):
        gone = [a.phase.endswith(".local") and self.round == 1 for a in asks]
        return super().send([type(a)(**{**a.__dict__, "msgs": {c: m for c, m in a.msgs.items() if c != "site-c"}})
                             if out else a for a, out in zip(asks, gone, strict=True)])


def silent(run):
    """Trouble on the line: site-c is gone from the method's question of round 1 on, until that round is over."""
    gone = []

    def trouble(line, site, head, body):
        if site != "site-c":
            return
        if head["op"] == "ask" and head["round"] == 1 and head["phase"].endswith(".local"):
            gone[:] = [True]
        if gone and not any(event["round"] == 1 for event in events(run, "round")):
            raise Silence("no route")

    return trouble


def refusing(run):
    """Trouble on the line: site-c does not answer the method's question of round 1, and is there all the same."""
    def trouble(line, site, head, body):
        if site == "site-c" and head["op"] == "ask" and head["round"] == 1 and head["phase"].endswith(".local"):
            head["stack"] = []

    return trouble


@pytest.mark.parametrize("noise,hides,rounds,trouble", [(SHARED, HIDES, 2, silent), (TREE, PLUS, 4, refusing)],
                         ids=["dp_sgd", "dp_ftrl"])
def test_a_site_that_drops_out_leaves_the_simulations_sum(folder, tiny_llama_folder, noise, hides, rounds, trouble):
    """The same integers, the others' shares of the noise, and the masks that were shared with it taken off; in a tree
    of noise the site goes on from what of it was in the sums."""
    spec = private(folder, tiny_llama_folder, {**noise, "seed": 5}, hides, rounds=rounds)
    line = Line(folder, tiny_llama_folder, trouble(made := far_folder(folder, spec)))
    far = drive_run(made, line, SITES, patience=QUICK)
    assert far.skipped == [] and {(e["round"], e["client"]) for e in events(far.folder, "missing")} == {(1, "site-c")}
    parts = build(load_recipe(spec))
    parts.engine = Lossy
    here = Course(parts, parts.method, parts.layers, Record(lambda event: None))
    for round in range(rounds):
        assert not here.step(round).get("skipped")
    assert digest(here.state) == far.state_digest


def test_a_round_of_too_few_opens_nothing_and_is_paid_by_every_ledger(folder, tiny_llama_folder):
    """Where all three must answer: the round is lost, the others go on, and nobody's account forgets it."""
    spec = private(folder, tiny_llama_folder, SHARED, "secagg", rounds=3)
    line = Line(folder, tiny_llama_folder, silent(made := far_folder(folder, spec)), most_epsilon=8.0,
                layers=["dp_sgd", "secagg"])
    far = drive_run(made, line, SITES, patience=QUICK)
    assert far.skipped == [1]
    says = far.privacy["layers"][0]
    assert far.privacy["claim"] == "private" and says["releases"] == 3 and 7.5 < says["epsilon"] <= 8.0
    own = {s: SiteLedger(folder / "store" / s).epsilon(1e-5) for s in SITES}
    assert own["site-a"] == own["site-b"] == pytest.approx(says["epsilon"])  # what left masked is spent
    assert own["site-c"] < own["site-a"]  # it was never asked


def test_a_site_started_again_in_mid_round_has_dropped_out_of_it(folder, tiny_llama_folder):
    """Its secrets are gone, so that its masks are taken off by the others' shares; what it released it has booked."""
    hits = []

    def restart(line, site, head, body):
        if head["op"] == "ask" and head["round"] == 1 and site == "site-c" and head["phase"].endswith(".local") \
                and not hits:
            hits.append(site)
            line.start(site)

    spec = private(folder, tiny_llama_folder, SHARED, HIDES)
    line = Line(folder, tiny_llama_folder, restart, most_epsilon=8.0)
    far = drive_run(far_folder(folder, spec), line, SITES, patience=QUICK)
    gone = events(far.folder, "missing")
    assert hits and far.skipped == [] and {e["client"] for e in gone if e["round"] == 1} == {"site-c"}
    assert far.privacy["layers"][0]["epsilon"] <= 8.0 and far.privacy["claim"] == "private"
    own = {s: SiteLedger(folder / "store" / s).epsilon(1e-5) for s in SITES}
    assert own["site-c"] <= own["site-a"]


def test_a_large_site_does_not_refuse_a_grid_for_rows_that_nobody_has():
    """It knows its own count alone; had all as many, their sum would leave the noise no grid."""
    spec, layer = LocalSpec(**{**STEP, "batch_size": 10**8}), DPSGD(noise="shared", noise_multiplier=0.12, delta=1e-9)
    guess = Facts(dict.fromkeys(SITES, 10**7), 3, 2, spec, below=(SecAgg(),))
    with pytest.raises(RecipeError, match="quanta wide"):
        layer.bind(guess)
    layer.bind(Facts(guess.rows, 3, 2, spec, below=guess.below, guessed=True))
    layer.bind(Facts({"site-a": 10**7, "site-b": 9, "site-c": 9}, 3, 2, spec, below=guess.below))


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["nvflare", "flower"])
def rig(request, tmp_path_factory, tiny_llama_folder):
    """Four sites, each a process of its own, over mutual TLS: three are left to hide among when one is gone."""
    if importlib.util.find_spec({"nvflare": "nvflare", "flower": "flwr"}[request.param]) is None:
        pytest.skip(f"{request.param} is not installed")
    from fedllm.federation.flower.loopback import flower_loopback
    from fedllm.federation.nvflare import serve as federate
    from fedllm.federation.nvflare.loopback import loopback

    make, part = {"nvflare": (loopback, "worker"), "flower": (flower_loopback, "desk")}[request.param]
    folder = tmp_path_factory.mktemp(request.param).resolve()
    with make(folder, tiny_llama_folder, sites=FOUR) as rig, rig.serving_session():
        if part == "worker":  # many processes begin at once
            federate.await_sites(rig.session, len(FOUR), 400.0)
        rig.pid_of = (lambda site: rig.worker(site)) if part == "worker" else (lambda site: rig.part(site, part))
        yield rig


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_sites_share_their_noise(rig):
    """Seeded, the simulation's state to the last bit; unseeded, a killed site, and the others' sum opens."""
    more = {"local": STEP, "evaluate": {"exact_match": False, "samples": 0, "clients": False}}
    seeded = rig.recipe("fedavg", name="seeded", layers=[{**SHARED, "seed": 5}, HIDES], **more)
    here, far = run(seeded, root=rig.folder / "here"), rig.run(seeded)
    assert far.skipped == [] and far.state_digest == here.state_digest
    assert far.privacy["claim"] == here.privacy["claim"] == "none"  # a seed voids it
    spec = rig.recipe("fedavg", name="killed", layers=[SHARED, HIDES], rounds=8,
                      clients={"deadline": 20.0, "quorum": 3}, **more)
    import threading

    trouble = []

    def kill():
        try:
            folder = until(lambda: next((p for p in (rig.folder / "far").glob("killed*") if events(p, "round")), None))
            os.kill(until(lambda: rig.pid_of("site-c")), signal.SIGKILL)
            until(lambda: [e for e in events(folder, "missing") if e["client"] == "site-c"], 200)
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    far = rig.run(spec)
    thread.join(10)
    assert not trouble and far.skipped == [] and far.rounds == 8
    assert {e["client"] for e in events(far.folder, "missing")} == {"site-c"}
    says, book = far.privacy["layers"][0], Ledger({})
    book.book(Release(noise_for(8.0, 1e-5, 8, law="discrete"), law="discrete"), 8)
    assert far.privacy["claim"] == "private" and says["epsilon"] == pytest.approx(book.epsilon(1e-5))
    assert 7.5 < says["epsilon"] <= 8.0 and set(says["clients"]) == set(FOUR)
