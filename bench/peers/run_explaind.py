"""ExPLAIND (https://pypi.org/project/explaind, MIT; checked with 0.1.0) and pathkernel-decompose on the same runs.

    python3 run_explaind.py [--job adamw|sgd] [--width 32] [--dtype float32] [--nodes 10] [--early 10] [--rule auto]
                            [--program PATH]

Both decompose the outputs of an MLP on the digits over its training examples, by the exact path kernel. A run is
recorded in PyTorch once; both get its weights, second moments, batches and learning rates.

ExPLAIND integrates by the midpoint rule with --nodes nodes a step, and --early in the first four steps (its defaults
are 10 and 1000). Its network ends in log-softmax, the only loss gradient it has; logits and log-probabilities differ
by a number per input, so contributions are compared after taking out their mean over the outputs. They must agree
before times are compared, else the exit status is 1: by the same rule to rounding, where --early is not more than
--nodes; otherwise our own rule (--rule) and its rule to the error of ours by the midpoint rule.

Its time is that of predict() alone, one run; ours that of the whole program, start, reading and writing included, the
least of --repeat. Memory is the peak of the process; its includes torch. The error is that of the sum of all parts,
relative to max(1, |output|): ours is the closure; in float32 its has the rounding of the training in it, which ours
reports as unattributed.
"""

import argparse
import contextlib
import os
import resource
import sys
import time

import common

RATES = {"adamw": 1e-3, "sgd": 0.5}
DECAY = 0.01
AGREE = {"float32": 1e-5, "float64": 1e-10}  # relative to the largest contribution


def settings():
    parser = common.arguments(argparse.ArgumentParser(description=__doc__.split("\n\n")[0]))
    parser.add_argument("--job", choices=("adamw", "sgd"), default="adamw", help="default: adamw")
    parser.add_argument("--width", type=int, default=32, help="64-W-W-10; default: 32")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--nodes", type=int, default=10, help="ExPLAIND's nodes a step; default: its own 10")
    parser.add_argument(
        "--early", type=int, default=10, help="and in the first four steps; its default is 1000"
    )
    parser.add_argument("--rule", default="auto", help="ours, as --quadrature takes it; default: auto, adaptive")
    parser.add_argument("--steps", type=int, help="default: 200 of batch 64 (adamw), 100 of all rows (sgd)")
    parser.add_argument("--tests", type=int, help="default: 50 (adamw), 100 (sgd)")
    job = parser.parse_args()
    job.steps = job.steps or (200 if job.job == "adamw" else 100)
    job.tests = job.tests or (50 if job.job == "adamw" else 100)
    job.folder = os.path.join(job.out, f"{job.job}-{job.width}-{job.dtype}-{job.steps}-{job.tests}")
    return job


# ---- the parts, each a process of its own


def train(job):
    make = {
        "adamw": lambda optim, p: optim.AdamW(p, lr=RATES["adamw"], weight_decay=DECAY),
        "sgd": lambda optim, p: optim.SGD(p, lr=RATES["sgd"]),
    }[job.job]
    batch = 64 if job.job == "adamw" else common.TRAIN
    common.record(job.folder, (64, job.width, job.width, 10), job.dtype, make, batch, job.steps, job.tests)


def peer(job):
    """ExPLAIND's own classes, given the recorded run in place of their checkpoint files."""
    import numpy as np
    import torch

    dtype = getattr(torch, job.dtype)
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    if dtype == torch.float64:
        # ModelPath._grad_feature_map keeps the parameters with `v.dtype == torch.float` only: in float64, none.
        torch.float = torch.float64
    try:
        from explaind.data_paths import DataPath
        from explaind.epk_model import ExactPathKernelModel
        from explaind.model_paths import ModelPath
        from explaind.modulo_model.loss import RegularizedCrossEntropyLoss
        from explaind.optimizer_paths import AdamWOptimizerPath, SGDOptimizerPath
    except ImportError as error:
        sys.exit(f"ExPLAIND is not installed here ({error}); README.md says how")

    class Model(ExactPathKernelModel):
        """prev_eval, where by-products are kept, is None at first, and writing to it fails. Without by-products."""

        def exact_path_kernel_step_test(self, *given, prev_eval=None, **options):
            return *super().exact_path_kernel_step_test(*given, prev_eval={}, **options)[:3], None

    class Data(torch.utils.data.Dataset):
        def __init__(self, x, y):
            self.x, self.targets = x, list(y)

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[i], self.targets[i]

    run = {name: torch.tensor(array) for name, array in common.load(os.path.join(job.folder, "run")).items()}
    inputs = torch.tensor(np.load(os.path.join(job.folder, "tests.npy")))
    nn, width = torch.nn, job.width
    network = nn.Sequential(
        nn.Linear(64, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 10),
        nn.LogSoftmax(-1),
    )
    shapes = {name: value.shape for name, value in network.state_dict().items()}

    def named(row, prefix=""):
        pieces = row.split([shape.numel() for shape in shapes.values()])
        return {prefix + name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces)}

    with contextlib.redirect_stdout(sys.stderr):  # it prints every prediction
        path = ModelPath(
            network, device="cpu", checkpoints=[named(row) for row in run["weights"]], output_dim=10
        )
        if job.job == "adamw":
            moments = torch.cat([torch.zeros_like(run["second_moments"][:1]), run["second_moments"]])
            states = [{"exp_avg_sq": named(row, "model.")} for row in moments]
            options = dict(lr=RATES["adamw"], weight_decay=DECAY)
            optimizer = AdamWOptimizerPath(path, checkpoints=states, device="cpu", **options)
        else:
            states = [{"lr": RATES["sgd"], "weight_decay": 0.0}] * (job.steps + 1)
            options = dict(lr=RATES["sgd"], weight_decay=0.0, momentum=0.0, buffer_float16=False)
            optimizer = SGDOptimizerPath(path, checkpoints=states, device="cpu", **options)
        x, y, offsets = run["train_inputs"], run["train_targets"], run["batch_offsets"].tolist()
        data = DataPath(torch.utils.data.DataLoader(Data(x, y)))
        if len(set(np.diff(offsets))) != 1:
            sys.exit(
                "ExPLAIND divides momenta of earlier batches by the size of the current one: equal sizes only"
            )
        batches = {}  # one that returns is kept once
        for first, last in zip(offsets, offsets[1:]):
            rows = run["batch_items"][first:last]
            key = tuple(rows.tolist())
            data.checkpoints.append(batches.setdefault(key, {"X": x[rows], "y": y[rows], "indices": rows}))
        model = Model(
            model=path,
            optimizer=optimizer,
            loss_fn=RegularizedCrossEntropyLoss(alpha=0.0),
            data_path=data,
            integral_eps=1 / job.nodes,
            early_integral_eps=1 / job.early,
            device="cpu",
            evaluate_predictions=False,
        )
        nodes = [len(nodes) for _, nodes in model.get_integral_steps(1 / job.nodes, early_eps=1 / job.early)]
        if nodes != [max(job.early, job.nodes)] * 4 + [job.nodes] * (job.steps - 4):
            sys.exit(f"ExPLAIND takes {sorted(set(nodes))} nodes a step, not {job.nodes} and {job.early}")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with torch.no_grad():
            final, initial, kernels, decay, _ = model.predict(inputs, keep_kernel_matrices=True)
        seconds = time.perf_counter() - start
    # The kernels (M, 1, C, N or so) carry the rate, and not the mean over the batch.
    by_example = sum(kernel.reshape(*final.shape, -1) for kernel in kernels.values()) / (
        offsets[1] - offsets[0]
    )
    np.savez(os.path.join(job.folder, "explaind.npz"), final=final, initial=initial, by_example=by_example)
    common.reply(seconds=seconds, before=common.megabytes(before))


def compare(job):
    import numpy as np

    ours, rule = common.load(os.path.join(job.folder, "ours")), common.load(
        os.path.join(job.folder, "midpoint")
    )
    theirs = dict(np.load(os.path.join(job.folder, "explaind.npz")))

    def centred(result):
        a = result["by_example"].astype(np.float64)
        return a - a.mean(1, keepdims=True)

    exact, same, peers = centred(ours), centred(rule), centred(theirs)
    f = ours["final"]
    true = f - np.log(np.exp(f - f.max(1, keepdims=True)).sum(1, keepdims=True)) - f.max(1, keepdims=True)
    size, largest = np.maximum(1, np.abs(f)), np.abs(exact).max()
    common.reply(
        ours=float((np.abs(ours["closure"]) / size).max()),
        unattributed=float((np.abs(ours["unattributed"]) / size).max()),
        theirs=float((np.abs(theirs["final"] - true) / np.maximum(1, np.abs(true))).max()),
        same_rule=float(np.abs(peers - same).max() / largest),
        adaptive=float(np.abs(peers - exact).max() / largest),
        midpoint=float(np.abs(same - exact).max() / largest),
        largest=float(largest),
    )


# ---- the script


def main():
    job = settings()
    if job.part:
        return {"train": train, "peer": peer, "compare": compare}[job.part](job)
    program, early = common.find_program(job.program), job.early > job.nodes
    options = [
        f"--{name}={getattr(job, name)}" for name in ("out", "job", "width", "dtype", "nodes", "early")
    ]
    options += [f"--steps={job.steps}", f"--tests={job.tests}"]
    print(common.machine())
    print(
        f"{job.job}: digits 64-{job.width}-{job.width}-10, tanh, {job.dtype}, {job.steps} steps, {job.tests} inputs; "
        f"ExPLAIND: midpoint rule, {job.nodes} nodes, {max(job.early, job.nodes)} in the first 4 steps",
        flush=True,
    )
    common.part("train", *options)
    ours = common.decompose(program, job.folder, "ours", "--quadrature", job.rule, repeat=job.repeat)
    common.decompose(
        program, job.folder, "midpoint", "--quadrature", f"midpoint:{job.nodes}", "--tolerance=1"
    )
    answer, memory = common.part("peer", *options)
    found, _ = common.part("compare", *options)

    same = f"midpoint:{job.nodes}"
    print(f"contributions less their mean over the outputs, relative to the largest, {found['largest']:.3g}:")
    print(
        f"  ExPLAIND - ours by {same:14s}{found['same_rule']:.1e}"
        + " (not the same in the first steps)" * early
    )
    print(f"  ExPLAIND - ours, {job.rule:16s}{found['adaptive']:.1e}")
    print(f"  ours by {same} - {job.rule:13s}{found['midpoint']:.1e}")
    print(f"rounding of the training (ours: unattributed) {found['unattributed']:.1e}")
    print(f"ExPLAIND's process had {answer['before']:.0f} MB before predict()")
    limit = AGREE[job.dtype]
    if not (found["adaptive"] <= limit + 2 * found["midpoint"] if early else found["same_rule"] <= limit):
        print(f"THE NUMBERS DO NOT AGREE to {limit:.0e}: no comparison of times")
        return 1
    common.header()
    name = f"{job.job} 64-{job.width}-{job.width}-10 {job.dtype} midpoint {job.nodes}"
    common.line(
        name + f"/{job.early}" * early, ours, (answer["seconds"], memory), found["ours"], found["theirs"]
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
