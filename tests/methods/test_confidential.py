"""Confidential personal models: what leaves is hidden in a sum, the personal adapter never does."""

import json

import pytest

import fedllm
from fedllm.core.errors import CompositionError

OF = {"shared": {"name": "lora", "rank": 2}, "own": {"name": "lora", "rank": 2}}
SPACE = {"space": "streams", "space_knobs": {"of": OF, "personal": ("own",)}}


def test_what_leaves_is_the_shared_adapter_and_what_stays_is_the_own(begin):
    run = begin("confidential_pfl", **SPACE, local={"steps": 4}, personal_share=0.5, open_updates=True).go(2)
    assert run.state["theta"] and all(".lora_" in n and not n.startswith(("own", "shared")) for n in run.state["theta"])
    for memory in run.engine.memory.values():
        assert list(memory) == ["own"] and any(x.any() for n, x in memory["own"].items() if "lora_B" in n)
    sent = [e for e in run.engine.record.events if e["kind"] == "wire" and e["direction"] == "up"]
    size = sum(x.numel() * x.element_size() for x in run.state["theta"].values())
    assert sent and all(e["bytes"] < 1.3 * size + 2000 for e in sent)  # one adapter's bytes, not two


def test_without_a_personal_share_nothing_stays_at_the_clients(begin):
    run = begin("confidential_pfl", **SPACE, local={"steps": 4}, personal_share=0.0, open_updates=True).go(2)
    assert all(not m for m in run.engine.memory.values())


def test_a_run_hides_single_updates_or_is_refused(recipe, tmp_path):
    recipe |= {"method": "confidential_pfl", "space": {"name": "streams", **SPACE["space_knobs"]}, "rounds": 2,
               "evaluate": {"exact_match": False, "samples": 0}}
    with pytest.raises(CompositionError, match="keeps nothing confidential from the server; list secagg"):
        fedllm.run(recipe, root=tmp_path)
    recipe["layers"] = [{"name": "dp_fedavg", "noise_multiplier": 0.5, "delta": 1e-3, "clip_norm": 0.5}, "secagg"]
    result = fedllm.run(recipe, root=tmp_path)
    assert json.loads((result.folder / "result.json").read_text())["method"] == "confidential_pfl"
    assert not result.skipped


def test_one_stream_is_refused(begin):
    with pytest.raises(CompositionError, match="two streams of which own is personal; use space"):
        begin("confidential_pfl", open_updates=True)
