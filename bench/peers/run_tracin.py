"""Captum's TracInCP (https://captum.ai, BSD) with a checkpoint for every step, and pathkernel-decompose by the left rule.

    python3 run_tracin.py [--width 32] [--activation Tanh] [--steps 100] [--tests 100] [--dtype float64] [--program PATH]

Both on the same full-batch SGD run on the digits, recorded in PyTorch. What both compute: for each test input x with label
k and each training example i

    sum over steps s of  rate_s / N  < grad f_k(x; w_s), grad l_i(w_s) >.

TracInCP's own measure has the gradient of the test input's loss in place of grad f_k; its argument test_loss_fn takes the
labelled output instead (its documentation names this use), which is what our decomposition by --quadrature left --outputs
label is, but for the sign and the mean over the batch. Checkpoints are rows of the recorded weights: nothing is read from
a disk in its time. It takes per-example gradients a batch at a time (sample_wise_grads_per_batch).

The contributions must agree to 1e-10 of the largest (float32: 1e-4) before times are compared, else the exit status is 1.
"Our error" is that of the left rule against the exact path integral, as the closure certifies it, and so is "its error":
the rule is one and the same. The last line times our exact decomposition of the same run. One thread each; its time is that
of influence() alone, ours that of the whole program, start, reading and writing included.
"""

import argparse
import os
import sys
import time

import common

RATE = 0.1
AGREE = {"float32": 1e-4, "float64": 1e-10}


def settings():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.split("\n\n")[0]))
    parser.add_argument("--width", type=int, default=32, help="64-W-W-10; default: 32")
    parser.add_argument("--activation", default="Tanh", choices=("Tanh", "ReLU"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    job = parser.parse_args()
    name = f"tracin-{job.width}-{job.activation}-{job.dtype}-{job.steps}-{job.tests}"
    job.folder = os.path.join(job.out, name)
    return job


# ---- the parts, each a process of its own


def train(job):
    import numpy as np

    def make(optim, parameters):
        return optim.SGD(parameters, lr=RATE)

    widths = 64, job.width, job.width, 10
    common.record(
        job.folder, widths, job.dtype, make, common.TRAIN, job.steps, job.tests, activation=job.activation
    )
    labels = common.digits()[1][common.TRAIN : common.TRAIN + job.tests]
    np.save(os.path.join(job.folder, "labels.npy"), labels)


def peer(job):
    try:
        import numpy as np
        import torch
        from captum.influence import TracInCP
    except ImportError as error:
        return common.reply(missing=f"Captum is not installed here ({error}); README.md says how")
    torch.set_num_threads(1)
    dtype = getattr(torch, job.dtype)
    torch.set_default_dtype(dtype)
    run = common.load(os.path.join(job.folder, "run"))
    nn, act = torch.nn, getattr(torch.nn, job.activation)
    model = nn.Sequential(
        nn.Linear(64, job.width), act(), nn.Linear(job.width, job.width), act(), nn.Linear(job.width, 10)
    )
    weights = torch.tensor(run["weights"], dtype=dtype)
    x, y = torch.tensor(run["train_inputs"], dtype=dtype), torch.tensor(run["train_targets"])
    tests = torch.tensor(np.load(os.path.join(job.folder, "tests.npy")), dtype=dtype)
    labels = torch.tensor(np.load(os.path.join(job.folder, "labels.npy")))

    class LabelledOutput(nn.Module):
        reduction = "sum"

        def forward(self, outputs, target):
            return outputs.gather(1, target[:, None]).sum()

    def load(network, step):
        nn.utils.vector_to_parameters(weights[step].clone(), network.parameters())
        return float(run["learning_rates"][step])

    tracin = TracInCP(
        model,
        torch.utils.data.TensorDataset(x, y),
        list(range(job.steps)),
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        test_loss_fn=LabelledOutput(),
        batch_size=common.TRAIN,
        sample_wise_grads_per_batch=True,
    )
    start = time.perf_counter()
    influence = tracin.influence((tests, labels))
    seconds = time.perf_counter() - start
    np.save(os.path.join(job.folder, "tracin.npy"), -influence.detach().numpy() / len(x))
    common.reply(seconds=seconds)


def compare(job):
    import numpy as np

    left, exact = (common.load(os.path.join(job.folder, name)) for name in ("left", "ours"))
    theirs = np.load(os.path.join(job.folder, "tracin.npy"))
    mine = left["by_example"][:, 0]
    size = np.maximum(1, np.abs(left["final"]))
    common.reply(
        apart=float(np.abs(theirs - mine).max() / np.abs(mine).max()),
        left=float((np.abs(left["closure"]) / size).max()),
        exact=float((np.abs(exact["closure"]) / size).max()),
        theirs=float((np.abs(left["final"] - left["initial"] - theirs.sum(1, keepdims=True)) / size).max()),
    )


# ---- the script


def main():
    job = settings()
    if job.part:
        return {"train": train, "peer": peer, "compare": compare}[job.part](job)
    program = common.find_program(job.program)
    names = "out", "width", "activation", "steps", "tests", "dtype"
    options = [f"--{name}={getattr(job, name)}" for name in names]
    print(common.machine())
    print(
        f"digits 64-{job.width}-{job.width}-10, {job.activation}, {job.dtype}, {job.steps} full-batch steps, ",
        end="",
    )
    print(f"{job.tests} inputs; TracInCP: {job.steps} checkpoints", flush=True)
    common.part("train", *options)
    labelled = ["--outputs", "label", "--labels", os.path.join(job.folder, "labels.npy")]
    left = common.decompose(
        program, job.folder, "left", "--quadrature", "left", "--tolerance=1", *labelled, repeat=job.repeat
    )
    exact = common.decompose(program, job.folder, "ours", *labelled, repeat=job.repeat)
    answer, memory = common.part("peer", *options)
    if "missing" in answer:
        print(f"skipped: {answer['missing']}")
        return 0
    found, _ = common.part("compare", *options)
    print(f"contributions, TracInCP - ours by the left rule, relative to the largest: {found['apart']:.1e}")
    if not found["apart"] <= AGREE[job.dtype]:
        print(f"THE NUMBERS DO NOT AGREE to {AGREE[job.dtype]:.0e}: no comparison of times")
        return 1
    common.header()
    name = f"tracin 64-{job.width}-{job.width}-10 {job.activation} {job.dtype}"
    common.line(name + " left", left, (answer["seconds"], memory), found["left"], found["theirs"])
    common.line(name + " exact", exact, (answer["seconds"], memory), found["exact"], found["theirs"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
