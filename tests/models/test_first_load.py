"""What a process holds at the most while a GGUF file is read for the first time, turned into a folder and examined."""

import os
import subprocess
import sys

import pytest

ASK = """
def most(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
from fedllm.models.load import load_model
from fedllm.spaces import make_space
before = most()
load_model("smollm2", "generation", make_space("lora", targets=("q_proj", "v_proj")))
print(most() - before)
"""


@pytest.mark.slow
def test_the_first_load_in_fp32_holds_less_than_two_copies_of_the_weights(tmp_path):
    """SmolLM2's are 513 MB in fp32; 851 MB were measured, and 1033 where freed pieces stayed."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, timeout=600,
                          env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert float(done.stdout.split()[-1]) < 940
