"""KANN (https://github.com/attractivechaos/kann, MIT) and bench_train: an epoch of training by SGD.

    python3 run_kann.py --kann PATH [--jobs digits,wide] [--threads 1] [--program bench_train]

PATH is a checkout of KANN; kann_epoch.c beside this script is compiled with it, at -O3 -march=native as KANN advises for
speed, into --out. KANN starts from the weights that bench_train recorded and takes its batches and rate, in its own
float32; its weights after the epoch must agree with ours to 2e-2 of the largest, which is float32's drift over an epoch,
before times are compared, else the exit status is 1. The programs take turns; the least time of an epoch counts, ours
with recording. KANN leaves the feeding of batches to its caller, so that both gather the rows of a batch.
"""

import argparse
import os
import shutil
import subprocess
import sys

import common
import run_training

AGREE = 2e-2


def settings():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kann", default=os.environ.get("KANN"), help="a checkout; default: $KANN")
    parser.add_argument("--program", help="bench_train; default: build/bench or build/test")
    parser.add_argument("--out", default="pathkernel-out/peers/kann")
    parser.add_argument("--jobs", default="digits,wide")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=1.0, help="that KANN trains in a turn")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- the parts, each a process of its own


def convert(folder, job):
    """The recording as raw arrays."""
    import numpy as np

    run = common.load(folder)
    widths, activation = run_training.JOBS[job]
    examples, steps = len(run["train_targets"]), len(run["batch_offsets"]) - 1
    arrays = {
        "shape.i32": [len(widths) - 1, *widths, int(activation == "Tanh"), examples, steps],
        "weights.f32": run["weights"][0],
        "inputs.f32": run["train_inputs"],
        "targets.i32": run["train_targets"],
        "offsets.i32": run["batch_offsets"],
        "items.i32": run["batch_items"],
        "rate.f32": run["learning_rates"][:1],
    }
    for name, array in arrays.items():
        np.asarray(array).astype(np.float32 if name.endswith("f32") else np.int32).tofile(
            os.path.join(folder, name)
        )


def compare(folder, job):
    import numpy as np

    ours = common.load(folder)["weights"][-1].astype(np.float64)
    theirs = np.fromfile(os.path.join(folder, "trained.f32"), np.float32)
    common.reply(apart=float(np.abs(theirs - ours).max() / np.abs(ours).max()))


# ---- the script

COLUMNS = "{:12s} {:>9s} {:>9s} {:>6s} {:>9s} {:>8s} {:>7s}"


def build(given):
    """The driver, or None and why not."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not given.kann or not os.path.exists(os.path.join(given.kann, "kann.c")):
        return None, "no checkout of KANN (--kann PATH)"
    if not compiler:
        return None, "no C compiler"
    os.makedirs(given.out, exist_ok=True)
    program = os.path.abspath(os.path.join(given.out, "kann_epoch"))
    sources = [os.path.join(os.path.dirname(os.path.abspath(__file__)), "kann_epoch.c")]
    sources += [os.path.join(given.kann, name) for name in ("kann.c", "kautodiff.c")]
    command = [compiler, "-std=gnu11", "-O3", "-march=native", "-DHAVE_PTHREAD", "-I", given.kann, *sources]
    done = subprocess.run([*command, "-o", program, "-lpthread", "-lm"], stderr=subprocess.PIPE, text=True)
    return (program, None) if done.returncode == 0 else (None, f"KANN does not compile: {done.stderr[-300:]}")


def part(name, folder, job):
    command = [sys.executable, os.path.abspath(__file__), "--part", name, f"{folder}:{job}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the part '{name}' failed")
    return common.json.loads(done.stdout) if done.stdout else {}


def main():
    given = settings()
    if given.part:
        folder, job = given.part[1].rsplit(":", 1)
        return {"convert": convert, "compare": compare}[given.part[0]](folder, job)
    driver, why = build(given)
    if not driver:
        print(f"skipped: {why}")
        return 0
    bench, wrong = run_training.find_bench(given.program), 0
    print(common.machine().replace("one thread each", f"{given.threads} thread(s) each"))
    titles = "ours, ms", "its, ms", "ratio", "weights", "ours,MB", "its,MB"
    print(COLUMNS.format("epoch, sgd", *titles))
    for job in given.jobs.split(","):
        folder = os.path.join(given.out, f"{job}-sgd")
        best = run_training.ours(bench, job, "sgd", given.threads, "--keep", given.out)["recorded"]
        part("convert", folder, job)
        seconds, memory, apart = float("inf"), 0, 0
        for _ in range(given.rounds):
            _, peak, status, text = common.measured([driver, folder, str(given.seconds), str(given.threads)])
            if status:
                sys.exit(f"kann_epoch failed with exit status {status}")
            seconds, memory = min(seconds, float(text)), max(memory, peak)
            apart = part("compare", folder, job)["apart"]
            best = min(best, run_training.ours(bench, job, "sgd", given.threads)["recorded"])
        if not apart <= AGREE:
            print(f"{job}: THE WEIGHTS DO NOT AGREE: {apart:.1e}")
            wrong = 1
            continue
        options = "--quick", "--job", job, "--optimizer", "sgd", "--threads", str(given.threads)
        _, own, *_ = common.measured([bench, *options])
        common.row(
            f"epoch {job} sgd float32 KANN, {given.threads} thread(s)",
            (best, own),
            (seconds, memory),
            None,
            apart,
        )
        times = f"{best * 1e3:.3f}", f"{seconds * 1e3:.3f}", f"{seconds / best:.2f}"
        print(COLUMNS.format(job, *times, f"{apart:.1e}", f"{own:.0f}", f"{memory:.0f}"), flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
