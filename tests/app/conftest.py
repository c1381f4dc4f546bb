"""A small run: five clients that learn to turn words around, on the tiny Llama."""

import json
import random

import pytest


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """160 rows `say the word red cat` -> `cat red`, with the color as category."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(160):
            color, animal = draw.choice(["red", "green", "blue"]), draw.choice(["cat", "dog", "bird"])
            file.write(json.dumps({"prompt": f"say the word {color} {animal}", "response": f"{animal} {color}",
                                   "category": color}) + "\n")
    return str(path)


@pytest.fixture
def recipe(rows_file, tiny_llama_folder):
    """As a mapping, to be changed by the test."""
    return {
        "name": "small", "model": tiny_llama_folder, "rounds": 4, "local": {"lr": 0.02},
        "data": {"source": rows_file, "partition": {"kind": "iid", "clients": 5}, "client_test": 0.2},
        "clients": {"per_round": 3}, "evaluate": {"max_new_tokens": 4, "samples": 2}}
