"""FedMKT over NVFlare: real sites of two designs and two tokenizers, over mutual TLS, end as the simulation does."""

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("nvflare is not installed (pip install 'fedlm[federation]')", allow_module_level=True)

from fedllm.api import run
from fedllm.federation.nvflare.loopback import loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_three_real_sites_of_two_tokenizers_are_the_simulation(tmp_path_factory, tiny_llama_folder, wide_llama_folder):
    """site-a and site-c hold the server's model, site-b a wider one that has other numbers for the same words."""
    folder = tmp_path_factory.mktemp("federation").resolve()
    with loopback(folder, tiny_llama_folder, join=False) as rig, rig.serving_session():
        (folder / "public.jsonl").write_text("".join(json.dumps({
            "prompt": f"{'red' if i % 2 else 'blue'} {['cat', 'dog', 'bird'][i % 3]}",
            "response": ["one", "two", "three"][i % 3]}) + "\n" for i in range(12)))
        rig.join("site-a")
        rig.join("site-b", "--model", wide_llama_folder)
        rig.join("site-c", "--public", str(folder / "public.jsonl"))
        spec = rig.recipe("fedmkt", knobs={"alignment": 8, "digest_steps": 2, "teach_steps": 2, "top_k": 4},
                          local={"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4})
        spec["data"] |= {"public": str(folder / "public.jsonl")}
        name = Path(wide_llama_folder).name
        here = run({**spec, "models": {name: wide_llama_folder}, "clients": {"profiles": {"site-b": {"model": name}}}},
                   root=folder / "here")
        far = rig.run(spec)
    assert far.state_digest == here.state_digest and far.evaluation["clients"] == here.evaluation["clients"]
    phases = dict(far.bytes["by_phase"])
    assert phases.pop("Opening.public")["down"] > 0 and phases == here.bytes["by_phase"]
    assert far.skipped == [] and {p.partition(".")[2] for p in phases} >= {"tell", "local"}
