"""What the comparisons with other software share: the digits, recorded runs, measured processes, the table.

Nothing heavy is imported here: a process starts with the peak memory of the one that starts it, so the script that
starts and measures the others must stay small, and each part that needs torch or NumPy is a process of its own.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TRAIN = 1437  # the digits that are trained on; those that follow are test inputs


# ---- in the parts: with NumPy, and torch where a run is recorded


def digits():
    """Images (1797, 64) from 0 to 1 in float64, and labels."""
    import numpy as np

    data = os.path.join(ROOT, "examples", "data")
    images = np.fromfile(os.path.join(data, "digits-images-idx3-ubyte"), np.uint8)[16:].reshape(-1, 64)
    labels = np.fromfile(os.path.join(data, "digits-labels-idx1-ubyte"), np.uint8)[8:]
    return images / 16, labels.astype(np.int64)


def record(folder, widths, dtype, make_optimizer, batch, steps, tests, activation="Tanh"):
    """Trains an MLP on the digits in PyTorch: folder/run is the run directory, folder/tests.npy the test inputs."""
    import numpy as np
    import torch

    sys.path.insert(0, os.path.join(ROOT, "examples", "pytorch"))
    from pathkernel_record import Recorder

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = digits()
    x, y = torch.tensor(images, dtype=getattr(torch, dtype)), torch.tensor(labels)
    layers = []
    for width, out in zip(widths, widths[1:]):
        layers += [torch.nn.Linear(width, out), getattr(torch.nn, activation)()]
    model = torch.nn.Sequential(*layers[:-1]).to(x)
    optimizer = make_optimizer(torch.optim, model.parameters())
    criterion = torch.nn.CrossEntropyLoss()
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    np.save(os.path.join(folder, "tests.npy"), x[TRAIN : TRAIN + tests].numpy())
    order = torch.empty(0, dtype=torch.int64)
    with Recorder(
        os.path.join(folder, "run"),
        model,
        loss=criterion,
        optimizer=optimizer,
        inputs=x[:TRAIN],
        targets=y[:TRAIN],
        second_moments=not isinstance(optimizer, torch.optim.SGD),
    ) as recorder:
        for _ in range(steps):
            if len(order) < batch:  # an epoch's last, smaller batch is left out
                order = torch.randperm(TRAIN) if batch < TRAIN else torch.arange(TRAIN)
            rows, order = order[:batch], order[batch:]
            optimizer.zero_grad()
            criterion(model(x[rows]), y[rows]).backward()
            optimizer.step()
            recorder(rows)


def load(folder):
    """{name: array} of a run directory or a result."""
    import numpy as np

    names = [name for name in os.listdir(folder) if name.endswith(".npy")]
    return {name[:-4]: np.load(os.path.join(folder, name)) for name in names}


def megabytes(maxrss):
    """Of ru_maxrss, which is in kilobytes, on macOS in bytes."""
    return maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def reply(**values):
    """A part's answer to the script: its last line."""
    print(json.dumps(values))


# ---- in the script


def arguments(parser):
    parser.add_argument(
        "--program", help="pathkernel-decompose; default: $PATHKERNEL_DECOMPOSE, PATH, build/"
    )
    parser.add_argument("--out", default="pathkernel-out/peers", help="where runs and results go")
    parser.add_argument("--repeat", type=int, default=3, help="times that ours is run; the least counts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser


def find_program(given):
    builds = [os.path.join(ROOT, "build", *more, "pathkernel-decompose") for more in ([], ["test"], ["demo"])]
    candidates = [
        given or os.environ.get("PATHKERNEL_DECOMPOSE") or shutil.which("pathkernel-decompose"),
        *builds,
    ]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)
    sys.exit("pathkernel-decompose is not found: build it, or name it by --program")


def measured(command, threads=1):
    """Runs a process with so many threads: (seconds, peak memory in MB, exit status, what it printed)."""
    names = "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"
    environment = dict(os.environ, **{name: str(threads) for name in names})
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    return seconds, megabytes(usage.ru_maxrss), child.returncode, text


def part(name, *options):
    """Runs a part of the calling script in a process of its own: (its reply, peak memory in MB)."""
    _, memory, status, text = measured(
        [sys.executable, os.path.abspath(sys.argv[0]), "--part", name, *options]
    )
    if status:
        sys.exit(f"the part '{name}' failed with exit status {status}\n{text}")
    lines = text.splitlines()
    return json.loads(lines[-1]) if lines else {}, memory


def decompose(program, folder, name, *options, repeat=1):
    """Ours, into folder/name: (least seconds of the whole program, peak memory in MB)."""
    out = os.path.join(folder, name)
    command = [
        program,
        os.path.join(folder, "run"),
        "--inputs",
        os.path.join(folder, "tests.npy"),
        "--out",
        out,
    ]
    runs = [measured([*command, "--threads", "1", *options]) for _ in range(repeat)]
    for _, _, status, text in runs:
        if status not in (0, 1):  # 1: its sum is not closed to the tolerance, as with a rule of few nodes
            sys.exit(f"{' '.join(command)}: exit status {status}\n{text}")
    return min(seconds for seconds, *_ in runs), max(memory for _, memory, *_ in runs)


def machine():
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")), model
            )
    return f"{model}, one thread each, load {os.getloadavg()[0]:.2f}, Python {platform.python_version()}"


COLUMNS = "{:38s} {:>8s} {:>8s} {:>6s} {:>9s} {:>9s} {:>7s} {:>7s}"


def header():
    print(COLUMNS.format("job", "ours, s", "its, s", "ratio", "our error", "its error", "ours,MB", "its,MB"))


def row(job, ours, peer, our_error, peer_error):
    """Adds a row to the table that run_all.sh prints at its end; (seconds, MB), None where something is not known."""
    path = os.environ.get("PATHKERNEL_TABLE")
    if path:
        values = [ours[0], peer[0], peer[0] / ours[0], our_error, peer_error, ours[1], peer[1]]
        with open(path, "a") as table:
            print(job, *("-" if value is None else f"{value:.3g}" for value in values), sep="\t", file=table)


def line(job, ours, peer, our_error, peer_error):
    """ours, peer: (seconds, MB)."""
    row(job, ours, peer, our_error, peer_error)
    times = f"{ours[0]:.2f}", f"{peer[0]:.2f}", f"{peer[0] / ours[0]:.1f}"
    errors = f"{our_error:.1e}", f"{peer_error:.1e}"
    print(COLUMNS.format(job, *times, *errors, f"{ours[1]:.0f}", f"{peer[1]:.0f}"), flush=True)
