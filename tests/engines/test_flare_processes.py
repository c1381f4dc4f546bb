"""A site of two processes in a real federation: to the server it is one client, and the run is the simulation's."""

import importlib.util
import json
import threading

import psutil
import pytest

if importlib.util.find_spec("nvflare") is None:
    pytest.skip("nvflare is not installed (pip install 'fedlm[federation]')", allow_module_level=True)

from fedllm.api import run
from fedllm.federation.nvflare.loopback import loopback
from fedllm.runs.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Watch(threading.Thread):
    """Sees which processes are at work under whose."""

    def __init__(self):
        super().__init__(daemon=True)
        self.seen, self.over = set(), threading.Event()

    def run(self):
        while not self.over.wait(0.3):
            for p in psutil.process_iter(["cmdline", "ppid"]):
                if any("spawn_main" in w for w in p.info["cmdline"] or []):
                    self.seen.add((p.info["ppid"], p.pid))


def test_a_site_of_two_processes_is_one_client(tmp_path, tiny_llama_folder):
    folder = tmp_path.resolve()
    with loopback(folder, tiny_llama_folder, sites=("site-a", "site-b")) as rig, rig.serving_session():
        spec = rig.recipe("photon", model={"name": tiny_llama_folder, "dtype": "float64"}, space={"name": "full"})
        here, watch = run(spec, root=folder / "here"), Watch()
        with rig.settings("site-b", processes=2):
            watch.start()
            far = rig.run(spec)
            watch.over.set()
        workers = [(parent, child) for parent, child in watch.seen if parent != 1]
        assert len({parent for parent, _ in workers}) == 1 and len(workers) == 2  # of one site alone
        theta = {at: RunFolder.open(r.folder).load()[1]["state"]["theta"] for at, r in (("here", here), ("far", far))}
        apart = max(float((theta["far"][n].double() - t.double()).abs().max()) for n, t in theta["here"].items())
        assert apart < 1e-6
        assert far.bytes == here.bytes
        assert all(s["loads"] == 1 for s in json.loads((far.folder / "sites.json").read_text()).values())
