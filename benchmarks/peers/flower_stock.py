"""A Flower app as its tutorials write it, on Flower as it ships: FedAvg over LoRA adapters, one process a call."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PYPROJECT = """
[project]
name = "stock"
version = "0.1.0"
description = "FedAvg over LoRA"
license = {file = "LICENSE"}
dependencies = ["flwr>=1.41,<1.43"]
[tool.flwr.app]
publisher = "bench"
fab-format-version = 1
flwr-version-target = "VERSION"
[tool.flwr.app.components]
serverapp = "stock.server:app"
clientapp = "stock.client:app"
[tool.flwr.app.config]
model = ""
rounds = 3
steps = 5
batch = 4
lr = 0.01
notes = ""
nodes = 3
"""
TASK = '''
import itertools
import json
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, task_type="CAUSAL_LM",
                                                                                   target_modules="all-linear"))


def train(model, folder, rows, steps, batch, lr):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [r["prompt"] + " " + r["response"] for r in map(json.loads, open(rows))]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        some = [texts[(step * batch + i) % len(texts)] for i in range(batch)]
        ids = tokenizer(some, return_tensors="pt", padding=True)
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    return len(texts)
'''
CLIENT = '''
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from stock.task import load, train

app = ClientApp()


@app.train()
def fit(msg, context):
    run = context.run_config
    model = load(run["model"])
    open(run["notes"] + "/loads", "a").write("1")
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    n = train(model, run["model"], context.node_config["rows"], run["steps"], run["batch"], run["lr"])
    return Message(RecordDict({"arrays": ArrayRecord(get_peft_model_state_dict(model)),
                               "metrics": MetricRecord({"num-examples": n})}), reply_to=msg)
'''
SERVER = '''
import time
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict
from stock.task import load

app = ServerApp()


@app.main()
def main(grid, context):
    run = context.run_config

    def clock(round, arrays):
        open(run["notes"] + "/times", "a").write(f"{time.time()}\\n")

    FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=run["nodes"],
           min_available_nodes=run["nodes"]).start(
        grid=grid, initial_arrays=ArrayRecord(get_peft_model_state_dict(load(run["model"]))),
        num_rounds=run["rounds"], evaluate_fn=clock)
'''
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}


def measure(folder: Path, sites: Sequence[str], spec: Mapping[str, Any], patience: float = 400.0) -> dict[str, Any]:
    """Seconds of each round over the sites' rows in `folder`, and the model loads of all clients together."""
    from fedllm.models.load import resolve

    notes = folder / "stock"
    notes.mkdir()
    with _stock(folder, sites, notes) as control:
        run = _submit(control, {
            "model": str(resolve("embedded")), "rounds": spec["rounds"], "steps": spec["local"]["steps"],
            "batch": spec["local"]["batch_size"], "lr": spec["local"]["lr"], "notes": str(notes), "nodes": len(sites)})
        ends = time.monotonic() + patience
        while (status := _status(control, run)) != "finished":
            if time.monotonic() > ends:
                raise TimeoutError(f"the stock app was {status} after {patience:g} s; see {notes}")
            time.sleep(0.5)
    times = [float(x) for x in (notes / "times").read_text().split()]
    rounds = [b - a for a, b in itertools.pairwise(times)]
    if len(rounds) != spec["rounds"]:
        raise RuntimeError(f"the stock app did {len(rounds)} of {spec['rounds']} rounds; see {notes / 'log'}")
    return {"rounds": rounds, "loads": len((notes / "loads").read_text())}


@contextlib.contextmanager
def _stock(folder: Path, sites: Sequence[str], notes: Path) -> Iterator[Any]:
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    from fedllm.federation.process import end_tree, free_port

    scripts, ports = Path(sys.executable).parent, [free_port() for _ in range(len(sites) + 1)]
    running: list[subprocess.Popen[bytes]] = []
    env = {**os.environ, **QUIET, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(notes)}
    try:
        with (notes / "log").open("ab") as log:
            def start(*words: str) -> None:
                running.append(subprocess.Popen([str(scripts / words[0]), *words[1:]], stdout=log, stderr=log, env=env))

            start("flower-superlink", "--insecure", "--port", str(ports[0]),
                  "--disable-runtime-dependency-installation")
            time.sleep(5)
            for site, port in zip(sites, ports[1:], strict=True):
                start("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{ports[0]}", "--port", str(port),
                      "--node-config", f"rows=\"{folder / 'data' / site}.jsonl\"")
            yield ControlHttpClient.from_server_address(
                f"127.0.0.1:{ports[0]}", True, None,
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli")])
    finally:
        for process in running:
            end_tree(process.pid)
            process.wait(30)


def _submit(control: Any, config: Mapping[str, Any]) -> int:
    import hashlib

    from flwr.cli.build import build_fab_from_files
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab
    from flwr.supercore.version import package_version

    data, _ = build_fab_from_files({
        "pyproject.toml": PYPROJECT.replace("VERSION", package_version).encode(), "LICENSE": b"Apache-2.0\n",
        "stock/__init__.py": b"", "stock/task.py": TASK.encode(), "stock/client.py": CLIENT.encode(),
        "stock/server.py": SERVER.encode()})
    fab = fab_to_proto(Fab(hashlib.sha256(data).hexdigest(), data, {}))
    for _ in range(60):
        try:
            return control.StartRun(StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(config)))).run_id
        except Exception:  # the SuperLink is starting
            time.sleep(1)
    raise TimeoutError("the stock SuperLink does not answer")


def _status(control: Any, run: int) -> str:
    from flwr.proto.control_pb2 import ListRunsRequest

    return control.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status.status


if __name__ == "__main__":
    import tempfile

    from evidence.bench.flower import LORA
    from fedllm.federation.nvflare.loopback import ROWS, SITES, write_rows

    with tempfile.TemporaryDirectory() as temp:
        for k, site in enumerate(SITES):
            write_rows(Path(temp) / "data" / f"{site}.jsonl", k, ROWS[k])
        sys.stdout.write(json.dumps(measure(Path(temp), SITES, LORA)) + "\n")
