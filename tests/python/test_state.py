"""Runs that begin with an optimizer's state, and averages of the weights: trained by torch.optim, averaged by
torch.optim.swa_utils, written by NumPy as docs/run-directory.md says or by the recorder, and decomposed by the program; against brute force in
float64, which goes forward in time with a momentum and a displacement of its own for each training example.

    PATHKERNEL_DECOMPOSE=build/pathkernel-decompose python3 tests/python/test_state.py

Needs torch >= 1.13 and NumPy. The program is $PATHKERNEL_DECOMPOSE, or pathkernel-decompose on the PATH.
"""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import torch
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "examples", "pytorch"))
from pathkernel_record import RecordError, Recorder  # noqa: E402

PROGRAM = os.environ.get("PATHKERNEL_DECOMPOSE") or shutil.which("pathkernel-decompose")
N, IN, HIDDEN, OUT, M, BATCH, BEFORE, STEPS = 12, 4, 6, 3, 4, 5, 4, 9
F64 = torch.float64
OLD = int(torch.__version__.split(".")[0]) < 2  # NAdam was right with foreach and without decay only

torch.set_num_threads(1)

OPTIMIZERS = {  # the line of run.txt, the optimizer, the names of its vectors
    "sgd": ("sgd", lambda p: torch.optim.SGD(p, lr=0.2), ()),
    "sgd_decay": ("sgd weight_decay=0.05", lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.05), ()),
    "momentum": ("sgd momentum=0.9", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ("momentum_buffer",)),
    "dampening": (
        "sgd momentum=0.8 dampening=0.3 weight_decay=0.01",
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.01),
        ("momentum_buffer",),
    ),
    "nesterov": (
        "sgd momentum=0.9 nesterov=1 weight_decay=0.01",
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        ("momentum_buffer",),
    ),
    "maximize": (
        "sgd momentum=0.8 weight_decay=0.1 maximize=1",
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, weight_decay=0.1, maximize=True),
        ("momentum_buffer",),
    ),
    "adam": (
        "adam beta1=0.8 beta2=0.95 epsilon=1e-6 weight_decay=0.05",
        lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
        ("exp_avg", "exp_avg_sq"),
    ),
    "amsgrad": (
        "adam beta2=0.9 weight_decay=0.05 amsgrad=1",
        lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.9), amsgrad=True, weight_decay=0.05),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
    "adamw": (
        "adamw weight_decay=0.1",
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
        ("exp_avg", "exp_avg_sq"),
    ),
    "adamw_maximize": (
        "adamw amsgrad=1 maximize=1",
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    ),
    "nadam": (
        "nadam" + " weight_decay=0.05" * (not OLD) + " momentum_decay=0.1",
        lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0 if OLD else 0.05, momentum_decay=0.1, foreach=OLD or None),
        ("exp_avg", "exp_avg_sq"),
    ),
    "adagrad": (
        "adagrad lr_decay=0.1 weight_decay=0.05 initial_accumulator_value=0.1",
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1, weight_decay=0.05, initial_accumulator_value=0.1),
        ("sum",),
    ),
    "rmsprop": (
        "rmsprop epsilon=1e-6 weight_decay=0.05",
        lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-6, weight_decay=0.05),
        ("square_avg",),
    ),
    "rmsprop_momentum": (
        "rmsprop alpha=0.8 epsilon=1e-3 momentum=0.8",
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.8, eps=1e-3, momentum=0.8),
        ("square_avg", "momentum_buffer"),
    ),
    "rmsprop_centered": (
        "rmsprop alpha=0.8 epsilon=1e-2 momentum=0.5 centered=1",
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.8, eps=1e-2, momentum=0.5, centered=True),
        ("square_avg", "momentum_buffer", "grad_avg"),
    ),
}


def outputs(w, x):
    a, b = HIDDEN * IN, HIDDEN * IN + HIDDEN
    c = b + OUT * HIDDEN
    return torch.tanh(x @ w[:a].reshape(HIDDEN, IN).T + w[a:b]) @ w[b:c].reshape(OUT, HIDDEN).T + w[c:]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


class Average:
    """What a user does: after each step, on whatever they hold. Displacements of the weights are averaged alike, as all is
    linear; `each` says when."""

    def __init__(self, text):
        kind, *numbers = text.split(":")
        self.beta = float(numbers.pop(0)) if kind == "ema" else None
        self.start = int(numbers.pop(0)) if numbers else 0
        self.every = int(numbers.pop(0)) if numbers else 1

    def after(self, n, mean, values):
        """The average after n steps, of the average before and the new values."""
        if n <= self.start:
            return values.clone()
        if (n - self.start) % self.every:
            return mean
        count = (n - self.start) // self.every
        return self.beta * mean + (1 - self.beta) * values if self.beta is not None else (mean * count + values) / (count + 1)


class Case(unittest.TestCase):
    worst = {}

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pathkernel-")
        self.addCleanup(shutil.rmtree, self.folder)
        self.run_dir = os.path.join(self.folder, "run")
        os.makedirs(self.run_dir)
        g = torch.Generator().manual_seed(7)
        self.x, self.y = torch.randn(N, IN, generator=g, dtype=F64), torch.randint(OUT, (N,), generator=g)
        self.tests = torch.randn(M, IN, generator=g, dtype=F64)

    def train(self, name, before, averaged=None):
        """Makes `before` steps that are not recorded and STEPS that are. Returns what brute force needs."""
        line, make, vectors = OPTIMIZERS[name]
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)).double()
        optimizer = make(model.parameters())
        generator, parameters = torch.Generator().manual_seed(3), list(model.parameters())
        at = lambda vector: flat(optimizer.state[p][vector] for p in parameters)
        w, items, states, lines = [], [], [], []
        for s in range(before + STEPS):
            indices = torch.randint(N, (BATCH,), generator=generator)
            if s >= before:
                w.append(flat(parameters))
                items.append(indices)
            if s == before:
                if averaged:
                    averaged(model, None)
                begin = [at(v) for v in vectors] if before else None
                lines = [f"initial_step {before}\n"] * bool(before)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(self.x[indices]), self.y[indices]).backward()
            optimizer.step()
            if s >= before:
                states.append({v: at(v) for v in vectors})
                if averaged:
                    averaged(model, s - before)
        w.append(flat(parameters))
        save = lambda file, array: np.save(os.path.join(self.run_dir, file + ".npy"), array)
        rate = optimizer.param_groups[0]["lr"]
        save("weights", torch.stack(w).numpy())
        save("learning_rates", np.full(STEPS, rate))
        save("batch_offsets", np.arange(STEPS + 1) * BATCH)
        save("batch_items", torch.cat(items).numpy())
        save("train_inputs", self.x.numpy())
        save("train_targets", self.y.numpy())
        if begin:
            save("initial_state", torch.stack(begin).numpy())
        if name == "nadam":
            line += " float32_product=1"
        with open(os.path.join(self.run_dir, "run.txt"), "w") as file:
            file.write(f"pathkernel-run 1\nnetwork input {IN}; dense {HIDDEN}; tanh; dense {OUT}\n")
            file.write(f"loss softmax_cross_entropy\noptimizer {line}\n" + "".join(lines))
        return optimizer.param_groups[0], vectors, w, items, states, begin

    def updates(self, name, group, vectors, w, items, states, begin, before):
        """(STEPS, N + 2, P): each step, divided among the examples, decay and what is inherited."""
        P, lr, wd = len(w[0]), group["lr"], group["weight_decay"]
        adam = "exp_avg" in vectors
        decoupled = name.startswith("adamw")
        momentum = torch.zeros(N + 2, P, dtype=F64)
        first = {"exp_avg", "momentum_buffer"} & set(vectors)
        if begin and first:
            momentum[N + 1] = begin[vectors.index(first.pop())]
        steps = []
        for s, indices in enumerate(items):
            g = torch.zeros(N + 2, P, dtype=F64)
            for i in indices.tolist():
                v = w[s].clone().requires_grad_()
                loss = nn.functional.cross_entropy(outputs(v, self.x[i : i + 1]), self.y[i : i + 1]) / BATCH
                g[i] += torch.autograd.grad(loss, v)[0]
            if group.get("maximize"):
                g = -g
            if not decoupled:
                g[N] = wd * w[s]
            n, state = before + s + 1, states[s]
            if adam:
                b1, b2 = group["betas"]
                momentum = b1 * momentum + (1 - b1) * g
                root = (state[vectors[-1]] / (1 - b2**n)).sqrt() + group["eps"]
                if name == "nadam":
                    mu = lambda k: b1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"]))
                    product = torch.tensor(1.0)  # as torch has it, in float32
                    for k in range(1, n + 1):
                        product = product * mu(k)
                    product = float(product)
                    step = (1 - mu(n)) / (1 - product) * g + mu(n + 1) / (1 - product * mu(n + 1)) * momentum
                    step = lr * step / root
                else:
                    step = lr / (1 - b1**n) * momentum / root
            elif name.startswith("rmsprop"):
                mean = state.get("grad_avg", torch.zeros(P, dtype=F64))
                g = g / ((state["square_avg"] - mean**2).sqrt() + group["eps"])
                momentum = group["momentum"] * momentum + g
                step = lr * momentum
            elif name == "adagrad":
                step = lr / (1 + (n - 1) * group["lr_decay"]) * g / (state["sum"].sqrt() + group["eps"])
            else:
                mu = group["momentum"]
                momentum = g if n == 1 else mu * momentum + (1 - group["dampening"]) * g
                step = lr * (g + mu * momentum if group["nesterov"] else momentum if mu else g)
            if decoupled:
                step = step.clone()
                step[N] += lr * wd * w[s]
            steps.append(-step)
            rest = (w[s + 1] - w[s] - steps[-1].sum(0)).abs().max()
            self.assertLess(rest, 1e-14, "brute force and torch differ")
        return steps

    def tangents(self, start, end):
        nodes, node_weights = np.polynomial.legendre.leggauss(20)
        total = 0
        for t, weight in zip((nodes + 1) / 2, node_weights / 2):
            total = total + weight * torch.autograd.functional.jacobian(
                lambda w: outputs(w, self.tests), start + t * (end - start)
            )
        return total

    def decompose(self, *options, expected=0):
        inputs, out = os.path.join(self.folder, "x.npy"), os.path.join(self.folder, "out")
        np.save(inputs, self.tests.numpy())
        shutil.rmtree(out, ignore_errors=True)
        done = subprocess.run(
            [PROGRAM, self.run_dir, "--inputs", inputs, "--out", out, "--threads", "1", *options],
            capture_output=True,
            text=True,
        )
        self.said = done.stdout + done.stderr
        self.assertEqual(done.returncode, expected, self.said)
        if expected == 2:
            return None
        return {name[:-4]: np.load(os.path.join(out, name)) for name in os.listdir(out)}

    def compare(self, what, result, path, shares, inherits):
        """result against the shares of each step along a path."""
        expected = sum(
            torch.einsum("mcp,ip->mci", self.tangents(a, b), share) for a, b, share in zip(path, path[1:], shares)
        ).numpy()
        size = np.abs(expected[:, :, :N]).max()
        pairs = [(result["by_example"], expected[:, :, :N]), (result["decay"], expected[:, :, N])]
        self.assertEqual("inherited" in result, inherits)
        if inherits:
            pairs.append((result["inherited"], expected[:, :, N + 1]))
        entries = max(np.abs(a - b).max() for a, b in pairs) / size
        last = outputs(path[-1], self.tests).numpy()
        scale = max(np.abs(last).max(), np.abs(result["initial"]).max(), size)
        final = np.abs(result["final"] - last).max() / scale
        whole = result["initial"] + result["by_example"].sum(2) + result["decay"] + result.get("inherited", 0)
        closure = np.abs(result["final"] - whole).max() / scale
        for kind, error, limit in (("entries", entries, 1e-10), ("final", final, 1e-13), ("closure", closure, 1e-12)):
            Case.worst[what, kind] = max(Case.worst.get((what, kind), 0), error)
            self.assertLess(error, limit, (what, kind))


class Resumed(Case):
    def test_every_optimizer(self):
        for name in OPTIMIZERS:
            with self.subTest(name):
                trained = self.train(name, BEFORE)
                vectors = trained[1]
                if not vectors:
                    self.assertFalse(os.path.exists(os.path.join(self.run_dir, "initial_state.npy")))
                shares = self.updates(name, *trained, BEFORE)
                inherits = bool(vectors)
                self.compare("resumed", self.decompose(), trained[2], shares, inherits)
                for until in (3, STEPS):
                    result = self.decompose("--until", str(until))
                    self.compare("resumed, until", result, trained[2][: until + 1], shares[:until], inherits)
                if os.path.exists(os.path.join(self.run_dir, "initial_state.npy")):
                    os.unlink(os.path.join(self.run_dir, "initial_state.npy"))


class Averages(Case):
    def judge(self, name, text, before, until=STEPS):
        """--average against the definition, and the weights against those of torch's own class where it has one."""
        kept = []
        swa = None

        def averaged(model, step):
            """AveragedModel, from the first average on."""
            nonlocal swa
            if step is None and text.startswith(("ema:0.8:1", "swa:1:1")):
                average = None
                if text.startswith("ema"):
                    average = lambda mean, new, count: 0.8 * mean + (1 - 0.8) * new
                swa = torch.optim.swa_utils.AveragedModel(model, avg_fn=average)
            elif step is not None and swa is not None:
                swa.update_parameters(model)
                kept.append(flat(swa.module.parameters()))

        trained = self.train(name, before, averaged)
        group, vectors, w, items, states, begin = trained
        shares = self.updates(name, *trained, before)
        average = Average(text)
        path, mean = [w[0]], torch.zeros_like(shares[0])
        moved, taken = torch.zeros_like(shares[0]), []
        for n in range(1, until + 1):
            path.append(average.after(n, path[-1], w[n]))
            moved = moved + shares[n - 1]
            new = average.after(n, mean, moved)
            taken.append(new - mean)
            mean = new
        if kept:
            self.assertLess((path[-1] - kept[until - 1]).abs().max(), 1e-14)
        options = ["--average", text] + ["--until", str(until)] * (until < STEPS)
        self.compare(text.split(":")[0], self.decompose(*options), path, taken, bool(before and vectors))
        if before and vectors:
            os.unlink(os.path.join(self.run_dir, "initial_state.npy"))

    def test_every_optimizer(self):
        for name in OPTIMIZERS:
            for text in ("ema:0.8", "ema:0.8:1", "swa:1:1", "swa:3:2"):
                with self.subTest(name, average=text):
                    self.judge(name, text, 0)

    def test_resumed(self):
        for name in ("sgd_decay", "dampening", "adamw", "nadam", "rmsprop_momentum"):
            for text in ("ema:0.8:1", "swa:2:3", "ema:0.5:2:2"):
                with self.subTest(name, average=text):
                    self.judge(name, text, BEFORE)

    def test_until(self):
        for text in ("ema:0.8", "swa:1:2"):
            with self.subTest(text):
                self.judge("adam", text, 0, until=5)


class Recorded(Case):
    """The recorder, with optimizers that have made steps before."""

    def start(self, name, steps=BEFORE, groups=False, dtype=F64):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)).to(dtype)
        parameters = list(model.parameters())
        if groups:
            parameters = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.0, "lr": 0.01}]
        optimizer = OPTIMIZERS[name][1](parameters)
        self.generator = torch.Generator().manual_seed(3)
        for _ in range(steps):
            self.step(model, optimizer)
        return model, optimizer

    def step(self, model, optimizer, clip=None):
        indices = torch.randint(N, (BATCH,), generator=self.generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(self.x[indices].to(model[0].weight)), self.y[indices]).backward()
        if clip:
            clip(model.parameters())
        optimizer.step()
        return indices

    def record(self, model, optimizer, steps=STEPS, clip=None, **options):
        x = self.x.to(model[0].weight)
        with Recorder(
            self.run_dir, model, loss=nn.CrossEntropyLoss(), optimizer=optimizer, inputs=x, targets=self.y, **options
        ) as record:
            for _ in range(steps):
                record(self.step(model, optimizer, clip))
        return record

    def read(self, name):
        with open(os.path.join(self.run_dir, name), "rb") as file:
            return file.read()

    def test_every_optimizer(self):
        """What the recorder writes is what the loop by hand writes."""
        for name, (_, _, vectors) in OPTIMIZERS.items():
            with self.subTest(name):
                shutil.rmtree(self.run_dir)
                os.makedirs(self.run_dir)
                self.train(name, BEFORE)
                by_hand = {file: self.read(file) for file in os.listdir(self.run_dir) if file.endswith(".npy")}
                result = self.decompose()
                shutil.rmtree(self.run_dir)
                self.record(*self.start(name))
                for file, bytes in by_hand.items():
                    if file in ("weights.npy", "initial_state.npy"):
                        there = np.load(os.path.join(self.run_dir, file))
                        np.save(os.path.join(self.folder, "there.npy"), there)
                        with open(os.path.join(self.folder, "there.npy"), "rb") as again:
                            self.assertEqual(again.read(), bytes, file)
                text = self.read("run.txt").decode()
                counted = BEFORE if "sgd" not in text else 1
                self.assertEqual(f"initial_step {counted}\n" in text, bool(vectors))
                recorded = self.decompose()
                for key in result:
                    self.assertLess(np.abs(result[key] - recorded[key]).max(), 1e-13, key)

    def test_groups_and_float32(self):
        for name in ("dampening", "adamw", "nadam", "rmsprop_centered", "adagrad"):
            for dtype in (F64, torch.float32):
                with self.subTest(name, dtype=dtype):
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                    self.record(*self.start(name, groups=True, dtype=dtype))
                    result = self.decompose()
                    self.assertEqual("inherited" in result, True)
                    limit = 1e-12 if dtype == F64 else 2e-5
                    self.assertLess(np.abs(result["unattributed"]).max(), limit)
                    self.assertLess(np.abs(result["closure"]).max(), 1e-12)

    def test_goes_on(self):
        """A recording that begins with a state is resumed, from its end, from an earlier step and from its start."""
        for name in ("nesterov", "adam", "nadam"):
            for steps, back in ((5, 5), (5, 2), (0, 0), (5, 0)):
                with self.subTest(name, steps=steps, back=back):
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                    model, optimizer = self.start(name)
                    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), self.generator.get_state()))
                    x = self.x
                    with Recorder(
                        self.run_dir, model, loss=nn.CrossEntropyLoss(), optimizer=optimizer, inputs=x, targets=self.y
                    ) as record:
                        for k in range(steps):
                            if k == back:
                                saved = copy.deepcopy(
                                    (model.state_dict(), optimizer.state_dict(), self.generator.get_state())
                                )
                            record(self.step(model, optimizer))
                        if back == steps:
                            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), self.generator.get_state()))
                    model.load_state_dict(saved[0])
                    optimizer.load_state_dict(saved[1])
                    self.generator.set_state(saved[2])
                    if name == "nadam":  # load_state_dict of a double model makes it double
                        for state in optimizer.state.values():
                            state["mu_product"] = state["mu_product"].float()
                    record = self.record(model, optimizer, STEPS - back, resume=back)
                    self.assertEqual(record.steps, STEPS)
                    result = self.decompose()
                    self.assertLess(np.abs(result["unattributed"]).max(), 1e-12)
                    shutil.rmtree(self.run_dir)
                    self.record(*self.start(name))
                    whole = self.decompose()
                    for key in whole:
                        self.assertLess(np.abs(result[key] - whole[key]).max(), 1e-12, key)

    def refuse(self, words, model, optimizer, steps=STEPS, **options):
        shutil.rmtree(self.run_dir, ignore_errors=True)
        with self.assertRaisesRegex(RecordError, words):
            self.record(model, optimizer, steps, **options)
        self.assertFalse(os.path.exists(self.run_dir))

    def test_refusals(self):
        model, optimizer = self.start("adam")
        optimizer.state[model[2].bias]["step"] += 3
        self.refuse("made 7 steps with parameter '2.bias' and 4 with '0.weight'", model, optimizer)
        model, optimizer = self.start("adam")
        del optimizer.state[model[0].weight]
        self.refuse("made 4 steps with parameter '0.bias' and 0 with '0.weight'", model, optimizer)
        model, optimizer = self.start("momentum")
        del optimizer.state[model[2].weight]
        self.refuse("has a momentum of parameter '0.weight' and none of '2.weight'", model, optimizer)
        model, optimizer = self.start("amsgrad")
        del optimizer.state[model[2].weight]["max_exp_avg_sq"]
        self.refuse("has no max_exp_avg_sq", model, optimizer)
        model, optimizer = self.start("adamw")
        optimizer.state[model[0].bias]["exp_avg"][0] = float("nan")
        self.refuse("holds a NaN or an infinity", model, optimizer)
        model, optimizer = self.start("nadam")
        optimizer.param_groups[0]["betas"] = (0.8, 0.999)
        self.refuse("mu_product is not that of the betas", model, optimizer)
        # Another state than the one that the run begins with.
        model, optimizer = self.start("adam")
        self.record(model, optimizer, 0)
        optimizer.state[model[0].bias]["exp_avg"] += 1
        with self.assertRaisesRegex(RecordError, "cannot be resumed: it begins with an optimizer that has made 4 steps and"):
            self.record(model, optimizer, resume=True)
        model, optimizer = self.start("adam")
        for state in optimizer.state.values():
            state["step"] += 1
        with self.assertRaisesRegex(RecordError, "has made 4 steps, this one has made 5"):
            self.record(model, optimizer, resume=True)

    def test_clipping_by_number(self):
        """clip_grad_value_ is refused where it acts, by name; where it does nothing, the run is what it is without."""
        values = lambda most: lambda parameters: nn.utils.clip_grad_value_(parameters, most)
        for name in ("sgd", "adamw"):
            for most in (1e-3, 0.02):
                with self.subTest(name, most=most):
                    model, optimizer = self.start(name, 0)
                    self.refuse(f"step 0: the gradient was clipped number by number, at {most:g}", model, optimizer, clip=values(most))
        self.record(*self.start("adamw", 0), clip=values(100.0))
        self.assertLess(np.abs(self.decompose()["unattributed"]).max(), 1e-12)


def tearDownModule():
    print()
    for (what, kind), error in sorted(Case.worst.items()):
        print(f"{what:16} {kind:8} worst {error:.1e}")


if __name__ == "__main__":
    unittest.main()
