"""A run in a process of its own that is killed for good at a moment of its own, however busy the machine is."""

import json
import signal
import subprocess
import sys

DIES = """
import json, os, signal, sys, fedllm
from fedllm.runs.event_log import EventLog

append, left = EventLog.append, [int(sys.argv[3])]

def dying(self, event):
    append(self, event)
    left[0] -= event["kind"] == "round"
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

EventLog.append = dying
fedllm.run(json.loads(sys.argv[1]), root=sys.argv[2])
"""


def killed(recipe, root, rounds):
    """Run the recipe until the record says that so many rounds are over, and not a moment longer: the last of them is
    not committed yet."""
    done = subprocess.run([sys.executable, "-c", DIES, json.dumps(recipe), str(root), str(rounds)], timeout=240,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
