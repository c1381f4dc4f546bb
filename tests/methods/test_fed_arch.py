"""Nested widths: what a client of a width trains is a network of that width, and each entry is its holders' mean."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fedllm.core.client import SERVER
from fedllm.core.errors import CompositionError, ModelError, RecipeError
from fedllm.core.layer import Layer
from fedllm.core.payload import part, tensor_bytes
from fedllm.core.program import drive
from fedllm.methods.registry import make_method
from fedllm.models.batch import collate
from fedllm.models.load import load_model
from fedllm.models.model import HeadedEncoder, Model
from fedllm.models.narrow import cut_net, narrow, nested, shapes_of
from fedllm.runs.build import build
from fedllm.runs.recipe import load_recipe
from fedllm.spaces import make_space

HALF = {"widths": (1.0, 0.5)}
Q = "model.layers.0.self_attn.q_proj.weight"  # [16, 16]: four heads of 4


class Heard(Layer):
    """Keeps all that crosses."""

    def __init__(self):
        self.said = {}

    def client(self, fn, msg, client, call):
        reply = call(msg)
        self.said[fn.__name__, client.id] = msg, reply
        return reply


def test_with_all_clients_whole_it_is_fedavg_to_the_bit(begin):
    plain = begin("fedavg", space="full", dtype=torch.float32).go(2).state["theta"]
    ours = begin("fed_arch", space="full", dtype=torch.float32, widths=(1.0,)).go(2).state["theta"]
    assert plain.keys() == ours.keys() and all(torch.equal(plain[n], ours[n]) for n in plain)


def test_an_entry_is_the_mean_of_who_holds_it(begin):
    """c0 is whole and c1 half: outside of the half c0's value stands alone; of two halves the rest stays."""
    run = begin("fed_arch", space="full", layers=(ear := Heard(),), **HALF)
    start = run.world.model.initial()
    run.go(1, ["c0", "c1"])
    n = {c: run.engine.infos[c].n for c in ("c0", "c1")}
    (_, whole), (told, half) = ear.said["local", "c0"], ear.said["local", "c1"]
    assert part(told, "theta")[Q].shape == (8, 8) and half[f"delta/{Q}"].shape == (8, 8)
    moved = run.state["theta"][Q] - start[Q]
    assert torch.allclose(moved[8:], whole[f"delta/{Q}"][8:], atol=1e-15)
    assert torch.allclose(moved[:8, 8:], whole[f"delta/{Q}"][:8, 8:], atol=1e-15)
    both = (n["c0"] * whole[f"delta/{Q}"][:8, :8] + n["c1"] * half[f"delta/{Q}"]) / (n["c0"] + n["c1"])
    assert torch.allclose(moved[:8, :8], both, atol=1e-15) and both.any()
    run.go(1, ["c1", "c3"])  # the second and the fourth to come... c3 is the third, and whole: all of it moves again
    assert run.state["dealt"] == {"c0": 1.0, "c1": 0.5, "c3": 1.0}
    before = run.state["theta"]
    run.go(1, ["c1"])
    assert torch.equal(run.state["theta"][Q][8:], before[Q][8:]) and not torch.equal(run.state["theta"][Q], before[Q])


def test_what_a_narrow_client_trains_is_a_network_of_that_width(begin):
    """Built from a config of half the sizes, with the first entries of each weight, it says the same."""
    run = begin("fed_arch", space="full", **HALF)
    model, config = run.world.model, type(run.world.model.net.config).from_dict({
        **run.world.model.net.config.to_dict(), "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4})
    plain = type(model.net)(config).double().eval()
    with torch.no_grad():
        for name, t in plain.named_parameters():
            t.copy_(model.net.get_parameter(name)[tuple(slice(0, s) for s in t.shape)])
    small = narrow(model, 0.5)
    batch = collate([run.world.encoded("c0", "train", small)], model.pad, "cpu")
    with torch.no_grad(), small.using([small.initial()]):
        got = small.logits_of(small.hidden(batch))
    want = plain(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    assert torch.allclose(got[batch.mask], want[batch.mask], atol=1e-12)
    assert narrow(model, 0.5) is small and narrow(model, 1.0) is model
    view = nested(shapes_of(model.initial()), shapes_of(small.initial()))
    assert all(torch.equal(t, small.initial()[n]) for n, t in view.take(model.initial()).items())


def test_the_division_is_of_embeddings_and_of_the_maps_of_blocks(begin):
    model = begin("fed_arch", space="full", **HALF).world.model
    seen = {}
    for scaled in (False, True):
        net = narrow(model, 0.5, scaled).net
        for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "lm_head"):
            x = torch.tensor([[5, 6]]) if "embed" in name else torch.ones(1, 2, 8, dtype=torch.float64)
            with torch.no_grad(), narrow(model, 0.5, scaled).using([narrow(model, 0.5).initial()]):
                seen[name, scaled] = net.get_submodule(name)(x)
    for name, by in (("model.embed_tokens", 2), ("model.layers.0.self_attn.q_proj", 2), ("lm_head", 1)):
        assert torch.equal(seen[name, True], by * seen[name, False])


def test_bytes_are_those_of_the_width_and_the_report_says_them(begin):
    run = begin("fed_arch", space="full", dtype=torch.float32, layers=(ear := Heard(),), **HALF).go(1)
    sizes = {c: tensor_bytes(ear.said["local", c][0]) for c in ("c0", "c1")}
    said = run.method.report(run.state)["widths"]
    assert sizes == {"c0": said["1.0"]["bytes_each_way"], "c1": said["0.5"]["bytes_each_way"]}
    assert said["0.5"]["clients"] == 2 and sizes["c1"] < 0.45 * sizes["c0"]  # embeddings are cut once, blocks twice


def test_clients_are_tested_with_what_they_hold_and_the_server_with_all(begin):
    run = begin("fed_arch", space="full", layers=(ear := Heard(),), **HALF).go(1)
    infos = run.world.infos()
    drive(run.method.evaluate(run.state, infos, "local"), run.engine, run.engine.stack[1:])
    assert [ear.said["score", c.id][0]["width"] for c in infos] == [1.0, 0.5, 1.0, 0.5]
    asked = next(run.method.evaluate(run.state, [run.engine.infos[SERVER]], "global"))
    assert asked.msgs[SERVER]["width"] == 1.0


def test_masked_clients_learn_among_their_own_targets(begin, gap):
    """A word that no row of the round has as a target keeps its row of the head: no gradient pushes it down."""
    run = begin("fed_arch", space="full", widths=(1.0,), masked=True)
    start = run.world.model.initial()["lm_head.weight"]
    run.go(1, ["c0"])
    own = {int(t) for e in run.world.encoded("c0", "train") for t in e.labels if t >= 0}
    moved = {i for i in range(64) if not torch.equal(run.state["theta"]["lm_head.weight"][i], start[i])}
    assert moved == own and len(own) < 60
    classes = begin("fed_arch", space="full", task="classification", widths=(1.0, 0.5), masked=True).go(1)
    assert gap(classes.state["theta"], classes.world.model.initial()) > 0


def test_an_encoder_is_cut_too_and_a_fused_network_is_not():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    bert = HeadedEncoder(BertModel(BertConfig(vocab_size=30, **small), add_pooling_layer=False), 3, "mean")
    model = Model(bert, None, "classification", make_space("full"), labels=("a", "b", "c"), fast_kernels=False)
    half = narrow(model, 0.5)
    assert half.net.classifier.weight.shape == (3, 8) and half.net.config.num_attention_heads == 2
    with pytest.raises(ModelError, match=r"width = 0\.3 is not allowed.* hidden_size = 16, of which 4\.8"):
        narrow(model, 0.3)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2))
    with pytest.raises(ModelError, match=r"'0\.attn\.c_attn'.*fused ones are not taken apart"):
        cut_net(gpt, 0.5)


@pytest.mark.parametrize("knobs, says", [
    ({"widths": (0.5,)}, r"widths = \[0\.5\] is not allowed.* one must be 1"),
    ({"widths": ()}, r"widths = \[\] is not allowed"), ({"widths": (1.0, 1.5)}, r"each must be > 0 and <= 1"),
    ({"budget_bytes": 0}, "budget_bytes = 0 is not allowed")])
def test_widths_that_are_none(knobs, says):
    with pytest.raises(RecipeError, match=says):
        make_method("fed_arch", **knobs)


def test_what_does_not_fit_is_refused(begin):
    model = begin("fedavg", space="full", dtype=torch.float32).world.model
    size = tensor_bytes(model.initial())
    make_method("fed_arch", budget_bytes=size, budget_memory=4 * size).check(model)
    for key, needed in (("bytes", size), ("memory", 4 * size)):
        with pytest.raises(RecipeError, match=rf"budget_{key} = {needed - 1} is not enough .* takes {needed}"):
            make_method("fed_arch", **{f"budget_{key}": needed - 1}).check(model)
    with pytest.raises(CompositionError, match=r"fed_arch.*lora.*full"):
        make_method("fed_arch").check(begin("fedavg").world.model)


def shaped(recipe, shape, **more):
    return build(load_recipe({**recipe, "space": "full", "model": {"name": "embedded", "weights": "random",
                                                                   "shape": shape}, **more}))


def test_a_shape_makes_another_network_of_the_same_config(recipe):
    shape = {"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2,
             "num_key_value_heads": 2, "tie_word_embeddings": False, "head_dim": 24}
    net = shaped(recipe, shape).world.model.net
    assert net.config.num_hidden_layers == 1 and len(net.model.layers) == 1
    assert net.model.layers[0].self_attn.q_proj.weight.shape == (48, 48) and "lm_head.weight" in dict(
        net.named_parameters())
    again = shaped(recipe, shape).world.model.net
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with pytest.raises(RecipeError, match=r"method\.budget_bytes = 1000 is not enough"):
        shaped(recipe, shape, method={"name": "fed_arch", "budget_bytes": 1000})


@pytest.mark.parametrize("shape, says", [
    ({"hiden_size": 8}, r"shape\.hiden_size is not allowed.* did you mean 'hidden_size'"),
    ({"vocab_size": 8}, r"shape\.vocab_size is not allowed.* tokenizer"),
    ({"hidden_size": "wide"}, r"shape\.hidden_size = 'wide' is not allowed"),
    ({"num_hidden_layers": 0}, r"shape\.num_hidden_layers = 0 is not allowed"),
    ({"tie_word_embeddings": 1}, r"shape\.tie_word_embeddings = 1 is not allowed"),
    ({"num_key_value_heads": 4}, r"6 attention heads are not shared out evenly over num_key_value_heads = 4")])
def test_a_shape_that_is_none(shape, says):
    with pytest.raises(ModelError, match=says):
        load_model("embedded", "generation", make_space("full"), weights="random", shape=shape)


def test_a_shape_of_what_has_none_is_refused(recipe):
    with pytest.raises(ModelError, match=r"model\.shape needs model\.weights: random"):
        load_model("embedded", "generation", make_space("full"), shape={"hidden_size": 8})
    with pytest.raises(RecipeError, match=r"model\.shape and model\.name = 'policy' do not fit together"):
        build(load_recipe({"model": {"name": "policy", "weights": "random", "shape": {"hidden_size": 8}},
                           "space": "full", "data": {"source": "env:gridworld"}, "method": "fed_marl"}))
