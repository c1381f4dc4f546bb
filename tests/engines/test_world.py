"""What clients stand on."""

from fedllm.core.client import SERVER
from fedllm.data.encode import IGNORE
from fedllm.data.office import office_federation
from fedllm.engines.world import World
from fedllm.local.spec import LocalSpec
from fedllm.models.load import load_model
from fedllm.spaces import make_space


def test_tests_score_the_response_alone_even_where_all_of_a_row_is_learned():
    federation = office_federation(clients=2, rows=4, test_rows=12)
    model = load_model("embedded", "generation", make_space("lora", rank=2))
    world = World(model, federation, LocalSpec(max_length=192), completion_only=False)
    learned, tested = world.encoded(next(iter(federation.clients)), "train")[0], world.encoded(SERVER, "test")[0]
    assert (learned.labels[1:] != IGNORE).all()
    answer = tested.ids[tested.labels != IGNORE]
    said = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (tested.prompt, answer)]
    assert said == [federation.test[0]["prompt"], federation.test[0]["response"]]


def test_the_rate_falls_from_round_to_round():
    spec = LocalSpec(lr=1.0, over_rounds="cosine")
    rates = [spec.at(r, 4).lr for r in range(4)]
    assert rates[0] == 1.0 and abs(rates[2] - 0.5) < 1e-12 and rates == sorted(rates, reverse=True) and rates[-1] > 0
    assert spec.at(9, None) == spec and LocalSpec(lr=1.0).at(3, 4).lr == 1.0
    assert [round(LocalSpec(lr=1.0, over_rounds="linear").at(r, 4).lr, 9) for r in range(4)] == [1, 0.75, 0.5, 0.25]
