"""Real processes on loopback over mutual TLS: a method's result equals the simulation's, and sites have their word.

Faults are in test_flare_faults.py. Every method of the registry is compared by `fedllm bench federation`.
"""

import importlib.util
import json
import logging

import pytest

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("nvflare is not installed (pip install 'fedlm[federation]')", allow_module_level=True)

from evidence.bench.federation import tried
from fedllm.api import run
from fedllm.core.errors import RunError
from fedllm.federation.nvflare import serve as federate
from fedllm.federation.nvflare.loopback import QUICK, events, loopback, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def rig(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("federation").resolve()
    with loopback(folder, tiny_llama_folder) as rig, rig.serving_session():
        yield rig


@pytest.mark.parametrize("method", ["fedavg", "fedkseed", "hetlora", "fedex_lora", "local_only", "fed_sp_sc",
                                    "fedbuff"])
def test_the_digest_is_the_simulations(rig, method):
    spec = tried(rig, method)  # of fedbuff one site is at work at a time
    here, far = run(spec, root=rig.folder / "here"), rig.run(spec)
    assert far.state_digest == here.state_digest
    assert far.bytes == here.bytes
    assert far.evaluation["clients"] == here.evaluation["clients"]
    assert all(s["loads"] == 1 for s in json.loads((far.folder / "sites.json").read_text()).values())


def test_a_method_off_the_allow_list_is_refused_with_the_reason(rig):
    with rig.settings("site-c", methods=["fedkseed"]):
        with pytest.raises(RunError, match=r"site-c: .*the method is not on this site's allow-list"):
            rig.run(rig.recipe("fedavg"))
        far = rig.run(rig.recipe("fedavg", rounds=1), needed=2)
    assert [e["client"] for e in events(far.folder, "left_out")] == ["site-c"]


def test_a_job_that_brings_code_is_refused(rig, tmp_path):
    job = tmp_path / "job"
    for side in ("server", "client"):
        config = job / "app" / "config" / f"config_fed_{side}.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps({"format_version": 2, "components": [], "executors": [], "workflows": []}))
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "mine.py").write_text("import os")
    (job / "meta.json").write_text(json.dumps({"name": "mine", "deploy_map": {"app": ["@ALL"]}, "min_clients": 1}))
    mine = rig.session.submit_job(str(job))
    assert "FAILED_TO_RUN" in until(lambda: "FINISHED" in (s := str(rig.session.get_job_status(mine))) and s)
    assert "BYOC not permitted" in (rig.keys.kit("server") / "process.log").read_text()


def test_a_suspended_site_takes_no_part_until_it_is_restored(rig):
    federate.suspend(rig.keys, "site-c")
    with pytest.raises(RunError, match="2 of 3 sites joined"):
        federate.await_sites(rig.session, 3, 3.0)
    federate.restore(rig.keys, "site-c")
    assert federate.await_sites(rig.session, 3, 90.0) == ["site-a", "site-b", "site-c"]


def test_the_line_is_quick(rig):
    path = rig.run_folder(rig.recipe("fedavg", name="bench"))
    job = federate.submit(rig.session, path, 3, QUICK, bench=[1 << 20, 200_000_000])
    until(lambda: str(rig.session.get_job_status(job)).startswith("FINISHED"), 400)
    found = json.loads((path / "bench.json").read_text())
    logging.getLogger(__name__).warning("bench: %s", found)
    # Loose, since the machine is shared; figures with their load are in docs/results/federation.md.
    assert found["noop_round"]["least"] < 0.1 and found["200000000"]["one_way"] < 10
