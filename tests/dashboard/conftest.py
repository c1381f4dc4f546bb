"""Folders as runs leave them, written by the record's own parts, and the dashboard over them."""

import contextlib
import re
import threading
import time

import httpx
import pytest

from fedllm.core.record import Record
from fedllm.dashboard.serve import server
from fedllm.runs.event_log import EventLog
from fedllm.runs.folder import RunFolder


class Run:
    """A run's folder and its open record."""

    def __init__(self, root, name, **recipe):
        self.folder = RunFolder.create(root / name, {"name": name, "method": {"name": "fedavg"}, "rounds": 3, **recipe})
        self.log = EventLog(self.folder.path / "events.jsonl")
        self.record = Record(self.log.append)
        self.path = self.folder.path

    def round(self, n, clients=("a", "b"), **facts):
        """One round that all of them answer, whatever stands in the client's place."""
        for way in ("down", "up"):
            for c in clients:
                self.record.crossed(way, "FedAvg.local", c, 1000, n, "FedAvg")
        self.record.emit("round", round=n, cohort=list(clients), **{"loss": 2.0 - n / 10, "seconds": 0.5, **facts})
        return self

    def test(self, n, **figures):
        self.record.emit("evaluation", round=n, **{"global": {"loss": 1.5, "exact_match": 0.25, "n": 4, **figures}},
                         clients={})
        return self


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "runs"
    path.mkdir()
    return path


@contextlib.contextmanager
def served(*folders, host="127.0.0.1"):
    """The dashboard itself on a free port: its address."""
    with server(folders, host=host, port=0) as (web, sock, address):
        thread = threading.Thread(target=web.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not web.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield address.replace("0.0.0.0", "127.0.0.1")
        finally:
            web.handle_exit(2, None)
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def web(root):
    """A client of the dashboard over `root`."""
    with served(root) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def runs(client):
    return {r["name"]: r for r in client.get("/api/runs").raise_for_status().json()["runs"]}


def whole(client, name):
    return client.get(f"/api/run/{runs(client)[name]['id']}").raise_for_status().json()


def csrf(client):
    return re.search(r'name="csrf" content="([^"]+)"', client.get("/").text)[1]
