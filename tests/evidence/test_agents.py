"""The comparison of agents: a row of every kind becomes a line of the page, and a cell is a run of the rig."""

from evidence.agents import ARMS, Agent, page, run, tuned


def test_a_page():
    row = {"task": "sums", "agent": "olivia", "option": {}, "seeds": [1, 2]}
    rows = [{**row, "arm": arm, "return": [0.1 * i, 0.2 * i], "elsewhere": [0.0, 0.0]} for i, arm in enumerate(ARMS)]
    rows += [{**row, "agent": "a_rladmm", "arm": "federated", "return": [0.5, 0.7], "elsewhere": [0.1, 0.1]}]
    rows += [{**row, "task": "toolbook", "agent": "fical", "arm": arm, "right": [0.9, 1.0]} for arm in ARMS]
    said = page(rows)
    assert "| sums | `olivia` | 0.00 ± 0.00 | 0.15 ± 0.07 | 0.30 ± 0.14 | 2 of 2 |" in said
    assert "| sums | `a_rladmm` | - | - | 0.60 ± 0.14 | - |" in said and said.count("`fical`") == 1


def test_a_cell():
    agent = Agent("fed_marl", 1, {"lr": (5.0,)})
    assert tuned(agent, "sums", "alone") == {"lr": 5.0}
    got = run(agent, "sums", "federated", 0, {"lr": 5.0})
    assert got.keys() == {"return", "elsewhere"} and -1 < got["return"] <= 1
