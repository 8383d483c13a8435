"""examples/pytorch/pathkernel_record.py and the program: what PyTorch trains is decomposed to rounding.

    PATHKERNEL_DECOMPOSE=build/pathkernel-decompose python3 tests/python/test_pytorch.py

Needs torch >= 1.13 and NumPy. The program is $PATHKERNEL_DECOMPOSE, or pathkernel-decompose on the PATH.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
import warnings

import numpy as np
import torch
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "examples", "pytorch"))
from pathkernel_record import Abs, Erf, Indexed, RecordError, Recorder, _Growing  # noqa: E402

PROGRAM = os.environ.get("PATHKERNEL_DECOMPOSE") or shutil.which("pathkernel-decompose")
N, IN, HIDDEN, OUT, M, BATCH, STEPS = 24, 5, 7, 3, 5, 6, 15
F32, F64 = torch.float32, torch.float64

torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*weight_norm.*")
warnings.filterwarnings("error", message=".*lr_scheduler.*")  # the recorder must not upset schedulers


def data(loss="softmax_cross_entropy", dtype=F64, outputs=OUT, n=N):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n, IN, generator=g, dtype=F64).to(dtype)
    if loss in ("softmax_cross_entropy", "nll") or (loss == "hinge" and outputs > 1):
        return x, torch.randint(outputs, (n,), generator=g)
    if loss == "logistic":
        return x, torch.randint(2, (n, outputs), generator=g).to(dtype)
    if loss == "hinge":
        return x, (2 * torch.randint(2, (n, outputs), generator=g) - 1).to(dtype)
    return x, torch.randn(n, outputs, generator=g, dtype=F64).to(dtype)


def network(activation=nn.Tanh, dtype=F64, outputs=OUT, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(IN, HIDDEN),
        activation(),
        nn.Sequential(nn.Linear(HIDDEN, 6, bias=False), activation()),
        nn.Linear(6, outputs),
    ).to(dtype)


OBJECTIVES = {  # name: what a user computes
    "squared": lambda f, y: ((f - y) ** 2).sum(1).mean() / 2,
    "mean_squared": nn.MSELoss(),
    "softmax_cross_entropy": nn.CrossEntropyLoss(),
    "logistic": nn.BCEWithLogitsLoss(),
    "nll": nn.NLLLoss(),
    "huber": nn.SmoothL1Loss(),
    "hinge": nn.MultiMarginLoss(),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam_decay": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
}


class Case(unittest.TestCase):
    worst = {}

    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="pathkernel-")
        self.addCleanup(shutil.rmtree, self.folder)
        self.run_dir = os.path.join(self.folder, "run")

    def train(
        self,
        model,
        optimizer,
        loss="softmax_cross_entropy",
        objective=None,
        clip=None,
        scheduler=None,
        steps=STEPS,
        recorded_data=None,
        **options,
    ):
        """The ordinary loop."""
        dtype = next(model.parameters()).dtype
        x, y = recorded_data or data(loss if isinstance(loss, str) else "softmax_cross_entropy", dtype)
        objective = objective or OBJECTIVES[loss]
        generator = torch.Generator().manual_seed(3)
        with Recorder(
            self.run_dir, model, loss=loss, optimizer=optimizer, inputs=x, targets=y, **options
        ) as record:
            for _ in range(steps):
                indices = torch.randint(len(x), (BATCH,), generator=generator)  # rows may repeat
                optimizer.zero_grad()
                objective(model(x[indices]), y[indices]).backward()
                if clip:
                    record.clip(clip)
                optimizer.step()
                if scheduler:
                    scheduler.step()
                record(indices)
        return x, y

    def decompose(self, dtype=F64, expected=0, *options):
        self.tests = torch.randn(M, IN, generator=torch.Generator().manual_seed(11), dtype=F64).to(dtype)
        inputs, out = os.path.join(self.folder, "x.npy"), os.path.join(self.folder, "out")
        np.save(inputs, self.tests.numpy())
        done = subprocess.run(
            [
                PROGRAM,
                self.run_dir,
                "--inputs",
                inputs,
                "--out",
                out,
                "--keep",
                "train",
                "--keep",
                "step",
                "--keep",
                "layer",
                "--threads",
                "1",
                *options,
            ],
            capture_output=True,
            text=True,
        )
        self.assertEqual(done.returncode, expected, done.stdout + done.stderr)
        self.said = done.stdout + done.stderr
        return (
            {name[:-4]: np.load(os.path.join(out, name)) for name in os.listdir(out)}
            if expected < 2
            else None
        )

    def certify(self, model, unattributed=None):
        """The promises that every run keeps."""
        dtype = next(model.parameters()).dtype
        result = self.decompose(dtype)
        size = np.maximum(1, np.abs(result["final"]))
        with torch.no_grad():
            model_says = model(self.tests).double().numpy()
        kind = "float64" if dtype == F64 else "float32"
        for name, error, limit in (
            ("outputs", np.abs(model_says - result["final"]) / size, 1e-12 if dtype == F64 else 1e-6),
            ("closure", np.abs(result["closure"]) / size, 1e-12),
            (
                "unattributed",
                np.abs(result["unattributed"]) / size,
                unattributed or (1e-12 if dtype == F64 else 1e-5),
            ),
            *(
                (
                    "identity by " + axis,
                    np.abs(
                        result["initial"]
                        + result["by_" + axis].sum(2)
                        + result["decay"]
                        + result["unattributed"]
                        + result["closure"]
                        - result["final"]
                    )
                    / size,
                    1e-13,
                )
                for axis in ("example", "step", "layer")
            ),
        ):
            Case.worst[name, kind] = max(Case.worst.get((name, kind), 0), error.max())
            self.assertLessEqual(error.max(), limit, f"{name}, {kind}")
        return result


class Runs(Case):
    def test_recorded_second_moments_are_used(self):
        """Four times as large, they halve each contribution; the other half of the steps is unattributed."""
        model = network()
        self.train(model, torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-12), second_moments=True)
        before, path = self.decompose(), os.path.join(self.run_dir, "second_moments.npy")
        np.save(path, 4 * np.load(path))
        after = self.decompose()
        size = np.abs(before["by_example"]).max()
        self.assertLess(np.abs(after["by_example"] - before["by_example"] / 2).max() / size, 1e-6)
        self.assertGreater(np.abs(after["unattributed"]).max(), 1e-2)
        self.assertLess(np.abs(after["closure"]).max(), 1e-12)

    def test_optimizers(self):
        for dtype in (F64, F32):
            for name, make in OPTIMIZERS.items():
                for extra in ("", "clip", "scheduler", "second_moments"):
                    if extra == "second_moments" and "adam" not in name:
                        continue
                    with self.subTest(dtype=dtype, optimizer=name, extra=extra):
                        shutil.rmtree(self.run_dir, ignore_errors=True)
                        model = network(nn.Tanh if extra != "clip" else nn.ReLU, dtype)
                        optimizer = make(model.parameters())
                        rates = (
                            torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
                            if extra == "scheduler"
                            else None
                        )
                        self.train(
                            model,
                            optimizer,
                            clip=0.3 if extra == "clip" else None,
                            scheduler=rates,
                            **({"second_moments": True} if extra == "second_moments" else {}),
                        )
                        self.certify(model)
                        scales = np.load(os.path.join(self.run_dir, "gradient_scales.npy"))
                        self.assertEqual((scales < 1).any(), extra == "clip")
                        self.assertEqual(
                            len(set(np.load(os.path.join(self.run_dir, "learning_rates.npy")))),
                            4 if rates else 1,
                        )

    def test_activations(self):
        activations = [
            nn.Identity,
            nn.ReLU,
            nn.LeakyReLU,
            lambda: nn.LeakyReLU(0.3),
            nn.Tanh,
            nn.Sigmoid,
            nn.Softplus,
            lambda: nn.Softplus(beta=2),
            nn.GELU,
            nn.SiLU,
            nn.Hardtanh,
            Abs,
            Erf,
            lambda: nn.Dropout(0.0),
            lambda: nn.ReLU(inplace=True),
            lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.5).eval()),
        ]
        for dtype in (F64, F32):
            for number, activation in enumerate(activations):
                with self.subTest(dtype=dtype, activation=str(activation())):
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                    model = network(activation, dtype)
                    self.train(
                        model, torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5 * (number % 2))
                    )
                    self.certify(model)

    def test_losses(self):
        for dtype in (F64, F32):
            for loss, objective in OBJECTIVES.items():
                for given in {loss, objective if isinstance(objective, nn.Module) else loss}:
                    with self.subTest(dtype=dtype, loss=given):
                        shutil.rmtree(self.run_dir, ignore_errors=True)
                        model = network(nn.Tanh, dtype)
                        self.train(
                            model,
                            OPTIMIZERS["nesterov"](model.parameters()),
                            loss=given,
                            objective=objective,
                            recorded_data=data(loss, dtype),
                        )
                        self.certify(model)

    def test_gradients_that_cancel(self):
        """Hinge gives an output's bias gradients that cancel exactly; Adam multiplies them by rate / epsilon. The
        contributions are huge and cancel, and the closure is at the rounding of their sum, not of the output.
        """
        model = network(nn.Tanh)
        self.train(
            model, torch.optim.AdamW(model.parameters(), lr=0.02), loss="hinge", recorded_data=data("hinge")
        )
        result = self.decompose()
        sums = np.abs(result["by_example"]).sum(2)
        self.assertGreater(sums.max(), 1e5)
        self.assertLess((np.abs(result["closure"]) / np.maximum(1, sums)).max(), 1e-13)

    def test_one_output(self):
        objectives = dict(OBJECTIVES, hinge=lambda f, y: (1 - y * f).clamp(min=0).mean())
        for loss in ("logistic", "hinge", "squared", "huber"):
            with self.subTest(loss=loss):
                shutil.rmtree(self.run_dir, ignore_errors=True)
                model = network(nn.SiLU, F64, outputs=1)
                self.train(
                    model,
                    torch.optim.SGD(model.parameters(), lr=0.1),
                    loss=loss,
                    objective=objectives[loss],
                    recorded_data=data(loss, F64, 1),
                )
                self.certify(model)

    def test_loader_with_weights_images_and_own_forward(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

            def forward(self, x):
                return self.second(torch.tanh(self.first(x.flatten(1))))

        x, y = data()
        x = x.reshape(N, 1, IN)
        importance = torch.linspace(0.5, 2, N, dtype=F64)
        loader = torch.utils.data.DataLoader(
            Indexed(torch.utils.data.TensorDataset(x, y)), batch_size=BATCH - 1, shuffle=True
        )
        torch.manual_seed(5)
        model = Net().double()
        optimizer = torch.optim.Adam([{"params": [p]} for p in reversed(list(model.parameters()))], lr=0.01)
        with self.assertRaisesRegex(RecordError, "Net.*own forward"):
            Recorder(
                self.run_dir, model, loss="softmax_cross_entropy", optimizer=optimizer, inputs=x, targets=y
            )
        with Recorder(
            self.run_dir,
            model,
            loss="softmax_cross_entropy",
            optimizer=optimizer,
            inputs=x,
            targets=y,
            check=99,
            network=f"input {IN}; dense {HIDDEN}; tanh; dense {OUT}",
        ) as record:
            for _ in range(3):
                for indices, inputs, labels in loader:
                    optimizer.zero_grad()
                    weights = importance[indices] / 10
                    (
                        nn.functional.cross_entropy(model(inputs), labels, reduction="none") * weights
                    ).sum().backward()
                    optimizer.step()
                    record(indices, weights=weights)
        self.assertEqual(record.steps, 15)
        self.certify(nn.Sequential(model.first, nn.Tanh(), model.second))

    def test_wrong_optimizer_shows(self):
        model = network(nn.Tanh)
        self.train(model, torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1))
        self.certify(model)
        manifest = os.path.join(self.run_dir, "run.txt")
        with open(manifest) as file:
            text = file.read()
        for wrong in (
            "optimizer adamw beta1=0.8 weight_decay=0.1",
            "optimizer adamw weight_decay=0",
            "optimizer sgd",
        ):
            with self.subTest(wrong):
                with open(manifest, "w") as file:
                    file.write(text[: text.index("optimizer")] + wrong + "\n")
                result = self.decompose()
                self.assertGreater(np.abs(result["unattributed"]).max(), 1e-4)
                self.assertLess(np.abs(result["closure"]).max(), 1e-12)
                self.assertRegex(self.said, "(?i)optimi[sz]er")
                self.assertRegex(self.said, "(?i)unattributed[^\n]*\n?[^\n]*(large|wrong|not|declar)")

    def test_no_steps_and_an_exception(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with self.assertRaisesRegex(ZeroDivisionError, "mine"):
            x, y = data()
            with Recorder(
                self.run_dir, model, loss="softmax_cross_entropy", optimizer=optimizer, inputs=x, targets=y
            ) as record:
                for _ in range(3):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    record(range(N))
                raise ZeroDivisionError("mine")
        self.assertEqual(np.load(os.path.join(self.run_dir, "weights.npy")).shape[0], 4)
        self.certify(model)
        self.assertEqual(optimizer.step.__func__, type(optimizer).step)  # as it was


class Crash(Case):
    def test_kill(self):
        program = f"""
import sys; sys.path[:0] = [{HERE!r}]
from test_pytorch import *
x, y = data()
model = network()
optimizer = OPTIMIZERS["adamw"](model.parameters())
options = dict(loss=nn.CrossEntropyLoss(), optimizer=optimizer, inputs=x, targets=y)
with Recorder({self.run_dir!r}, model, **options) as record:
    while True:
        i = torch.randperm(N)[:BATCH]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
        record(i)
        if record.steps == 20: print("go", flush=True)
"""
        for trial in range(3):
            shutil.rmtree(self.run_dir, ignore_errors=True)
            child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
            self.assertEqual(child.stdout.readline(), "go\n")
            time.sleep(0.01 * trial)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
            if trial == 2:  # and the middle of a write
                with open(os.path.join(self.run_dir, "weights.npy"), "r+b") as file:
                    file.truncate(os.path.getsize(file.name) - 5)
            np.load(os.path.join(self.run_dir, "learning_rates.npy"))  # the header may lag, never lead
            result = self.decompose()
            self.assertGreaterEqual(result["by_step"].shape[2], 19)
            self.assertLess(np.abs(result["closure"]).max(), 1e-12)
            self.assertLess(np.abs(result["unattributed"]).max(), 1e-12)

    def test_full_disk(self):
        """A limit on the size of files stands in for it: a row is written in part, then not at all."""
        model = network()
        x, y = data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        weights, limits = os.path.join(self.run_dir, "weights.npy"), resource.getrlimit(resource.RLIMIT_FSIZE)
        with Recorder(
            self.run_dir, model, loss="softmax_cross_entropy", optimizer=optimizer, inputs=x, targets=y
        ) as record:

            def step():
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                record(range(N))

            step()
            expected = os.path.getsize(weights)
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (expected + 100, limits[1]))
                with self.assertRaises(OSError):
                    step()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            self.assertEqual(os.path.getsize(weights), expected)
            with self.assertRaisesRegex(RecordError, "full disk"):
                step()
        self.assertEqual(np.load(weights).shape[0], 2)
        self.assertEqual(self.decompose()["by_step"].shape[2], 1)

    def test_more_parts_than_one_write_takes(self):
        path, parts = os.path.join(self.folder, "a.npy"), np.random.default_rng(0).random((2, 3000))
        file = _Growing(path, "<f8", (3000,))
        for row in parts:
            file.append(*row)
        file.close()
        np.testing.assert_array_equal(np.load(path), parts)


class Refusals(Case):
    def refuse(
        self,
        words,
        model=None,
        optimizer=None,
        loss="softmax_cross_entropy",
        inputs=None,
        targets=None,
        **options,
    ):
        model = model or network()
        x, y = data()
        with self.assertRaisesRegex(RecordError, words):
            optimizer = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.1)
            with Recorder(
                self.run_dir,
                model,
                loss=loss,
                optimizer=optimizer,
                inputs=x if inputs is None else inputs,
                targets=y if targets is None else targets,
                **options,
            ):
                self.fail("accepted")
        self.assertFalse(os.path.exists(self.run_dir))

    def test_modules(self):
        around = lambda layer: nn.Sequential(
            nn.Linear(IN, 6), nn.Sequential(layer), nn.Linear(6, OUT)
        ).double()
        for words, layer in (
            (r"layer 1 \('1.0', BatchNorm1d\).*couples", nn.BatchNorm1d(6)),
            ("Dropout.*random", nn.Dropout(0.1)),
            ("GELU.*erf", nn.GELU(approximate="tanh")),
            ("PReLU.*trained", nn.PReLU()),
            ("LayerNorm.*not supported", nn.LayerNorm(6)),
            ("Hardtanh.*-1 to 1", nn.Hardtanh(-2, 2)),
            ("ReLU6", nn.ReLU6()),
            ("Conv1d", nn.Conv1d(1, 1, 1)),
            ("LeakyReLU.*positive", nn.LeakyReLU(-0.1)),
            ("Softplus.*threshold", nn.Softplus(threshold=1)),
            ("Flatten.*whole", nn.Flatten(0)),
            ("takes 5 inputs.*give 6", nn.Linear(5, 6)),
            ("LogSoftmax.*CrossEntropyLoss", nn.LogSoftmax(1)),
            ("weight_norm", nn.utils.weight_norm(nn.Linear(6, 6))),
        ):
            with self.subTest(str(layer)):
                self.refuse(words, around(layer))
        same = nn.Linear(6, 6)
        self.refuse(
            "same module twice", nn.Sequential(nn.Linear(IN, 6), same, same, nn.Linear(6, OUT)).double()
        )
        tied = nn.Sequential(nn.Linear(IN, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, OUT)).double()
        tied[2].weight = tied[1].weight
        self.refuse("two layers", tied)
        self.refuse(
            "no Linear",
            nn.Sequential(nn.Tanh()),
            optimizer=lambda m: torch.optim.SGD([torch.zeros(1)], lr=1),
            inputs=None,
        )
        self.refuse("float16|torch.half", network().half())
        hooked = network()
        hooked[0].register_forward_hook(lambda module, given, out: 2 * out)
        self.refuse("outputs differ", hooked)
        self.refuse("outputs differ", network="input 5; dense 7; relu; dense 6 nobias; tanh; dense 3")

    def test_parameters_in_another_order(self):
        class Swapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.b, self.a = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x):
                return self.b(torch.tanh(self.a(x)))

        self.refuse(
            "order of",
            Swapped().double(),
            network="input 6; dense 6; tanh; dense 6",
            inputs=torch.randn(N, 6).double(),
            targets=torch.randint(6, (N,)),
        )
        zero = Swapped().double()
        with torch.no_grad():
            [p.zero_() for p in zero.parameters()]
        self.refuse(
            "order of",
            zero,
            network="input 6; dense 6; tanh; dense 6",
            inputs=torch.randn(N, 6).double(),
            targets=torch.randint(6, (N,)),
        )
        self.assertEqual(sum(float(p.detach().abs().sum()) for p in zero.parameters()), 0)

    def test_optimizers(self):
        o = torch.optim
        for words, make in (
            ("amsgrad", lambda m: o.Adam(m.parameters(), amsgrad=True)),
            ("maximize", lambda m: o.SGD(m.parameters(), lr=1, maximize=True)),
            ("RMSprop is not supported", lambda m: o.RMSprop(m.parameters())),
            ("'0.weight' is not in", lambda m: o.SGD(m[2].parameters(), lr=1)),
            (
                "not the model's",
                lambda m: o.SGD([*m.parameters(), nn.Parameter(torch.zeros(1).double())], lr=1),
            ),
            (
                "groups differ.*weight_decay",
                lambda m: o.AdamW(
                    [
                        {"params": m[0].parameters(), "weight_decay": 0.5},
                        {"params": [*m[2].parameters(), *m[3].parameters()]},
                    ]
                ),
            ),
        ):
            with self.subTest(words):
                self.refuse(words, optimizer=make)
        frozen = network()
        frozen[0].bias.requires_grad_(False)
        self.refuse("'0.bias' is frozen", frozen)

        def used(model):
            optimizer = o.Adam(model.parameters())
            model(data()[0]).sum().backward()
            optimizer.step()
            return optimizer

        self.refuse("made steps already", optimizer=used)

    def test_losses_and_data(self):
        x, y = data()
        for words, loss in (
            ("label_smoothing", nn.CrossEntropyLoss(label_smoothing=0.1)),
            ("weight", nn.CrossEntropyLoss(torch.ones(3))),
            ("reduction='sum'.*weights", nn.MSELoss(reduction="sum")),
            ("beta", nn.SmoothL1Loss(beta=0.5)),
            ("pos_weight", nn.BCEWithLogitsLoss(pos_weight=torch.ones(3))),
            ("margin", nn.MultiMarginLoss(margin=2.0)),
            ("ignore_index", nn.CrossEntropyLoss(ignore_index=0)),
            ("KLDivLoss is not", nn.KLDivLoss()),
            ("'mse' is none", "mse"),
        ):
            with self.subTest(words):
                self.refuse(words, loss=loss)
        self.refuse("inputs are int64", inputs=torch.ones(N, IN, dtype=torch.int64))
        self.refuse("24 inputs and 23 targets", targets=y[1:])
        self.refuse("from 0 to 2", targets=y + 1)
        self.refuse("NaN", inputs=x / 0)
        self.refuse("do not fit", inputs=x[:, :4])
        self.refuse("3 outputs", loss="mean_squared", targets=x)

    def test_steps(self):
        x, y = data()

        def attempt(words, act, **options):
            with self.subTest(words):
                shutil.rmtree(self.run_dir, ignore_errors=True)
                model = network()
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                criterion = options.pop("criterion", nn.functional.cross_entropy)
                with self.assertRaisesRegex(RecordError, words):
                    with Recorder(
                        self.run_dir,
                        model,
                        loss="softmax_cross_entropy",
                        optimizer=optimizer,
                        inputs=x,
                        targets=y,
                        **options,
                    ) as record:
                        for step in range(3):
                            optimizer.zero_grad()
                            criterion(model(x[:BATCH]), y[:BATCH]).backward()
                            act(record, optimizer, step)
                        self.fail("accepted")
                self.assertTrue(os.path.exists(os.path.join(self.run_dir, "run.txt")))

        def stepped(call):
            return lambda record, optimizer, step: (optimizer.step(), call(record, optimizer, step))

        rows = range(BATCH)
        attempt("not that of loss.*rows of this batch", stepped(lambda r, o, s: r(range(1, BATCH + 1))))
        attempt(
            "not that of loss",
            stepped(lambda r, o, s: r(rows)),
            criterion=lambda f, t: 2 * nn.functional.cross_entropy(f, t),
        )
        attempt("0 optimizer steps", lambda r, o, s: r(rows))
        attempt("2 optimizer steps", stepped(lambda r, o, s: (o.step(), r(rows))))
        attempt("there are 24 rows", stepped(lambda r, o, s: r([0, 24])))
        attempt("one dimension", stepped(lambda r, o, s: r([])))
        attempt("one dimension", stepped(lambda r, o, s: r([0.5])))
        attempt("weights have shape", stepped(lambda r, o, s: r(rows, weights=[1.0])))
        attempt(
            "step 1: the optimizer is now.*momentum=0.8",
            stepped(lambda r, o, s: (r(rows), o.param_groups[0].update(momentum=0.8))),
        )
        attempt(
            "step 1: a weight or the learning rate is not finite",
            stepped(lambda r, o, s: (r(rows), o.param_groups[0].update(lr=float("inf")))),
        )

        def clipped(record, optimizer, step):
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1e-3)
            optimizer.step()
            record(rows)

        attempt("clipped without record.clip", clipped)

    def test_existing_run(self):
        model = network()
        self.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
        with self.assertRaisesRegex(RecordError, "exists already"):
            self.train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        self.assertEqual(np.load(os.path.join(self.run_dir, "weights.npy")).shape[0], 3)


class BruteForce(Case):
    """by_example by its definition, in float64: per-example gradients by autograd, Gauss-Legendre along each step,
    and, forward in time, one momentum buffer per example (the program goes backward and has none)."""

    @staticmethod
    def outputs(w, x):
        """IN -> HIDDEN tanh -> OUT, written out, so that not even the model is shared."""
        a, b = HIDDEN * IN, HIDDEN * IN + HIDDEN
        c = b + OUT * HIDDEN
        return torch.tanh(x @ w[:a].reshape(HIDDEN, IN).T + w[a:b]) @ w[b:c].reshape(OUT, HIDDEN).T + w[c:]

    def tangents(self, start, end):
        """Phi: (M, OUT, P), the integral of the outputs' gradients from start to end."""
        nodes, node_weights = np.polynomial.legendre.leggauss(20)
        total = 0
        for t, weight in zip((nodes + 1) / 2, node_weights / 2):
            total = total + weight * torch.autograd.functional.jacobian(
                lambda w: self.outputs(w, self.tests), start + t * (end - start)
            )
        return total

    def test_by_example(self):
        for name, clip in (
            ("sgd_decay", None),
            ("dampening", 0.3),
            ("nesterov", None),
            ("adam_decay", 0.3),
            ("adamw", None),
        ):
            with self.subTest(name):
                shutil.rmtree(self.run_dir, ignore_errors=True)
                torch.manual_seed(2)
                model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)).double()
                optimizer = OPTIMIZERS[name](model.parameters())
                x, y = self.train(model, optimizer, clip=clip, steps=8)
                result = self.certify(model)
                group = optimizer.param_groups[0]
                load = lambda file: np.load(os.path.join(self.run_dir, file + ".npy"))
                w, rates, offsets, items = map(
                    load, ("weights", "learning_rates", "batch_offsets", "batch_items")
                )
                scales, w = load("gradient_scales"), torch.tensor(w)
                P = w.shape[1]
                buffer, second = torch.zeros(N + 1, P, dtype=F64), torch.zeros(
                    P, dtype=F64
                )  # row N: the decay
                expected = torch.zeros(M, OUT, N + 1, dtype=F64)
                for s, rate in enumerate(rates):
                    g = torch.zeros(N + 1, P, dtype=F64)
                    for i in items[offsets[s] : offsets[s + 1]]:
                        v = w[s].clone().requires_grad_()
                        loss = (
                            nn.functional.cross_entropy(self.outputs(v, x[i : i + 1]), y[i : i + 1])
                            / BATCH
                            * scales[s]
                        )
                        g[i] += torch.autograd.grad(loss, v)[0]
                    decay = group["weight_decay"]
                    if name != "adamw":
                        g[N] = decay * w[s]
                    if "adam" in name:
                        b1, b2 = group["betas"]
                        buffer = b1 * buffer + (1 - b1) * g
                        second = b2 * second + (1 - b2) * g.sum(0) ** 2
                        update = (
                            rate
                            * buffer
                            / (1 - b1 ** (s + 1))
                            / ((second / (1 - b2 ** (s + 1))).sqrt() + group["eps"])
                        )
                        if name == "adamw":
                            update = update.clone()
                            update[N] += rate * decay * w[s]
                    else:
                        mu = group["momentum"]
                        buffer = g if s == 0 else mu * buffer + (1 - group["dampening"]) * g
                        update = rate * (g + mu * buffer if group["nesterov"] else buffer if mu else g)
                    expected -= torch.einsum("mcp,ip->mci", self.tangents(w[s], w[s + 1]), update)
                expected = expected.numpy()
                size = np.abs(expected[:, :, :N]).max()
                error = (
                    max(
                        np.abs(result["by_example"] - expected[:, :, :N]).max(),
                        np.abs(result["decay"] - expected[:, :, N]).max(),
                    )
                    / size
                )
                Case.worst["brute force", "float64"] = max(
                    Case.worst.get(("brute force", "float64"), 0), error
                )
                self.assertLess(error, 1e-9)


def tearDownModule():
    print(f"torch {torch.__version__}, NumPy {np.__version__}; the largest errors:")
    for (name, kind), error in sorted(Case.worst.items()):
        print(f"  {name:20s} {kind}  {error:.2g}")


if __name__ == "__main__":
    if not PROGRAM:
        sys.exit("set PATHKERNEL_DECOMPOSE to the program pathkernel-decompose, or put it on the PATH")
    unittest.main()
