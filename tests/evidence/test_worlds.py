"""The arena's worlds: what they remember is what the whole network says."""

import numpy as np
import torch

from evidence.rigs import worlds as rigs_worlds
from evidence.rigs.worlds import LAST, Answering, Remembered, begun, office
from fedllm.data.encode import Encoded
from fedllm.data.office import ANSWER_MARK
from fedllm.models.batch import IGNORE, collate
from fedllm.models.load import load_model
from fedllm.models.model import HeadedEncoder
from fedllm.spaces import make_space


def embedded():
    return load_model("embedded", "generation", make_space("lora", rank=4, targets=LAST))


def test_answers_of_the_last_block_alone_are_those_of_the_whole_network(monkeypatch):
    plain, quick = embedded(), embedded()
    mark = plain.tokenizer(ANSWER_MARK, add_special_tokens=False)["input_ids"][0]
    body = Answering(quick.net.model, quick.pad, mark)
    rng, lanes = np.random.default_rng(0), []
    for lengths in ((9, 5), (14, 7)):
        rows = []
        for n in lengths:
            ids = np.r_[1, rng.integers(100, 900, n), mark, rng.integers(100, 900, 4), 2].astype(np.int32)
            labels = ids.astype(np.int64)
            labels[: n + 2] = IGNORE
            rows.append(Encoded(ids, labels, 5))
        lanes.append(rows)
    batch = collate(lanes, plain.pad, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    trees = [{n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in plain.initial().items()} for _ in range(2)]
    for _ in range(2):  # the second time from memory
        with plain.using(trees):
            want = plain.row_losses(batch)[0]
        with quick.using(trees):
            torch.testing.assert_close(quick.row_losses(batch)[0], want, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(body, "_remember", None)
    assert len(body.kept) == 4


def test_a_review_is_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rigs_worlds, "cache_dir", lambda: tmp_path)
    torch.manual_seed(0)
    body = rigs_worlds.pretrained(0, 1).body
    whole, quick = HeadedEncoder(body, 2, "mean"), HeadedEncoder(Remembered(body), 2, "cls")
    ids, mask = torch.randint(5, 200, (3, 8)), torch.arange(8) < torch.tensor([[8], [5], [3]])
    states = whole.pool(body(input_ids=ids, attention_mask=mask.long()).last_hidden_state, mask)
    got = quick.pool(quick.body(ids, mask).last_hidden_state, mask)
    torch.testing.assert_close(got, states)
    quick.body.save()
    again = Remembered(body)
    monkeypatch.setattr(again, "_remember", None)
    torch.testing.assert_close(again(ids, mask).last_hidden_state[:, 0], states)


def test_the_office_is_at_work_before_attackers_join(tmp_path, monkeypatch):
    monkeypatch.setattr(rigs_worlds, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(rigs_worlds, "BEGUN", 1)
    world = office.__wrapped__(5, 2, 16)
    fresh = embedded().space.start(world.model.net, torch.Generator().manual_seed(0), 8)
    start = world.model.initial()
    assert start.keys() == fresh.keys() and any(float(t.abs().max()) > 0 for n, t in start.items() if "lora_B" in n)
    kept = begun(world, next((tmp_path / "arena").glob("office-5-*")))
    assert all(torch.equal(kept[n], start[n]) for n in start)
