"""Faults done to real processes by pid: rounds end, nobody hangs, and what answers late or again changes nothing."""

import importlib.util

import pytest

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("nvflare is not installed (pip install 'fedlm[federation]')", allow_module_level=True)

from evidence.drills.far_network import HOST, namespace
from evidence.drills.faults import ASYNC, DRILLS, partition
from fedllm.core.errors import RunError
from fedllm.federation.nvflare.loopback import loopback, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LOSES = {"client_silent": {"site-c"}, "half_gone": {"site-b", "site-c"}}


@pytest.fixture(scope="module")
def rig(tmp_path_factory, tiny_llama_folder):
    with loopback(tmp_path_factory.mktemp("federation"), tiny_llama_folder) as rig:
        yield rig
    until(lambda: not rig.all_processes(), 20, "the end of every process of the federation")


@pytest.mark.parametrize("name", [n for n in DRILLS if not n.startswith("async")])
def test_a_fault(rig, name):
    found = DRILLS[name](rig)
    assert set(found["missing"]) == LOSES.get(name, set()), found
    assert found["same"] is (None if name in LOSES else True), found
    assert found["skipped"] == 0 and set(found["back"]) >= LOSES.get(name, set()), found


def test_a_site_that_stands_still_under_fedbuff_blocks_nobody(rig):
    found = DRILLS["async_slow"](rig)
    assert found["missing"] == [] and found["skipped"] == 0 and found["rounds"] == 60, found


def test_answers_under_way_to_a_killed_coordinator_are_dropped(rig):
    found = DRILLS["async_killed"](rig)
    assert found["skipped"] == 0 and found["rounds"] == 20, found
    assert found["answers_lost"] < ASYNC["knobs"]["concurrency"], found
    assert all("before the coordinator was started again" in why for why in found["why"]), found


def test_a_partition_between_network_namespaces(tmp_path, tiny_llama_folder):
    try:
        space = namespace()
        inside = space.__enter__()
    except (RunError, OSError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        with loopback(tmp_path, tiny_llama_folder, join=False, host=HOST) as rig:
            for site in rig.sites:
                rig.join(site, inside=inside if site == "site-c" else ())
            found = partition(rig)
    finally:
        space.__exit__(None, None, None)
    assert found["missing"] == found["back"] == ["site-c"] and found["skipped"] == 0, found
