#!/usr/bin/env python3
"""An epoch of training, PyTorch's and ours: the same data, weights, batches and rates.

    cmake --preset bench && cmake --build build/bench
    python3 bench/peers/run_training.py                                  # all jobs, 1 thread
    python3 bench/peers/run_training.py --threads 2 --jobs wide --optimizers adamw

Ours is bench_train, which also records each job: PyTorch starts from the recorded weights and takes the recorded
batches and rates. Its weights after the epoch are compared with ours before any time is. Then the programs take turns, a
process each, and the least time of an epoch counts. PyTorch trains eagerly, with its fused optimisers, and compiled; in
float64 and float32. Ours is float64, without recording and with it. Another peer is one more part and a line of PEERS.
"""

import argparse
import os
import subprocess
import sys
import time

import common

JOBS = {"digits": ((64, 32, 32, 10), "Tanh"), "wide": ((784, 128, 10), "ReLU")}
OPTIMIZERS = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
}
AGREE = {"float64": 1e-9, "float32": 2e-2}  # of weights after an epoch, relative to the largest


def settings():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", help="bench_train; default: build/bench or build/test")
    parser.add_argument("--out", default="pathkernel-out/peers/training", help="where recordings go")
    parser.add_argument("--jobs", default="digits,wide")
    parser.add_argument("--optimizers", default="sgd,momentum,adam,adamw")
    parser.add_argument("--dtypes", default="float64,float32")
    parser.add_argument("--ways", default="eager,fused,compiled", help="of PyTorch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a peer trains in a turn")
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- the peer's part: a process of its own


def torch_epoch(folder, job, optimizer, dtype, way, threads):
    """A function that trains one epoch and one that gives the weights as a vector in float64."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    run = common.load(folder)
    real = getattr(torch, dtype)
    x, y = torch.tensor(run["train_inputs"]).reshape(len(run["train_targets"]), -1).to(real), run["train_targets"]
    y, offsets = torch.tensor(y), run["batch_offsets"]
    items = torch.tensor(run["batch_items"])
    batches = [items[first:last] for first, last in zip(offsets, offsets[1:])]
    widths, activation = JOBS[job]
    layers = []
    for width, out in zip(widths, widths[1:]):
        layers += [torch.nn.Linear(width, out), getattr(torch.nn, activation)()]
    model = torch.nn.Sequential(*layers[:-1]).to(real)
    parameters = list(model.parameters())
    torch.nn.utils.vector_to_parameters(torch.tensor(run["weights"][0]).to(real), parameters)
    name, options = OPTIMIZERS[optimizer]
    rates = set(run["learning_rates"].tolist())
    assert len(rates) == 1, "a rate for each step"
    step_rule = getattr(torch.optim, name)(parameters, lr=rates.pop(), fused=way == "fused" or None, **options)
    criterion = torch.nn.CrossEntropyLoss()

    def loss(inputs, targets):
        return criterion(model(inputs), targets)

    if way == "compiled":
        loss = torch.compile(loss, dynamic=False)

    def epoch():
        for rows in batches:
            step_rule.zero_grad()
            loss(x[rows], y[rows]).backward()
            step_rule.step()

    def weights():
        return torch.nn.utils.parameters_to_vector(parameters).detach().to(torch.float64).numpy()

    return epoch, weights, np.asarray(run["weights"][-1], np.float64)


def torch_part(arguments, threads, seconds):
    """Replies with the least seconds of an epoch and the difference of the weights after the first."""
    import numpy as np

    epoch, weights, ours = torch_epoch(*arguments, threads)
    epoch()
    difference = float(np.abs(weights() - ours).max() / np.abs(ours).max())
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        epoch()
        times.append(time.perf_counter() - start)
    common.reply(seconds=min(times), difference=difference)


# ---- the script


def find_bench(given):
    builds = [os.path.join(common.ROOT, "build", name, "bench", "bench_train") for name in ("bench", "test")]
    for path in [given or os.environ.get("PATHKERNEL_BENCH_TRAIN"), *builds]:
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)
    sys.exit("bench_train is not found: build it, or name it by --program")


def ours(program, job, optimizer, threads, *options):
    """{"plain": s, "recorded": s}: the least seconds of an epoch."""
    command = [program, "--job", job, "--optimizer", optimizer, "--threads", str(threads), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")
    rows = [row.split(",") for row in done.stdout.splitlines() if not row.startswith("#")]
    return {
        "recorded" if row[0].endswith("_recorded") else "plain": float(row[3])
        for row in rows
        if row[-1] == "PASS"
    }


def theirs(settings, folder, job, optimizer, dtype, way):
    """PyTorch's (least seconds of an epoch, difference to our weights), or None where it does not run."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(settings.threads), MKL_NUM_THREADS=str(settings.threads))
    command = [sys.executable, os.path.abspath(__file__), "--threads", str(settings.threads)]
    command += ["--seconds", str(settings.seconds), "--part", folder, job, optimizer, dtype, way]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        print(f"{job} {optimizer} {dtype} {way}: does not run: {done.stderr.strip().splitlines()[-1]}")
        return None
    answer = common.json.loads(done.stdout.splitlines()[-1])
    return answer["seconds"], answer["difference"]


PEERS = {"torch": theirs}

COLUMNS = "{:30s} {:>2s} {:>9s} {:>9s} {:>9s} {:>7s} {:>9s} {:>9s}"


def compare(settings, program, job, optimizer):
    """Prints a line for each way of the peer. The number of wrong results."""
    folder = os.path.join(settings.out, f"{job}-{optimizer}")
    os.makedirs(settings.out, exist_ok=True)
    best = ours(program, job, optimizer, settings.threads, "--keep", settings.out)
    ways = [(d, w) for d in settings.dtypes.split(",") for w in settings.ways.split(",")]
    found, wrong = {}, 0
    for turn in range(settings.rounds):
        for dtype, way in ways:
            if turn and found.get((dtype, way)) is None:
                continue
            answer = theirs(settings, folder, job, optimizer, dtype, way)
            if answer and answer[1] <= AGREE[dtype]:
                found[dtype, way] = min(found.get((dtype, way), answer), answer)
            elif answer:
                print(f"{job} {optimizer} {dtype} {way}: THE WEIGHTS DO NOT AGREE: {answer[1]:.1e}")
                wrong += 1
        for case, seconds in ours(program, job, optimizer, settings.threads).items():
            best[case] = min(best[case], seconds)
    plain, recorded = best["plain"], best["recorded"]
    for (dtype, way), (seconds, difference) in found.items():
        name = f"{job} {optimizer} {dtype} {way}"
        times = f"{plain * 1e3:.3f}", f"{recorded * 1e3:.3f}", f"{seconds * 1e3:.3f}"
        ratios = f"{seconds / recorded:.2f}", f"{recorded / plain - 1:.1%}", f"{difference:.1e}"
        print(COLUMNS.format(name, str(settings.threads), *times, *ratios), flush=True)
        label = f"epoch {name} PyTorch, {settings.threads} thread(s)"
        common.row(label, (recorded, None), (seconds, None), None, difference)
    return wrong


def main():
    given = settings()
    if given.part:
        return torch_part(given.part, given.threads, given.seconds)
    program = find_bench(given.program)
    print(common.machine().replace("one thread each", f"{given.threads} thread(s) each"))
    print("least ms of an epoch; ratio: peer / ours with recording")
    titles = "ours", "recorded", "peer", "ratio", "recording", "weights"
    print(COLUMNS.format("job, optimiser, PyTorch's way", "n", *titles), flush=True)
    return sum(
        compare(given, program, job, optimizer)
        for job in given.jobs.split(",")
        for optimizer in given.optimizers.split(",")
    )


if __name__ == "__main__":
    sys.exit(main())
