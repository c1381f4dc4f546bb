"""FedMD over NVFlare: three real sites of three designs, processes over mutual TLS, end as the simulation does."""

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("nvflare is not installed (pip install 'fedlm[federation]')", allow_module_level=True)

from fedllm.api import run
from fedllm.core.errors import RunError
from fedllm.federation.nvflare.loopback import loopback
from fedllm.federation.public import PublicRows
from fedllm.runs.recipe import load_recipe
from fedllm.runs.result import Result
from fedllm.runs.rows import file_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture(scope="module")
def rig(tmp_path_factory, tiny_bert_folder, wide_bert_folder, tiny_llama_folder):
    """site-a holds what the recipe says, site-b a wider encoder of its own, site-c the body of a language model."""
    folder = tmp_path_factory.mktemp("federation").resolve()
    with loopback(folder, tiny_bert_folder, join=False) as rig, rig.serving_session():
        for name in ("data/site-a", "data/site-b", "data/site-c", "test"):
            path = folder / f"{name}.jsonl"
            write(path, [{"text": r["prompt"], "label": r["label"]} for r in map(json.loads, path.open())])
        write(folder / "public.jsonl", [{"text": f"{'red' if i % 2 else 'blue'} {['cat', 'dog', 'bird'][i % 3]} word",
                                         "label": ["even", "odd"][i % 2]} for i in range(40)])
        rig.join("site-a")
        rig.join("site-b", "--model", wide_bert_folder)
        rig.join("site-c", "--model", tiny_llama_folder, "--public", str(folder / "public.jsonl"))
        yield rig


@pytest.fixture
def spec(rig):
    made = rig.recipe("fedmd", knobs={"alignment": 16, "transfer_steps": 2, "own_steps": 2, "digest_steps": 2},
                      local={"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4})
    made["data"] |= {"task": "classification", "labels": ["even", "odd"],
                     "public": str(rig.folder / "public.jsonl"), "client_test": 0.2,
                     "test": 0.0}
    return made


def test_three_real_sites_of_three_designs_are_the_simulation(rig, spec, wide_bert_folder, tiny_llama_folder):
    own = {Path(f).name: f for f in (wide_bert_folder, tiny_llama_folder)}  # so sites call their folders
    there = {site: {"model": name} for site, name in zip(("site-b", "site-c"), own, strict=True)}
    here = run({**spec, "models": own, "clients": {"profiles": there}}, root=rig.folder / "here")
    far = rig.run(spec)
    assert far.evaluation["clients"] == here.evaluation["clients"] and far.state_digest == here.state_digest
    assert far.skipped == []
    phases = dict(far.bytes["by_phase"])
    sent = phases.pop("Opening.public")["down"]
    data = PublicRows.of(file_rows(load_recipe(spec), spec["data"]["public"])).data
    assert phases == here.bytes["by_phase"] and sent == 2 * len(data)  # site-c has a copy of its own
    assert far.reports["ModelUsage"] == here.reports["ModelUsage"]
    assert all(s["loads"] == 1 for s in json.loads((far.folder / "sites.json").read_text()).values())


def test_a_run_in_which_no_round_counted_is_failed(rig, spec):
    """All three have to answer within a millisecond, so every round is skipped."""
    with pytest.raises(RunError, match="the run did nothing: all of its 2 rounds were skipped"):
        rig.run({**spec, "name": "nothing", "clients": {"quorum": 3, "deadline": 0.001}})
    assert Result.load(rig.folder / "far" / "nothing").failed
