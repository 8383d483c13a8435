"""Kills of a process that records in PyTorch, from outside: it acknowledges each recorded step through a pipe, is killed at
a random moment, and no step that it acknowledged is lost, nor has any other bits than those of a run that nobody killed.

    PATHKERNEL_DECOMPOSE=build/pathkernel-decompose python3 tests/python/test_kill.py

PATHKERNEL_ROUNDS multiplies the kills. Needs what test_pytorch.py needs.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.environ.get("PATHKERNEL_DECOMPOSE") or shutil.which("pathkernel-decompose")
ROUNDS = int(os.environ.get("PATHKERNEL_ROUNDS", "1"))
STEPS, KILLS = 60, 6

CHILD = f"""
import sys
sys.path[:0] = [{HERE!r}]
from test_pytorch import *

torch.manual_seed(3)
x, y = data()
model = network()
optimizer = OPTIMIZERS[sys.argv[2]](model.parameters())
options = dict(loss="softmax_cross_entropy", optimizer=optimizer, inputs=x, targets=y)
print("ready", flush=True)
sys.stdin.readline()
with Recorder(sys.argv[1], model, **options) as record:
    for step in range({STEPS}):
        i = torch.randperm(N)[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
        record(i)
        print(record.steps, flush=True)
"""


def rows(path):
    """The whole rows of a .npy file: its size counts, since the header may lag behind."""
    with open(path, "rb") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin = file.tell()
    width = int(np.prod(shape[1:], dtype=int)) * dtype.itemsize
    count = (os.path.getsize(path) - begin) // width
    return np.fromfile(path, dtype, count * width // dtype.itemsize, offset=begin).reshape((count,) + shape[1:])


class Kill(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pathkernel-kill-")
        self.addCleanup(shutil.rmtree, self.folder)

    def start(self, run, optimizer):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, run, optimizer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.assertEqual(child.stdout.readline(), "ready\n")
        child.stdin.write("go\n")
        child.stdin.flush()
        return child

    def test_acknowledged_steps_stay(self):
        chance, kills, acknowledged = random.Random(5), 0, 0
        for optimizer in ("sgd", "adamw"):
            whole = os.path.join(self.folder, "whole-" + optimizer)
            child = self.start(whole, optimizer)
            child.communicate()
            self.assertEqual(child.returncode, 0)
            expected = {name: rows(os.path.join(whole, name + ".npy")) for name in ("weights", "batch_items")}
            self.assertEqual(len(expected["weights"]), STEPS + 1)
            for kill in range(KILLS * ROUNDS // 2):
                run = os.path.join(self.folder, f"run{kill}")
                child, last = self.start(run, optimizer), 0
                for _ in range(chance.randrange(1, 20)):
                    last = int(child.stdout.readline())
                time.sleep(chance.random() * 0.004)
                os.kill(child.pid, signal.SIGKILL)
                for line in child.stdout:
                    if line.endswith("\n"):
                        last = int(line)
                child.wait()
                child.stdin.close()
                child.stdout.close()
                weights, items = (rows(os.path.join(run, n + ".npy")) for n in ("weights", "batch_items"))
                self.assertGreaterEqual(len(weights), last + 1)
                np.testing.assert_array_equal(weights, expected["weights"][: len(weights)])
                count = min(len(items), len(expected["batch_items"]))
                np.testing.assert_array_equal(items[:count], expected["batch_items"][:count])
                self.check_decomposition(run, last)
                shutil.rmtree(run)
                kills, acknowledged = kills + 1, acknowledged + last
        print(f"{kills} kills, none of {acknowledged} acknowledged steps lost")

    def check_decomposition(self, run, last):
        out, inputs = os.path.join(self.folder, "out"), os.path.join(run, "train_inputs.npy")
        subprocess.run(
            [PROGRAM, run, "--inputs", inputs, "--out", out, "--keep", "step", "--top", "0"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.assertGreaterEqual(np.load(os.path.join(out, "by_step.npy")).shape[2], last)
        self.assertLess(np.abs(np.load(os.path.join(out, "closure.npy"))).max(), 1e-12)
        shutil.rmtree(out)


if __name__ == "__main__":
    unittest.main()
