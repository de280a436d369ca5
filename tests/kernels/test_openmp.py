"""Threads that are not to compute in parallel hold no workers."""

import subprocess
import sys

SCRIPT = """
import threading, torch
from pathlib import Path
from deltaserve.kernels.native.openmp import compute_alone, release_workers, runtime_path

def tasks():
    return len(list(Path("/proc/self/task").iterdir()))

def work():
    x = torch.randn(2000, 2000)
    (x * 2 + x).sum()
    x @ x  # MKL's, which has a number of its own

assert runtime_path() is not None
torch.set_num_threads(3)
before = tasks()
work()
assert tasks() > before, "no pool to release: this shows nothing"
release_workers()
import time; time.sleep(0.2)
assert tasks() == before, (tasks(), before)

def alone():
    compute_alone()
    at = tasks()
    work()
    assert tasks() == at and torch.get_num_threads() == 1
    done.append(True)

done = []
thread = threading.Thread(target=alone)
thread.start()
thread.join()
assert done and torch.get_num_threads() == 3, "other threads keep their number"
"""


def test_workers_are_released_and_not_made() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
