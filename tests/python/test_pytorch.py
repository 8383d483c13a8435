"""examples/pytorch/pathkernel_record.py and the program: what PyTorch trains is decomposed to rounding.

    PATHKERNEL_DECOMPOSE=build/pathkernel-decompose python3 tests/python/test_pytorch.py

Needs torch >= 1.13 and NumPy. The program is $PATHKERNEL_DECOMPOSE, or pathkernel-decompose on the PATH.
"""

import copy
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import unittest
import warnings

import numpy as np
import torch
from torch import nn

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "examples", "pytorch"))
from pathkernel_record import (  # noqa: E402
    Abs,
    Erf,
    Indexed,
    MeanTokens,
    Position,
    RecordError,
    Recorder,
    Residual,
    SelfAttention,
    Token,
    _Growing,
    describe,
)

PROGRAM = os.environ.get("PATHKERNEL_DECOMPOSE") or shutil.which("pathkernel-decompose")
N, IN, HIDDEN, OUT, M, BATCH, STEPS = 24, 5, 7, 3, 5, 6, 15
F32, F64 = torch.float32, torch.float64
NEW_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)

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
# Before 2.0 NAdam was right with foreach only, and that without decay.
OLD_NADAM = int(torch.__version__.split(".")[0]) < 2
NADAM = {"foreach": True} if OLD_NADAM else {}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "sgd_decay": lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adam_decay": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.9), amsgrad=True, weight_decay=0.05),
    "adamw_maximize": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0 if OLD_NADAM else 0.05, **NADAM),
    "nadam_decay": lambda p: torch.optim.NAdam(p, lr=0.02, momentum_decay=0.1, eps=1e-6, **NADAM),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adagrad_decay": lambda p: torch.optim.Adagrad(
        p, lr=0.1, lr_decay=0.1, weight_decay=0.05, initial_accumulator_value=0.1, eps=1e-6
    ),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, eps=1e-6, weight_decay=0.05),
    "rmsprop_momentum": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.8, eps=1e-3, momentum=0.8),
    "rmsprop_centered": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.8, eps=1e-2, momentum=0.5, centered=True),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, weight_decay=0.1, maximize=True),
}
WEIGHT = torch.tensor([0.5, 2.0, 1.1], dtype=F64)
CRITERIA = [  # the line, torch's module, what ends the network
    ("softmax_cross_entropy label_smoothing=0.1", nn.CrossEntropyLoss(label_smoothing=0.1), None),
    ("softmax_cross_entropy weight=0.5,2.0,1.1", nn.CrossEntropyLoss(WEIGHT), None),
    (
        "softmax_cross_entropy label_smoothing=0.2 ignore_index=-100 weight=0.5,2.0,1.1",
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2),
        None,
    ),
    ("softmax_cross_entropy ignore_index=1", nn.CrossEntropyLoss(ignore_index=1), None),
    ("softmax_cross_entropy weight=0.5,2.0,1.1", nn.CrossEntropyLoss(WEIGHT, reduction="sum"), None),
    ("nll ignore_index=2 weight=0.5,2.0,1.1", nn.NLLLoss(WEIGHT, ignore_index=2), nn.LogSoftmax),
    ("logistic pos_weight=0.5,2.0,1.1", nn.BCEWithLogitsLoss(pos_weight=WEIGHT), None),
    ("logistic pos_weight=3.0", nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), None),
    ("logistic", nn.BCEWithLogitsLoss(reduction="sum"), None),
    ("huber", nn.HuberLoss(), None),
    ("huber delta=0.3", nn.HuberLoss(delta=0.3), None),
    ("huber beta=0.3", nn.SmoothL1Loss(beta=0.3), None),
    ("huber delta=0.3", nn.HuberLoss(delta=0.3, reduction="sum"), None),
    ("l1", nn.SmoothL1Loss(beta=0), None),
    ("l1", nn.L1Loss(), None),
    ("mean_squared", nn.MSELoss(reduction="sum"), None),
    ("kl_div", nn.KLDivLoss(reduction="batchmean"), nn.LogSoftmax),
    ("kl_div", nn.KLDivLoss(), nn.LogSoftmax),
    ("kl_div log_target=1", nn.KLDivLoss(reduction="sum", log_target=True), nn.LogSoftmax),
    ("binary_cross_entropy", nn.BCELoss(), nn.Sigmoid),
    ("binary_cross_entropy", nn.BCELoss(reduction="sum"), nn.Sigmoid),
]
warnings.filterwarnings("ignore", message=".*batchmean.*")


class Case(unittest.TestCase):
    worst = {}
    set_tests = None  # other inputs than those of decompose()

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
        self.tests = self.set_tests
        if self.tests is None:
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
        after = self.decompose(expected=1)
        size = np.abs(before["by_example"]).max()
        self.assertLess(np.abs(after["by_example"] - before["by_example"] / 2).max() / size, 1e-6)
        self.assertGreater(np.abs(after["unattributed"]).max(), 1e-2)
        self.assertLess(np.abs(after["closure"]).max(), 1e-12)

    def test_optimizers(self):
        for dtype in (F64, F32):
            for name, make in OPTIMIZERS.items():
                for extra in ("", "clip", "scheduler", "second_moments"):
                    divides = "ada" in name or name == "rmsprop"
                    if extra == "second_moments" and not divides:
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

    def test_criteria(self):
        """Modules of losses with their options and reductions; the line that stands for them does as well."""
        for dtype in (F64, F32):
            for number, (line, criterion, last) in enumerate(CRITERIA):
                with self.subTest(line=line, criterion=str(criterion), dtype=dtype):
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                    criterion = copy.deepcopy(criterion).to(dtype)
                    model = network(dtype=dtype)
                    if last:
                        model = nn.Sequential(model, last(**({"dim": -1} if last is nn.LogSoftmax else {})))
                    x, y = data("nll" if "soft" in line or "nll" in line else "squared", dtype)
                    if "ignore_index=-100" in line:
                        y[::5] = -100
                    if line.startswith(("logistic", "binary", "kl_div")):
                        y = y.softmax(1)
                    y = y.log() if "log_target" in line else y
                    self.train(
                        model,
                        torch.optim.SGD(model.parameters(), lr=0.01 if criterion.reduction == "sum" else 0.1, momentum=0.8),
                        loss=criterion,
                        objective=criterion,
                        recorded_data=(x, y),
                    )
                    with open(os.path.join(self.run_dir, "run.txt")) as file:
                        said = next(entry.split() for entry in file if entry.startswith("loss"))[1:]
                    if dtype == F64:
                        self.assertEqual(" ".join(said), line)
                    self.certify(model)

    def test_ignored_batch(self):
        model, (x, y) = network(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        y[:2] = -100
        with self.assertRaisesRegex(RecordError, "each label of the batch is ignored"):
            with Recorder(self.run_dir, model, loss=nn.CrossEntropyLoss(), optimizer=optimizer, inputs=x, targets=y) as record:
                (0 * model(x[:2])).sum().backward()
                optimizer.step()
                record(torch.arange(2))

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
            lambda: nn.GELU(approximate="tanh"),
            nn.ELU,
            lambda: nn.ELU(0.5),
            nn.SELU,
            nn.Mish,
            nn.ReLU6,
            nn.Hardswish,
            nn.Softsign,
            nn.LogSigmoid,
            nn.PReLU,
            lambda: nn.Softmin(-1),
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

    def test_hard_sigmoid(self):
        """PyTorch's slope in float64 is that of float32, which is refused with the reason."""
        model = network(nn.Hardsigmoid, F32)
        self.train(model, torch.optim.SGD(model.parameters(), lr=0.2))
        self.certify(model)
        at = torch.zeros(1, dtype=F64, requires_grad=True)
        nn.functional.hardsigmoid(at).backward()
        shutil.rmtree(self.run_dir, ignore_errors=True)
        model = network(nn.Hardsigmoid, F64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        if abs(at.grad.item() * 6 - 1) > 1e-12:
            with self.assertRaisesRegex(RecordError, "Hardsigmoid.*single precision"):
                self.train(model, optimizer)
        else:
            self.train(model, optimizer)
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
        derived = Recorder(
            self.run_dir, model, loss="softmax_cross_entropy", optimizer=optimizer, inputs=x, targets=y
        )
        self.assertEqual(derived.network, f"input {IN}; dense {HIDDEN}; tanh; dense {OUT}")
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
                result = self.decompose(expected=1)
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


class Swapped(nn.Module):
    """Its parameters are registered in another order than they are used."""

    def __init__(self, size=6):
        super().__init__()
        self.b, self.a = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class BasicBlock(nn.Module):
    """ResNet's, as it is usually written."""

    def __init__(self, channels, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or channels != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1)
        self.layer1, self.layer2 = nn.Sequential(BasicBlock(3, 3)), BasicBlock(3, 4, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(4, OUT)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv1(x)), 2)
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class LeNet(nn.Module):
    """Functions and views, of images that come as rows of numbers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 2)
        self.fc = nn.Linear(4, OUT)

    def forward(self, x):
        F = nn.functional
        x = F.avg_pool2d(torch.sigmoid(self.conv1(x.view(-1, 1, 6, 6))), 2)
        x = F.gelu(self.conv2(x)) / 2
        assert x.shape[1:] == (4, 1, 1)
        return self.fc(F.dropout(x.view(x.size(0), -1), 0.5, self.training and False))


class Transformer(nn.Module):
    """Pre-norm blocks by hand, learned positions by an embedding of arange, a causal mask made on the way."""

    def __init__(self, vocabulary=7, tokens=4, width=6, positions="learned"):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        if positions == "learned":
            self.positions = nn.Embedding(tokens, width)
        else:
            self.register_buffer("positions", torch.randn(tokens, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down, self.out = nn.Linear(width, 8), nn.Linear(8, width), nn.Linear(width, OUT)

    def forward(self, x):
        T = x.shape[1]
        p = self.positions
        x = self.embed(x) * 6**0.5 + (p if torch.is_tensor(p) else p(torch.arange(T, device=x.device)))
        mask = torch.triu(torch.full((T, T), -torch.inf, dtype=x.dtype), 1)
        y = self.norms[0](x)
        y, _ = self.attention(y, y, y, attn_mask=mask)
        x = x + y
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.out(x[:, -1])


class Modules(Case):
    """Each kind of module: recorded, derived, decomposed."""

    def images(self, shape, dtype=F64, n=N):
        g = torch.Generator().manual_seed(7)
        return torch.randn(n, *shape, generator=g, dtype=F64).to(dtype)

    def tokens(self, count, vocabulary=7, n=N):
        return torch.randint(vocabulary, (n, count), generator=torch.Generator().manual_seed(7))

    def check(
        self, model, x, line=None, optimizer="adamw", dtype=F64, ordered=True, loss="softmax_cross_entropy"
    ):
        """Trains and certifies; the rows of weights.npy are parameters_to_vector's where `ordered`."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        torch.manual_seed(4)
        with torch.no_grad():  # factors of norms that differ, so that their order matters
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        model = model.to(dtype)
        y = torch.randint(OUT, (len(x),), generator=torch.Generator().manual_seed(8))
        x = x if x.dtype == torch.int64 else x.to(dtype)
        self.train(model, OPTIMIZERS[optimizer](model.parameters()), steps=4, loss=loss, recorded_data=(x, y))
        with open(os.path.join(self.run_dir, "run.txt")) as file:
            said = file.read().split("\n")[1].split(None, 1)[1]
        if line is not None:
            self.assertEqual(said, line)
        last = np.load(os.path.join(self.run_dir, "weights.npy"))[-1]
        now = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        self.assertEqual(np.array_equal(last, now), ordered)
        self.set_tests = (
            self.images(x.shape[1:], dtype, M) if x.is_floating_point() else self.tokens(x.shape[1], n=M)
        )
        # float32 runs are evaluated in float64: a normalisation's rounding is larger than a layer's
        return self.certify(model)

    def test_convolutions(self):
        conv = lambda **options: nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(OUT)
        )
        x = self.images((2, 6, 5))
        for said, options in (
            ("conv 4 3x2", {}),
            ("conv 4 3x2 stride=2x1 pad=1x0 nobias", dict(stride=(2, 1), padding=(1, 0), bias=False)),
            ("conv 4 3x2 dilation=2x2 groups=2", dict(dilation=2, groups=2)),
            ("conv 4 3x2", dict(padding="valid")),
            ("conv 4 3x2 pad=1x1 dilation=1x2", dict(padding="same", dilation=(1, 2))),
        ):
            for optimizer, dtype in (("sgd", F64), ("adamw", F64), ("adamw", F32)):
                with self.subTest(said, optimizer=optimizer, dtype=dtype):
                    model = conv(**options)
                    model(x[:1].float())
                    line = f"input 2x6x5; {said}; tanh; flatten; dense {OUT}"
                    self.check(model, x, line, optimizer, dtype)

    def test_pools(self):
        x = self.images((2, 6, 6))
        for said, pool in (
            ("max_pool 2x2", nn.MaxPool2d(2)),
            ("max_pool 3x2 stride=2x1 pad=1x0", nn.MaxPool2d((3, 2), (2, 1), (1, 0))),
            ("avg_pool 3x3 stride=2x2 pad=1x1", nn.AvgPool2d(3, 2, 1)),
            ("global_avg_pool", nn.AdaptiveAvgPool2d(1)),
            ("max_pool 3x3 stride=2x2 ceil_mode", nn.MaxPool2d(3, 2, ceil_mode=True)),
            ("avg_pool 4x4 pad=1x1 ceil_mode count_include_pad=0", nn.AvgPool2d(4, 4, 1, True, False)),
            ("adaptive_avg_pool 4x2", nn.AdaptiveAvgPool2d((4, 2))),
            ("adaptive_avg_pool 6x4", nn.AdaptiveAvgPool2d((None, 4))),
            ("adaptive_max_pool 4x4", nn.AdaptiveMaxPool2d(4)),
            ("upsample 2", nn.Upsample(scale_factor=2)),
            ("upsample 2x1", nn.Upsample(size=(12, 6))),
            ("upsample 2 bilinear", nn.Upsample(scale_factor=2, mode="bilinear")),
            ("upsample 2x2 bilinear align_corners", nn.UpsamplingBilinear2d(12)),
        ):
            for optimizer in ("momentum", "adamw"):
                with self.subTest(said, optimizer=optimizer):
                    model = nn.Sequential(
                        nn.Conv2d(2, 3, 3, padding=1), pool, nn.ReLU(), nn.Flatten(), nn.LazyLinear(OUT)
                    )
                    model(x[:1].float())
                    line = f"input 2x6x6; conv 3 3x3 pad=1x1; {said}; relu; flatten; dense {OUT}"
                    self.check(model, x, line, optimizer)

    def test_signals(self):
        for said, layers in (
            ("conv 4 3", [nn.Conv1d(2, 4, 3)]),
            (
                "conv 4 3 stride=2 pad=2 dilation=2 groups=2 nobias",
                [nn.Conv1d(2, 4, 3, 2, 2, 2, 2, bias=False)],
            ),
            ("conv 4 3 pad=1", [nn.Conv1d(2, 4, 3, padding="same")]),
            ("conv_transpose 3 3 stride=2 output_pad=1", [nn.ConvTranspose1d(2, 3, 3, 2, 0, 1)]),
            ("conv 3 2; max_pool 2 ceil_mode", [nn.Conv1d(2, 3, 2), nn.MaxPool1d(2, ceil_mode=True)]),
            ("conv 3 2; avg_pool 2 pad=1", [nn.Conv1d(2, 3, 2), nn.AvgPool1d(2, padding=1)]),
            ("conv 3 2; adaptive_max_pool 4", [nn.Conv1d(2, 3, 2), nn.AdaptiveMaxPool1d(4)]),
            ("conv 3 2; upsample 2 linear", [nn.Conv1d(2, 3, 2), nn.Upsample(scale_factor=2, mode="linear")]),
            ("conv 3 2; prelu 3", [nn.Conv1d(2, 3, 2), nn.PReLU(3)]),
        ):
            for optimizer, dtype in (("momentum", F64), ("adamw", F64), ("adamw", F32)):
                with self.subTest(said, optimizer=optimizer, dtype=dtype):
                    x = self.images((2, 6))
                    model = nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(OUT))
                    for layer in layers:
                        for p in layer.parameters():
                            nn.init.normal_(p.data, std=0.5)
                    model.float()(x[:1].float())
                    self.check(model, x, f"input 2x6; {said}; tanh; flatten; dense {OUT}", optimizer, dtype)

    def test_transposed_convolutions(self):
        x = self.images((2, 3, 2))
        for said, options in (
            ("conv_transpose 4 3x2", {}),
            ("conv_transpose 4 3x2 stride=2x1 pad=1x0 groups=2 nobias", dict(stride=(2, 1), padding=(1, 0), groups=2, bias=False)),
            ("conv_transpose 4 3x2 stride=2x2 output_pad=1x0 dilation=1x2", dict(stride=2, output_padding=(1, 0), dilation=(1, 2))),
        ):
            for optimizer, dtype in (("momentum", F64), ("adamw", F64), ("adamw", F32)):
                with self.subTest(said, optimizer=optimizer, dtype=dtype):
                    model = nn.Sequential(
                        nn.ConvTranspose2d(2, 4, (3, 2), **options), nn.Tanh(), nn.Flatten(), nn.LazyLinear(OUT)
                    )
                    model(x[:1].float())
                    self.check(model, x, f"input 2x3x2; {said}; tanh; flatten; dense {OUT}", optimizer, dtype)

    def test_functions_of_images(self):
        F = nn.functional

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.down, self.up, self.head = nn.Conv2d(2, 4, 2), nn.Conv2d(4, 3, 1), nn.Linear(27, OUT)

            def forward(self, x):
                x = F.elu(F.max_pool2d(self.down(x), 2, ceil_mode=True), 0.5)
                x = F.gelu(self.up(F.interpolate(x, scale_factor=2, mode="nearest")), approximate="tanh")
                return self.head(F.adaptive_avg_pool2d(F.mish(x), 3).flatten(1))

        line = (
            "input 2x6x6; conv 4 2x2; max_pool 2x2 ceil_mode; elu 0.5; upsample 2; conv 3 1x1; gelu tanh; mish; "
            f"adaptive_avg_pool 3x3; flatten; dense {OUT}"
        )
        self.check(Net(), self.images((2, 6, 6)), line)

    def test_norms_of_channels(self):
        x = self.images((2, 4, 3))
        running = nn.InstanceNorm2d(4, track_running_stats=True)
        running(torch.randn(5, 4, 3, 3))
        for said, norm in (
            ("group_norm 2 epsilon=1e-05", nn.GroupNorm(2, 4)),
            ("group_norm 4 epsilon=0.001 noaffine", nn.GroupNorm(4, 4, 1e-3, affine=False)),
            ("instance_norm epsilon=1e-05 noaffine", nn.InstanceNorm2d(4)),
            ("instance_norm epsilon=1e-05", nn.InstanceNorm2d(4, affine=True)),
            ("batch_norm norm0 epsilon=1e-05 noaffine", running.eval()),
        ):
            for optimizer in ("sgd", "adamw"):
                with self.subTest(said, optimizer=optimizer):
                    model = nn.Sequential(nn.Conv2d(2, 4, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(24, OUT))
                    self.check(model, x, f"input 2x4x3; conv 4 2x2; {said}; tanh; flatten; dense {OUT}", optimizer)

    def test_norms(self):
        def around(*layers):
            return nn.Sequential(nn.Linear(5, 4), *layers, nn.Tanh(), nn.Flatten(), nn.Linear(12, OUT))

        norms = [
            ("layer_norm epsilon=1e-05", nn.LayerNorm(4)),
            ("layer_norm epsilon=0.001 dims=2", nn.LayerNorm((3, 4), 1e-3)),
            ("layer_norm epsilon=1e-05 noaffine", nn.LayerNorm(4, elementwise_affine=False)),
            ("softmax", nn.Softmax(-1)),
            ("log_softmax", nn.LogSoftmax(2)),
            ("batch_norm norm0 epsilon=1e-05", nn.BatchNorm1d(3).eval()),
        ]
        if hasattr(nn, "RMSNorm"):
            norms += [
                ("rms_norm epsilon=2.220446049250313e-16", nn.RMSNorm(4)),
                ("rms_norm epsilon=0.01 dims=2 noaffine", nn.RMSNorm((3, 4), 0.01, False)),
                ("layer_norm epsilon=1e-05 noaffine; affine nobias dims=1", nn.LayerNorm(4, bias=False)),
            ]
        for said, norm in norms:
            for optimizer in ("sgd", "adamw"):
                with self.subTest(said, optimizer=optimizer):
                    line = f"input 3x5; dense 4; {said}; tanh; flatten; dense {OUT}"
                    self.check(around(norm), self.images((3, 5)), line, optimizer)
        self.check(around(nn.LayerNorm(4)), self.images((3, 5)), dtype=F32)
        if hasattr(nn, "RMSNorm"):  # its epsilon depends on the type
            line = f"input 3x5; dense 4; rms_norm epsilon={2.0**-23}; tanh; flatten; dense {OUT}"
            self.check(around(nn.RMSNorm(4)), self.images((3, 5)), line, dtype=F32)

    def test_batch_norm(self):
        for affine, said in ((True, ""), (False, " noaffine")):
            norm = nn.BatchNorm2d(3, eps=1e-3, affine=affine)
            norm(torch.randn(9, 3, 4, 4) * 2 + 1)  # statistics of their own
            model = nn.Sequential(
                nn.Conv2d(1, 3, 3),
                norm.eval(),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(3, OUT),
            )
            line = (
                f"input 1x6x6; conv 3 3x3; batch_norm norm0 epsilon=0.001{said}; relu; global_avg_pool; flatten; "
                f"dense {OUT}"
            )
            self.check(model, self.images((1, 6, 6)), line)
            saved = np.load(os.path.join(self.run_dir, "constant_norm0.npy"))
            np.testing.assert_array_equal(saved, torch.stack([norm.running_mean, norm.running_var]))

    def test_tokens(self):
        for dtype in (F64, F32):
            model = nn.Sequential(
                nn.Embedding(7, 6),
                Position(4, 6),
                Residual(nn.Sequential(nn.LayerNorm(6), SelfAttention(6, 2, causal=True))),
                Residual(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))),
                Residual(nn.Linear(6, 5), nn.Linear(6, 5, bias=False)),
                SelfAttention(5, 1, bias=False),
                MeanTokens(),
                nn.Linear(5, OUT),
            )
            line = (
                "input 4; embedding 7 6; position; residual( layer_norm epsilon=1e-05; attention 2 causal ); "
                "residual( layer_norm epsilon=1e-05; dense 8; gelu; dense 6 ); residual( dense 5 | dense 5 nobias ); "
                "attention 1 nobias; mean_tokens; dense 3"
            )
            self.check(model, self.tokens(4), line, dtype=dtype)
        model = nn.Sequential(nn.Embedding(7, 6), nn.Tanh(), Token(-1), nn.Linear(6, OUT))
        self.check(model, self.tokens(4), "input 4; embedding 7 6; tanh; token -1; dense 3", "momentum")

    def test_own_forwards(self):
        body = (
            "residual( conv 3 3x3 pad=1x1 nobias; batch_norm norm0 epsilon=1e-05; relu; conv 3 3x3 pad=1x1 nobias; "
            "batch_norm norm1 epsilon=1e-05 )"
        )
        shortcut = body.replace("conv 3 3x3 pad=1x1", "conv 4 3x3 stride=2x2 pad=1x1", 1)
        shortcut = shortcut.replace("conv 3", "conv 4").replace("norm1", "norm3").replace("norm0", "norm2")
        shortcut = shortcut[:-2] + " | conv 4 1x1 stride=2x2 nobias; batch_norm norm4 epsilon=1e-05 )"
        self.check(
            ResNet().eval(),
            self.images((1, 8, 8)),
            f"input 1x8x8; conv 3 3x3 pad=1x1; relu; max_pool 2x2; {body}; relu; {shortcut}; relu; global_avg_pool; "
            f"flatten; dense {OUT}",
        )
        self.check(
            LeNet(),
            self.images((36,)),
            f"input 1x6x6; conv 3 3x3; sigmoid; avg_pool 2x2; conv 4 2x2; gelu; scale 0.5; flatten; dense {OUT}",
            "momentum",
        )
        block = (
            "residual( layer_norm epsilon=1e-05; attention 2 causal ); "
            f"residual( layer_norm epsilon=1e-05; dense 8; gelu; dense 6 ); token -1; dense {OUT}"
        )
        start = f"input 4; embedding 7 6; scale {6 ** 0.5!r}; "
        self.check(Transformer(), self.tokens(4), start + "position; " + block, ordered=False)
        self.check(
            Transformer(positions="fixed"),
            self.tokens(4),
            start + "residual( constant constant0 ); " + block,
            ordered=False,
        )

    def test_positions_of_the_same_value(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.late, self.early = nn.Embedding(3, 4), nn.Parameter(torch.zeros(3, 4))
                self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, OUT)
                self.register_buffer("fixed", torch.zeros(3, 4))
                nn.init.zeros_(self.late.weight)

            def forward(self, x):
                x = torch.tanh(self.inner(x + self.early)) + self.late(torch.arange(3))
                return self.out((x + self.fixed).mean(1))

        model, x = Two().double(), self.images((3, 4))
        line = "input 3x4; position; dense 4; tanh; position; residual( constant constant0 ); mean_tokens; dense 3"
        self.train(model, OPTIMIZERS["adamw"](model.parameters()), steps=6, recorded_data=(x, data()[1]))
        with open(os.path.join(self.run_dir, "run.txt")) as file:
            self.assertIn(line, file.read())
        self.set_tests = self.images((3, 4), F64, M)
        self.certify(model)
        first = np.load(os.path.join(self.run_dir, "weights.npy"))[-1][:12].reshape(3, 4)
        np.testing.assert_array_equal(first, model.early.detach())

    def test_encoder_layers(self):
        for first in (False, True):
            layer = nn.TransformerEncoderLayer(
                6, 2, 8, dropout=0.0, activation="gelu", batch_first=True, norm_first=first
            )
            model = nn.Sequential(
                nn.Embedding(7, 6),
                nn.TransformerEncoder(layer, 2, **({} if first else {"norm": nn.LayerNorm(6)})),
                Token(0),
                nn.Linear(6, OUT),
            )
            self.check(model, self.tokens(3), ordered=False)

    def test_order_of_use(self):
        """Registered otherwise than used: rows are in the network's order, that of record.parameters."""
        model = nn.Sequential(nn.Linear(IN, 6), Swapped(), nn.Linear(6, OUT))
        self.check(
            model, self.images((IN,)), "input 5; dense 6; dense 6; tanh; dense 6; dense 3", ordered=False
        )
        last = torch.tensor(np.load(os.path.join(self.run_dir, "weights.npy"))[-1])
        used = [
            *model[0].parameters(),
            *model[1].a.parameters(),
            *model[1].b.parameters(),
            *model[2].parameters(),
        ]
        self.assertTrue(torch.equal(last, nn.utils.parameters_to_vector(used).detach()))

    def test_own_line(self):
        class Gate(nn.Module):
            """y = x + W2 tanh(W1 x), by what tracing cannot follow."""

            def __init__(self):
                super().__init__()
                self.last, self.first = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, x):
                flat = x.reshape(-1)  # not rows any more
                y = torch.stack([self.last(torch.tanh(self.first(row))) for row in flat.split(6)])
                return flat.reshape(-1, 6) + y

            def pathkernel_line(self):
                return f"residual( {describe(self.first, nn.Sequential(nn.Tanh(), self.last))} )"

            def pathkernel_parameters(self):
                return [*self.first.parameters(), *self.last.parameters()]

        model = nn.Sequential(nn.Linear(IN, 6), Gate(), nn.Linear(6, OUT))
        line = "input 5; dense 6; residual( dense 6; tanh; dense 6 ); dense 3"
        self.check(model, self.images((IN,)), line, ordered=False)

    def test_given_line(self):
        """What no module gives: an array of the user's."""

        class Graph(nn.Module):
            def __init__(self, matrix):
                super().__init__()
                self.matrix, self.first, self.second = matrix, nn.Linear(2, 6), nn.Linear(6, OUT)

            def forward(self, x):
                return self.second(
                    torch.einsum("ij,bjd->bid", self.matrix, torch.tanh(self.first(x))).mean(1)
                )

        matrix = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0.3, 0, 0.7]], dtype=F64)
        triples = [[i, j, float(matrix[i, j])] for i in range(3) for j in range(3) if matrix[i, j]]
        model, x, y = Graph(matrix).double(), self.images((3, 2)), data()[1]
        line = "input 3x2; dense 6; tanh; propagate a; mean_tokens; dense 3"
        self.train(
            model,
            OPTIMIZERS["adam"](model.parameters()),
            steps=4,
            recorded_data=(x, y),
            network=line,
            constants={"a": np.array(triples)},
        )
        self.set_tests = self.images((3, 2), F64, M)
        self.certify(model)


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
            ("ELU.*alpha = -1.*positive", nn.ELU(-1)),
            ("InstanceNorm1d.*running statistics change", nn.InstanceNorm1d(6, track_running_stats=True)),
            ("LSTM.*not supported.*pathkernel_line", nn.LSTM(6, 6)),
            ("Hardtanh.*-1 to 1", nn.Hardtanh(-2, 2)),
            ("RReLU.*random", nn.RReLU()),
            ("Conv3d.*not supported", nn.Conv3d(1, 1, 1)),
            ("LeakyReLU.*positive", nn.LeakyReLU(-0.1)),
            ("Softplus.*threshold", nn.Softplus(threshold=1)),
            ("Flatten.*whole", nn.Flatten(0)),
            (r"layer 1 .*does not take torch.float64 \(8, 6\)", nn.Linear(5, 6)),
            ("LogSoftmax.*last dimension", nn.LogSoftmax(0)),
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
            "no parameters",
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
            ("Adadelta is not supported", lambda m: o.Adadelta(m.parameters())),
            ("alpha = 1", lambda m: o.RMSprop(m.parameters(), alpha=1)),
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
        with self.assertRaisesRegex(RecordError, "groups differ in their learning rates"):  # before any step
            model, (x, y) = network(), data()
            groups = [{"params": [p], "lr": 0.1 / (1 + i)} for i, p in enumerate(model.parameters())]
            Recorder(self.run_dir, model, loss="nll", optimizer=o.SGD(groups, lr=0.1), inputs=x, targets=y)
        if OLD_NADAM:
            for words, settings in (
                ("NAdam: foreach = .*foreach=True is the one", {}),
                ("NAdam: weight_decay = 0.1: .*adds the decay to the gradients", {"foreach": True, "weight_decay": 0.1}),
            ):
                self.refuse(words, optimizer=lambda m, s=settings: o.NAdam(m.parameters(), **s))
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
            ("reduction='none'.*weights", nn.MSELoss(reduction="none")),
            ("BCEWithLogitsLoss: weight", nn.BCEWithLogitsLoss(weight=torch.ones(3))),
            ("margin", nn.MultiMarginLoss(margin=2.0)),
            ("PoissonNLLLoss is not", nn.PoissonNLLLoss()),
            ("'delta=1' is not one of its options", "mean_squared delta=1"),
            ("'mse' is none", "mse"),
        ):
            with self.subTest(words):
                self.refuse(words, loss=loss)
        self.refuse("does not take torch.int64", inputs=torch.ones(N, IN, dtype=torch.int64))
        self.refuse("24 inputs and 23 targets", targets=y[1:])
        self.refuse("from 0 to 2", targets=y + 1)
        self.refuse("NaN", inputs=x / 0)
        self.refuse("does not take", inputs=x[:, :4])
        self.refuse(
            "do not fit", inputs=x[:, :4], network="input 5; dense 7; tanh; dense 6 nobias; tanh; dense 3"
        )
        self.refuse("3 outputs", loss="mean_squared", targets=x)
        images = torch.randn(N, 4, 4, 2).double()
        flat = nn.Sequential(nn.Flatten(), nn.Linear(32, OUT)).double()
        self.refuse("axes in another order", flat, inputs=images, network="input 2x4x4; flatten; dense 3")
        flat = nn.Sequential(nn.Flatten(), nn.Linear(16, OUT)).double()
        self.refuse("axes in another order", flat, inputs=images[..., 0], network="input 2x8; flatten; dense 3")

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
                self.assertFalse(os.path.exists(self.run_dir))  # so that the corrected script runs

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

    def test_modes_and_statistics(self):
        model = (
            nn.Sequential(nn.Linear(IN, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, OUT))
            .double()
            .eval()
        )
        x, y = data()
        for words, change in (
            ("step 0: a BatchNorm is in training mode.*couples", lambda: model[1].train()),
            ("step 0: a Dropout is in training mode", lambda: model[2].train()),
            ("step 0: the running statistics.*changed", lambda: model[1].running_var.mul_(2)),
        ):
            optimizer = torch.optim.SGD(model.eval().parameters(), lr=0.1)
            with self.subTest(words), self.assertRaisesRegex(RecordError, words):
                options = dict(loss="softmax_cross_entropy", optimizer=optimizer, inputs=x, targets=y)
                with Recorder(self.run_dir, model, **options) as record:
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    change()
                    record(range(N))
        line = "input 5; dense 6; tanh; dense 3"
        model.train()[2].eval()
        self.refuse("BatchNorm is in training mode", model, network=line)

    def test_layers(self):
        """Options and forwards that the format does not have."""

        class Own(nn.Module):
            def __init__(self, forward, **modules):
                super().__init__()
                self.own = forward
                for name, module in modules.items():
                    setattr(self, name, module)

            def forward(self, x):
                return self.own(self, x)

        image = lambda *layers: nn.Sequential(nn.Conv2d(2, 3, 3), *layers, nn.Flatten(), nn.LazyLinear(OUT))
        attend = lambda **o: nn.MultiheadAttention(8, 2, **{"batch_first": True, **o})
        attending = lambda call, **o: Own(
            lambda m, x: m.o(call(m.a, x)[0].mean(1)), a=attend(**o), o=nn.Linear(8, OUT)
        )
        self_attending = lambda **o: attending(lambda a, x: a(x, x, x), **o)
        embed = lambda **o: nn.Sequential(nn.Embedding(7, 4, **o), MeanTokens(), nn.Linear(4, OUT))
        x, images = torch.randn(N, IN).double(), torch.randn(N, 2, 8, 8).double()
        tokens, dense = torch.randint(7, (N, 4)), nn.Linear(IN, OUT)
        for words, inputs, model in (
            (
                "padding_mode = 'reflect'",
                images,
                image(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
            ),
            ("padding='same'", images, image(nn.Conv2d(3, 3, 2, padding="same"))),
            ("dilation", images, image(nn.MaxPool2d(2, dilation=2))),
            ("mode = 'bicubic'", images, image(nn.Upsample(scale_factor=2, mode="bicubic"))),
            ("whole numbers", images, image(nn.Upsample(scale_factor=1.5))),
            ("whole numbers", images, image(nn.Upsample(size=7))),
            ("divisor_override", images, image(nn.AvgPool2d(2, divisor_override=3))),
            ("layer 1 .*BatchNorm2d.*couples", images, image(nn.BatchNorm2d(3))),
            ("couples", images, image(nn.BatchNorm2d(3, track_running_stats=False).eval())),
            ("dropout draws random", images, image(nn.Dropout2d(0.1))),
            ("'conv 3 1x1' does not fit", images, image(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1))),
            ("one vector", images, nn.Sequential(nn.Conv2d(2, 3, 3))),
            ("padding_idx = 0", tokens, embed(padding_idx=0)),
            ("max_norm", tokens, embed(max_norm=1.0)),
            ("batch_first", images[:, 0], self_attending(batch_first=False)),
            ("dropout draws random", images[:, 0], self_attending(dropout=0.1)),
            ("add_bias_kv", images[:, 0], self_attending(add_bias_kv=True)),
            ("causal attention", images[:, 0], attending(lambda a, x: a(x, x, x, attn_mask=torch.eye(8).bool()))),
            ("more than one value", images[:, 0], attending(lambda a, x: a(x, 2 * x, x))),
            ("random", images[:, 0], nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))),
            ("same module twice", x, Own(lambda m, x: m.o(m.l(m.l(x))), l=nn.Linear(IN, IN), o=dense)),
            ("'l.weight' is in no layer", x, Own(lambda m, x: m.o(x), l=nn.Linear(IN, IN), o=dense)),
            ("looks at its numbers", x, Own(lambda m, x: m.o(x if x.sum() > 0 else -x), o=dense)),
            ("function mul.*the sum only", x, Own(lambda m, x: (lambda y: y * y.sigmoid())(m.o(x)), o=dense)),
            ("function cumsum", x, Own(lambda m, x: m.o(x.cumsum(1)), o=dense)),
            ("function cumsum", x, Own(lambda m, x: m.o(x.cumsum(1).sort(1)[0]), o=dense)),  # the first
            ("function cumsum", x, Own(lambda m, x: m.o(m.p(x.cumsum(1))), p=nn.PReLU(), o=dense)),
            ("dropout draws", x, Own(lambda m, x: nn.functional.dropout(m.o(x), 0.1, m.training), o=dense)),
            ("returns a tuple", x, Own(lambda m, x: (m.o(x), 1), o=dense)),
            (  # a shortcut that is overwritten
                "outputs differ",
                x,
                Own(
                    lambda m, x: (lambda h: m.o(h + m.b(h.relu_())))(m.a(x)),
                    a=nn.Linear(IN, IN),
                    b=nn.Linear(IN, IN),
                    o=dense,
                ),
            ),
        ):
            with self.subTest(words, model=str(model)):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    mode = [m.training for m in model.modules()]
                    with torch.no_grad():  # lazy layers find their sizes
                        if any(isinstance(m, nn.LazyLinear) for m in model.modules()):
                            model.eval()(inputs[:2].float())
                    for m, training in zip(model.modules(), mode):
                        m.training = training
                self.refuse(words, model.double(), inputs=inputs.clone())

    def test_existing_run(self):
        model = network()
        self.train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
        with self.assertRaisesRegex(RecordError, "exists already"):
            self.train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        self.assertEqual(np.load(os.path.join(self.run_dir, "weights.npy")).shape[0], 3)


class Steps(Case):
    """What loops do between two steps: recorded right, or refused at that step."""

    def loop(self, step=None, after=None, steps=8, optimizer="sgd", dtype=F64, given=None, model=None, **options):
        """The ordinary loop, with another step, or with something after it."""
        s = types.SimpleNamespace(model=model or network(nn.Tanh, dtype))
        shutil.rmtree(self.run_dir, ignore_errors=True)
        s.optimizer = OPTIMIZERS[optimizer](s.model.parameters())
        s.x, s.y = data("softmax_cross_entropy", dtype)
        s.inputs, s.targets = given(s) if given else (s.x, s.y)
        options = dict(loss="softmax_cross_entropy", optimizer=s.optimizer, **options)
        generator = torch.Generator().manual_seed(3)
        with Recorder(self.run_dir, s.model, inputs=s.inputs, targets=s.targets, **options) as s.record:
            for s.number in range(steps):
                s.rows = torch.randint(N, (BATCH,), generator=generator)
                if (step or self.usual)(s) == "break":
                    break
            if after:
                after(s)
        return s

    @staticmethod
    def gradient(s, zero=True, scale=1.0):
        if zero:
            s.optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(s.model(s.x[s.rows]), s.y[s.rows])).backward()

    def usual(self, s):
        self.gradient(s)
        s.optimizer.step()
        s.record(s.rows)

    def refuse(self, words, step=None, complete=None, **options):
        """Refused with these words, and what is on the disk, if anything, are the complete steps before."""
        with self.subTest(words):
            with self.assertRaisesRegex(RecordError, words):
                self.loop(step, **options)
            self.assertEqual(os.path.exists(self.run_dir), complete is not None)
            if complete is not None:
                result = self.decompose(options.get("dtype", F64))
                self.assertEqual(result["by_step"].shape[2], complete)
                self.assertLess(np.abs(result["unattributed"]).max(), 1e-12)

    def test_values_are_taken_when_the_optimizer_steps(self):
        def step(s):
            group = s.optimizer.param_groups[0]
            self.gradient(s)
            s.optimizer.step()
            group["lr"] *= 0.5  # in place, where it is a tensor
            group["weight_decay"] += 0.1
            s.record(s.rows)
            s.rows.zero_()
            group["weight_decay"] -= 0.1

        def tensor(s):
            if s.number == 0:
                s.optimizer.param_groups[0]["lr"] = torch.tensor(0.2, dtype=F64)
            step(s)

        for optimizer, first in (("sgd", 0.2), ("adam", 0.02)):
            s = self.loop(step, optimizer=optimizer)
            rates = np.load(os.path.join(self.run_dir, "learning_rates.npy"))
            np.testing.assert_array_equal(rates, first * 0.5 ** np.arange(8))
            self.certify(s.model)
        if NEW_TORCH:  # has rates that are tensors
            for optimizer in ("sgd", "adam"):
                s = self.loop(tensor, optimizer=optimizer)
                rates = np.load(os.path.join(self.run_dir, "learning_rates.npy"))
                np.testing.assert_array_equal(rates, 0.2 * 0.5 ** np.arange(8))
                self.certify(s.model)

    def test_data_that_changes(self):
        def change(what):
            def step(s):
                if s.number == 5:
                    what(s)
                self.usual(s)

            return step

        for given in (None, lambda s: (s.x.numpy(), s.y.numpy())):
            self.refuse("step 5.*Inputs changed", change(lambda s: s.x.mul_(2)), 5, given=given)
            self.refuse("step 5.*Targets changed", change(lambda s: s.y.copy_(2 - s.y)), 5, given=given)
        copies = lambda s: (s.x.clone(), s.y.clone())  # what is trained on stays as it was
        s = self.loop(change(lambda s: (s.inputs.zero_(), s.targets.zero_())), given=copies)
        self.certify(s.model)

        def hidden(s):
            s.x.numpy()[17, 2] += 1

        self.refuse("after 8 steps.*inputs were changed in place", complete=8, after=hidden)

    def test_gradients_that_are_not_those_of_the_loss(self):
        def changed(change, start=5):
            def step(s):
                self.gradient(s)
                if s.number >= start:
                    change(s)
                s.optimizer.step()
                s.record(s.rows)

            return step

        def other(start=5, **how):
            def step(s):
                self.gradient(s, **(how if s.number >= start else {}))
                s.optimizer.step()
                s.record(s.rows)

            return step

        parameters = lambda s: list(s.model.parameters())
        clip = lambda s: nn.utils.clip_grad_norm_(parameters(s), 1e-3) and None
        for optimizer in ("sgd", "adamw"):
            for start in (5, 31):  # also where no gradient is computed again
                how = dict(complete=start, steps=40, optimizer=optimizer)
                self.refuse(f"step {start}.*clipped without record.clip", changed(clip, start), **how)
                self.refuse(f"step {start}.*zero_grad", other(start, zero=False), **how)
        self.refuse("step 1.*zero_grad", other(0, zero=False))
        self.refuse("step 6.*It is that times 0.5", other(6, scale=0.5), 6)
        self.refuse("step 0.*times 65536: .*GradScaler", other(0, scale=65536.0), dtype=F32)
        values = lambda s: nn.utils.clip_grad_value_(parameters(s), 1e-3)
        self.refuse("step 5.*not that of loss", changed(values), 5)
        self.refuse("step 5.*not that of loss", changed(lambda s: parameters(s)[0].grad.zero_()), 5)

        def hook(s):
            if s.number == 5:
                [p.register_hook(lambda g: g / 2) for p in parameters(s)]
            self.usual(s)

        self.refuse("step 5.*It is that times 0.5", hook, 5)

        def closure(shift):
            def step(s):
                def again():
                    s.optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(s.model(s.x[s.rows]), s.y[s.rows])
                    loss.backward()
                    return loss

                s.optimizer.step(again)
                s.record((s.rows + shift) % N)

            return step

        for optimizer in ("sgd", "nesterov", "adamw"):
            self.certify(self.loop(closure(0), optimizer=optimizer).model)
        self.refuse("step 0.*rows of this batch", closure(1))
        if NEW_TORCH:  # has hooks of optimizers

            def before(act):
                def step(s):
                    if s.number == 5:
                        s.optimizer.register_step_pre_hook(lambda *_: act(s))
                    self.usual(s)

                return step

            self.refuse("step 5.*clipped without record.clip", before(clip), 5)
            slower = lambda s: s.optimizer.param_groups[0].update(lr=0.01)
            self.refuse("step 5: the weights did not move by 'sgd'", before(slower), 5)
            self.certify(self.loop(before(lambda s: s.record.clip(1e-3) and None)).model)

            def hooked(s):  # hooks of the user's around the step, older than the recorder's
                scheduler = torch.optim.lr_scheduler.ExponentialLR(s.optimizer, 0.5)
                s.optimizer.register_step_pre_hook(lambda *_: s.optimizer.param_groups[0].update(weight_decay=0.0))
                s.optimizer.register_step_post_hook(lambda *_: (s.optimizer.zero_grad(), scheduler.step()) and None)
                return s.x, s.y

            self.certify(self.loop(given=hooked).model)
            with_autocast = torch.autocast("cpu", dtype=torch.bfloat16)

            def half(s):
                with with_autocast:
                    self.gradient(s)
                s.optimizer.step()
                s.record(s.rows)

            self.refuse("bfloat16, under autocast.*GradScaler", half, dtype=F32)

    def test_gradients_that_only_look_wrong(self):
        def micro_batches(s):
            s.optimizer.zero_grad()
            for rows in s.rows.split(2):
                (nn.functional.cross_entropy(s.model(s.x[rows]), s.y[rows]) / 3).backward()
            s.optimizer.step()
            s.record(s.rows)

        def logged(s):
            nn.functional.cross_entropy(s.model(s.x), s.y).backward()
            self.usual(s)

        def by_hand(s):
            parameters = list(s.model.parameters())
            loss = nn.functional.cross_entropy(s.model(s.x[s.rows]), s.y[s.rows])
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
                p.grad = g
            s.optimizer.step()
            s.record(s.rows)

        def clipped_twice(s):
            self.gradient(s)
            s.record.clip(0.2)
            s.record.clip(0.1)
            s.optimizer.step()
            s.optimizer.zero_grad()
            s.record(s.rows)

        def scaled_by_hand(s):
            self.gradient(s)
            [p.grad.mul_(0.25) for p in s.model.parameters()]
            s.optimizer.step()
            s.record(s.rows, gradient_scale=0.25)

        def copied(s):
            self.usual(s)
            copy.deepcopy(s.model)
            torch.save([s.model, s.optimizer.state_dict()], io.BytesIO())

        def mask(s):
            s.rows = s.rows.unique()
            self.gradient(s)
            s.optimizer.step()
            s.record(torch.isin(torch.arange(N), s.rows))

        for dtype in (F64, F32):
            for step in (micro_batches, logged, by_hand, clipped_twice, scaled_by_hand, copied, mask):
                for optimizer in ("nesterov", "adamw"):
                    with self.subTest(step.__name__, optimizer=optimizer, dtype=dtype):
                        self.certify(self.loop(step, optimizer=optimizer, dtype=dtype, steps=12).model)

    def test_gradients_that_cancel(self):
        """Close to a minimum, the sum over examples is rounding; that is no mistake."""
        for dtype in (F64, F32):
            shutil.rmtree(self.run_dir, ignore_errors=True)
            torch.manual_seed(5)
            x, model = torch.randn(N, IN).to(dtype), nn.Linear(IN, 1).to(dtype)
            y = 1000 * x @ torch.randn(IN, 1).to(dtype)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            options = dict(loss="mean_squared", optimizer=optimizer, inputs=x, targets=y, check=10**9)
            with Recorder(self.run_dir, model, **options) as record:
                for _ in range(300):
                    optimizer.zero_grad()
                    nn.functional.mse_loss(model(x), y).backward()
                    optimizer.step()
                    record(range(N))

    def test_updates(self):
        def at_5(act):
            def step(s):
                self.gradient(s)
                if s.number == 5:
                    act(s)
                s.optimizer.step()
                s.record(s.rows)

            return step

        def clamp(s):
            self.gradient(s)
            s.optimizer.step()
            if s.number == 5:
                with torch.no_grad():
                    [p.clamp_(-0.1, 0.1) for p in s.model.parameters()]
            s.record(s.rows)

        clear = lambda s: s.optimizer.state.clear()
        for optimizer in ("momentum", "dampening", "nesterov", "adam_decay", "adamw"):
            for dtype in (F64, F32):
                self.refuse("step 5: the weights did not move", at_5(clear), 5, optimizer=optimizer) if (
                    dtype == F64
                ) else self.certify(self.loop(optimizer=optimizer, dtype=dtype, steps=200).model, 1e-3)
        self.refuse("step 5: the weights did not move.*'0.weight'|clamping", clamp, 5)

    def test_end(self):
        def stop(s):
            if s.number == 5:
                self.gradient(s)
                s.optimizer.step()
                return "break"
            self.usual(s)

        def weights(change):
            def after(s):
                with torch.no_grad():
                    change(list(s.model.parameters()))

            return after

        self.refuse("after 5 steps.*not recorded.*break", stop, 5)
        self.refuse("after 8 steps.*weights are not those", complete=8, after=weights(lambda p: p[0].mul_(0.9)))
        self.refuse("after 8 steps.*weights are not those", complete=8, after=lambda s: self.gradient(s) or (
            weights(lambda p: p[3].view(-1)[0].add_(1))(s)))  # fmt: skip
        swapped = lambda p: (p[0].mul_(2), p[0].div_(2))
        self.certify(self.loop(after=weights(swapped)).model)
        model = nn.Sequential(nn.Linear(IN, 6), nn.Dropout(0.5), nn.Linear(6, OUT)).double().eval()
        self.refuse("after 8 steps.*Dropout", complete=8, model=model, after=lambda s: s.model.train())

        class Shifted(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.Linear(IN, IN), nn.Linear(IN, OUT)
                self.register_buffer("shift", torch.ones(4, IN))

            def forward(self, x):
                return self.last((self.first(x[:, None].expand(-1, 4, -1)) + self.shift).mean(1))

        def shift(s):
            s.model.shift.mul_(2)

        images = torch.randn(N, 4, IN).double()

        class Tokens(Shifted):
            def forward(self, x):
                return self.last((self.first(x) + self.shift).mean(1))

        with self.assertRaisesRegex(RecordError, "after 0 steps.*outputs differ.*buffer"):
            model = Tokens().double()
            options = dict(loss="softmax_cross_entropy", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
            shutil.rmtree(self.run_dir)
            with Recorder(self.run_dir, model, inputs=images, targets=data()[1], **options):
                model.shift.mul_(2)
        with self.assertRaisesRegex(ZeroDivisionError, "mine"):  # is not masked by what is wrong at the end

            def fail(s):
                self.gradient(s)
                s.optimizer.step()
                raise ZeroDivisionError("mine")

            self.loop(fail)

    def test_integers(self):
        for kind in (torch.int32, torch.uint8, torch.int16):
            s = self.loop(given=lambda s: (s.x, s.y.to(kind)))
            self.certify(s.model)
            self.certify(self.loop(given=lambda s: (s.x, s.y[:, None].to(kind).numpy())).model)
        for kind in (torch.uint8, torch.bool):
            self.certify(self.loop(given=lambda s: (s.x, nn.functional.one_hot(s.y, OUT).to(kind))).model)

        def counts(kind, top, factor=1.0):
            def given(s):
                raw = torch.randint(top, s.x.shape, generator=torch.Generator().manual_seed(1)).to(kind)
                s.x = raw.to(s.x.dtype) / factor
                return raw, s.y

            return given

        for dtype in (F64, F32):
            for kind, top in ((torch.uint8, 4), (torch.bool, 2), (torch.int32, 3)):
                self.certify(self.loop(given=counts(kind, top), dtype=dtype).model)
        self.refuse("step 0.*inputs what the model is given", given=counts(torch.uint8, 256, 255.0))

    def test_wrappers_and_outputs(self):
        class Returns(nn.Module):
            def __init__(self, how):
                super().__init__()
                self.inner, self.how = network(), how

            def forward(self, x):
                return self.how(self.inner(x))

        for words, model in (
            ("DataParallel.*model.module", nn.DataParallel(network())),
            ("torch.jit", torch.jit.trace(network(), data()[0])),
            ("returns a tuple; return only the tensor", Returns(lambda f: (f, 1))),
            ("returns a dict; return only the tensor", Returns(lambda f: {"logits": f})),
            ("bfloat16", network().bfloat16()),
        ):
            self.refuse(words, model=model)
        if NEW_TORCH:
            model = network()
            self.refuse("model._orig_mod", model=torch.compile(model, backend="eager"))
            model.compile(backend="eager")  # in place
            self.certify(self.loop(model=model).model)
            self.refuse("its module 'inner'.*torch.compile", model=Wrapped(torch.compile(network(), backend="eager")))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Resume(Case):
    """A run that goes on in another process, or after a kill."""

    def start(self, optimizer="adamw", dtype=F64, seed=1, **options):
        self.x, self.y = data("softmax_cross_entropy", dtype)
        self.model = network(nn.Tanh, dtype, seed=seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        options = {"loss": "softmax_cross_entropy", "inputs": self.x, "targets": self.y, **options}
        return Recorder(self.run_dir, self.model, optimizer=self.optimizer, **options)

    def train(self, record, until):
        """The same batches, whoever makes the step."""
        while record.steps < until:
            rows = torch.randint(N, (BATCH,), generator=torch.Generator().manual_seed(record.steps))
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
            record.clip(0.5)
            self.optimizer.step()
            record(rows)

    def state(self):
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])

    def restore(self, state):
        model, optimizer = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        for state in self.optimizer.state.values():
            if "mu_product" in state:  # load_state_dict made it float64, and the run another one
                state["mu_product"] = state["mu_product"].float()

    def everything(self):
        return {
            name: np.load(os.path.join(self.run_dir, name))
            for name in sorted(os.listdir(self.run_dir))
            if name.endswith(".npy")
        }

    def test_same_bits(self):
        for dtype in (F64, F32):
            for optimizer in OPTIMIZERS:
                moments = {"second_moments": True} if optimizer == "adam" else {}
                with self.subTest(optimizer, dtype=dtype):
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                    with self.start(optimizer, dtype, **moments) as record:
                        self.train(record, 12)
                    expected = self.everything()
                    shutil.rmtree(self.run_dir)
                    with self.start(optimizer, dtype, resume=True, **moments) as record:  # nothing there: a start
                        self.train(record, 5)
                        five = self.state()
                        self.train(record, 7)
                        seven = self.state()
                    for resume, state in ((True, seven), (5, five), (7, None)):
                        recorder = self.start(optimizer, dtype, resume=resume, **moments)
                        self.restore(state or seven)
                        with recorder as record:
                            self.assertEqual(record.steps, 7 if resume is True else resume)
                            self.train(record, 9 if resume is True else 12)
                    now = self.everything()
                    self.assertEqual(list(now), list(expected))
                    for name, array in expected.items():
                        np.testing.assert_array_equal(now[name], array, name)
                    self.certify(self.model)

    def test_after_kills(self):
        program = f"""
import sys; sys.path[:0] = [{HERE!r}]
from test_pytorch import *
case = Resume(); case.run_dir = {self.run_dir!r}
checkpoint = {self.folder + "/checkpoint"!r}
at = 0 if not os.path.exists(checkpoint) else torch.load(checkpoint)[0]
recorder = case.start(resume=at if at else True)
if at: case.restore(torch.load(checkpoint)[1:])
with recorder as record:
    if not at: record.steps == 0 or sys.exit("no checkpoint")
    print("go", flush=True)
    while True:
        case.train(record, record.steps + 3)
        torch.save([record.steps, *case.state()], checkpoint + ".new")
        os.replace(checkpoint + ".new", checkpoint)
"""
        steps = 0
        for trial in range(4):
            child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
            self.assertEqual(child.stdout.readline(), "go\n")
            with self.assertRaisesRegex(RecordError, "being recorded by another recorder"):
                self.start(resume=True).__enter__()
            checkpoint = os.path.join(self.folder, "checkpoint")
            while not os.path.exists(checkpoint) or torch.load(checkpoint)[0] <= steps:
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
            steps, state = torch.load(checkpoint)[0], torch.load(checkpoint)[1:]
        recorder = self.start(resume=steps)
        self.restore(state)
        with recorder as record:
            self.train(record, steps + 4)
        resumed = self.everything()
        shutil.rmtree(self.run_dir)
        with self.start() as record:
            self.train(record, steps + 4)
        for name, array in self.everything().items():
            np.testing.assert_array_equal(resumed[name], array, name)
        self.certify(self.model)

    def test_refused(self):
        with self.start() as record:
            self.train(record, 4)
            four = self.state()
            self.train(record, 6)
            six = self.state()
        before = self.everything()

        def refuse(words, state, resume=True, change=None, **options):
            with self.subTest(words):
                with self.assertRaisesRegex(RecordError, words):
                    recorder = self.start(resume=resume, **options)
                    if state:
                        self.restore(state)
                    if change:
                        change()
                    with recorder:
                        self.fail("resumed")
                for name, array in before.items():
                    np.testing.assert_array_equal(np.load(os.path.join(self.run_dir, name)), array)

        refuse("not those after its step 6.*state_dict", None, seed=2)
        refuse("those after step 0.*resume=0", None)
        refuse("those after step 4, the run goes on to step 6.*resume=4", four)
        refuse("those after step 4", four, resume=5)
        refuse("has 6 steps", six, resume=7)
        refuse("no exp_avg", [six[0], four[1]], change=lambda: self.optimizer.state.clear())
        refuse("made 4 steps, not 6", [six[0], four[1]])

        def moved():
            self.optimizer.state[self.model[0].weight]["exp_avg"].mul_(1.1)

        refuse("exp_avg is not the one", six, change=moved)
        refuse("run.txt says 'optimizer adamw", six, optimizer="adam")
        refuse("run.txt says 'loss softmax", six, loss="hinge")
        refuse("train_inputs.npy holds other data", six, inputs=data()[0] + 1)
        refuse("train_targets.npy holds other data", six, targets=(data()[1] + 1) % OUT)
        refuse("second_moments", six, second_moments=True)
        path = os.path.join(self.run_dir, "learning_rates.npy")
        np.save(path, np.load(path)[:2])
        before["learning_rates.npy"] = before["learning_rates.npy"][:2]
        refuse("a kill does not do that", six)
        with self.assertRaisesRegex(RecordError, "exists already.*resume=True"):
            self.start().__enter__()

    def test_one_at_a_time(self):
        with self.start() as record:
            self.train(record, 2)
            first = self.model, self.optimizer
            for resume in (True, False):
                with self.assertRaisesRegex(RecordError, "being recorded by another recorder"):
                    self.start(resume=resume).__enter__()
            self.model, self.optimizer = first
            worker = os.fork()
            if not worker:  # such as those of a DataLoader: they may outlive a killed process
                try:
                    time.sleep(60)
                finally:
                    os._exit(0)
            self.train(record, 3)
            state = self.state()
        try:
            recorder = self.start(resume=True)
            self.restore(state)
            with recorder as record:
                self.train(record, 5)
        finally:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
        self.certify(self.model)

    def test_a_start_that_was_killed(self):
        for resume in (False, True):
            shutil.rmtree(self.run_dir, ignore_errors=True)
            with self.start(resume=resume) as record:
                self.train(record, 2)
            os.rename(os.path.join(self.run_dir, "run.txt"), os.path.join(self.run_dir, "run.txt.tmp"))
            with self.start(resume=resume) as record:
                self.train(record, 3)
            self.certify(self.model)
            self.assertNotIn("run.txt.tmp", os.listdir(self.run_dir))


class Places(Case):
    """What else may stand in the place of a file."""

    def start(self, **options):
        self.model, (x, y) = network(), data()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        options = {"loss": "softmax_cross_entropy", "optimizer": self.optimizer, "inputs": x, "targets": y, **options}
        return Recorder(self.run_dir, self.model, **options)

    def test_fifos_and_links(self):
        names = [name + ".npy" for name in ("weights", "train_inputs", "batch_items", "learning_rates")]
        outside = os.path.join(self.folder, "outside")
        make = {
            "fifo": os.mkfifo,
            "link": lambda path: os.symlink(outside, path),
            "folder": os.mkdir,
        }
        for kind, act in make.items():
            for name in (*names, "run.txt", "run.txt.tmp"):
                with self.subTest(kind, name=name):
                    os.mkdir(self.run_dir)
                    with open(outside, "w") as file:
                        file.write("precious")
                    act(os.path.join(self.run_dir, name))
                    with self.assertRaisesRegex(RecordError, name):
                        self.start().__enter__()
                    self.assertEqual(os.listdir(self.run_dir), [name])
                    shutil.rmtree(self.run_dir)
                    with self.start():
                        pass
                    if name == "run.txt.tmp":
                        shutil.rmtree(self.run_dir)
                        continue
                    os.remove(os.path.join(self.run_dir, name))
                    act(os.path.join(self.run_dir, name))
                    with self.assertRaisesRegex(RecordError, name):
                        self.start(resume=True).__enter__()
                    shutil.rmtree(self.run_dir)
                    with open(outside) as file:
                        self.assertEqual(file.read(), "precious")
        with open(self.run_dir, "w"):
            pass
        with self.assertRaisesRegex(RecordError, "is no folder"):
            self.start().__enter__()

    def test_closed_streams(self):
        program = f"""
import sys; sys.path[:0] = [{HERE!r}]
from test_pytorch import *
case = Places(); case.run_dir = {self.run_dir!r}
recorder = case.start()
x, y = data()
with recorder as record:
    for step in range(3):
        for stream in (0, 1, 2):
            try: os.write(stream, b"noise")
            except OSError: pass
        case.optimizer.zero_grad()
        nn.functional.cross_entropy(case.model(x), y).backward()
        case.optimizer.step()
        record(range(N))
os._exit(0)
"""
        command = [shutil.which("sh"), "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program]
        self.assertEqual(subprocess.run(command).returncode, 0)
        self.assertEqual(np.load(os.path.join(self.run_dir, "weights.npy")).shape[0], 4)
        result = self.decompose()
        self.assertLess(np.abs(result["unattributed"]).max(), 1e-12)

    def test_nothing_is_left_by_a_refusal(self):
        self.run_dir = os.path.join(self.run_dir, "deep", "down")
        recorder = self.start()
        with self.assertRaisesRegex(RecordError, "not that of loss"):
            with recorder as record:
                nn.functional.cross_entropy(self.model(data()[0]), data()[1]).backward()
                self.optimizer.step()
                record(range(1, N))
        self.assertEqual(os.listdir(self.folder), [])
        os.makedirs(self.run_dir)
        with open(os.path.join(self.run_dir, "notes"), "w"):
            pass
        with self.assertRaisesRegex(ZeroDivisionError, "mine"):
            with self.start():
                raise ZeroDivisionError("mine")
        self.assertEqual(os.listdir(self.run_dir), ["notes"])


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
                self.compare(result, optimizer, name, x, y)

    def compare(self, result, optimizer, name, x, y):
        """With what the definition gives."""
        group = optimizer.param_groups[0]
        load = lambda file: np.load(os.path.join(self.run_dir, file + ".npy"))
        w, rates, offsets, items = map(load, ("weights", "learning_rates", "batch_offsets", "batch_items"))
        scales, w = load("gradient_scales"), torch.tensor(w)
        P = w.shape[1]
        buffer, second = torch.zeros(N + 1, P, dtype=F64), torch.zeros(P, dtype=F64)  # row N: the decay
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
        Case.worst["brute force", "float64"] = max(Case.worst.get(("brute force", "float64"), 0), error)
        self.assertLess(error, 1e-9)

    def test_convolution_and_transformer(self):
        # conv 3 3x2 stride=2x1 pad=1x1; tanh; avg_pool 2; flatten; dense
        def convolution(w, x):
            x = nn.functional.conv2d(x, w[:18].reshape(3, 1, 3, 2), w[18:21], (2, 1), 1)
            x = nn.functional.avg_pool2d(torch.tanh(x), 2).flatten(1)
            return x @ w[21:48].reshape(OUT, 9).T + w[48:]

        # embedding 5 4; position; residual( layer_norm; attention 1 causal ); mean_tokens; dense
        def transformer(w, x):
            cut = list(torch.split(w, [20, 12, 4, 4, 48, 12, 16, 4, 12, 3]))
            x = nn.functional.one_hot(x, 5).to(w) @ cut[0].reshape(5, 4) + cut[1].reshape(3, 4)
            mean = x.mean(2, keepdim=True)
            y = (x - mean) / ((x - mean).square().mean(2, keepdim=True) + 1e-5).sqrt() * cut[2] + cut[3]
            q, k, v = (y @ cut[4].reshape(12, 4).T + cut[5]).split(4, 2)
            seen = torch.exp((q @ k.transpose(1, 2)) / 2) * torch.ones(3, 3, dtype=F64).tril()
            y = (seen / seen.sum(2, keepdim=True)) @ v
            return (x + y @ cut[6].reshape(4, 4).T + cut[7]).mean(1) @ cut[8].reshape(OUT, 4).T + cut[9]

        images = [torch.randn(n, 1, 6, 5, dtype=F64) for n in (N, M)]
        tokens = [torch.randint(5, (n, 3)) for n in (N, M)]
        models = {
            convolution: lambda: nn.Sequential(
                nn.Conv2d(1, 3, (3, 2), (2, 1), 1),
                nn.Tanh(),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(9, OUT),
            ),
            transformer: lambda: nn.Sequential(
                nn.Embedding(5, 4),
                Position(3, 4),
                Residual(nn.Sequential(nn.LayerNorm(4), SelfAttention(4, 1, causal=True))),
                MeanTokens(),
                nn.Linear(4, OUT),
            ),
        }
        for (self.outputs, model), (x, self.set_tests) in zip(models.items(), (images, tokens)):
            for name in ("dampening", "adamw"):
                with self.subTest(self.outputs.__name__, optimizer=name):
                    shutil.rmtree(self.run_dir, ignore_errors=True)
                    torch.manual_seed(2)
                    trained, y = model().double(), data()[1]
                    optimizer = OPTIMIZERS[name](trained.parameters())
                    self.train(trained, optimizer, clip=0.5, steps=4, recorded_data=(x, y))
                    self.compare(self.certify(trained), optimizer, name, x, y)


class Training(Case):
    """pathkernel train from PyTorch's initial weights: the weights of every step are PyTorch's with the same batches."""

    def follow(self, network, model, loss, text, optimizer, rate, scheduler, clip, x, y, *options):
        files = {"w0": nn.utils.parameters_to_vector(model.parameters()).detach(), "inputs": x, "targets": y}
        for name, values in files.items():
            np.save(os.path.join(self.folder, name + ".npy"), values.numpy())
        path = {name: os.path.join(self.folder, name + ".npy") for name in files}
        command = [PROGRAM.removesuffix("-decompose"), "train", self.run_dir, "--network", network, "--loss", loss]
        command += ["--inputs", path["inputs"], "--targets", path["targets"], "--init", path["w0"], "--seed", "5"]
        command += ["--optimizer", text, "--rate", rate, "--steps", str(STEPS), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        read = {k: np.load(os.path.join(self.run_dir, k + ".npy")) for k in RECORDED}
        offsets, epoch = read["batch_offsets"], []
        for step in range(STEPS):
            batch = read["batch_items"][offsets[step] : offsets[step + 1]]
            epoch += list(batch)
            if len(epoch) == len(x):  # each example once
                self.assertEqual(sorted(epoch), list(range(len(x))))
                epoch = []
            self.assertAlmostEqual(optimizer.param_groups[0]["lr"], read["learning_rates"][step], delta=1e-15)
            optimizer.zero_grad()
            OBJECTIVES[loss](model(x[batch]), y[batch]).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if scheduler:
                scheduler.step()
            weights = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
            error = np.abs(weights - read["weights"][step + 1]).max()
            kind = "pathkernel train", "float64"
            Case.worst[kind] = max(error, Case.worst.get(kind, 0))
            self.assertLess(error, 1e-12)
        self.certify(model)

    def test_optimizers_and_schedules(self):
        schedulers = torch.optim.lr_scheduler
        optim = torch.optim
        cases = {
            "momentum": (
                "sgd momentum=0.9 weight_decay=0.01",
                lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
                "0.1",
                None,
                None,
                [],
            ),
            "adamw": (
                "adamw weight_decay=0.1",
                lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1),
                "cosine:0.05:0.001",
                lambda o: schedulers.CosineAnnealingLR(o, STEPS, 0.001),
                0.5,
                ["--batch", "7", "--clip", "0.5"],  # 24 examples: 7, 7, 7 and 3
            ),
            "adam": (
                "adam beta2=0.98",
                lambda p: optim.Adam(p, lr=0.02, betas=(0.9, 0.98)),
                "step:0.02:0.5:4",
                lambda o: schedulers.StepLR(o, 4, 0.5),
                None,
                ["--batch", "8"],
            ),
            "warm": (
                "sgd momentum=0.8 nesterov=1",
                lambda p: optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
                "warmup:5:0.1",
                lambda o: schedulers.LinearLR(o, 1 / 3, 1, 5),
                None,
                ["--batch", "24"],
            ),
        }
        for name, (text, make, rate, schedule, clip, options) in cases.items():
            with self.subTest(name):
                shutil.rmtree(self.run_dir, ignore_errors=True)
                model = network()
                optimizer = make(model.parameters())
                scheduler = schedule(optimizer) if schedule else None
                line = f"input {IN}; dense {HIDDEN}; tanh; dense 6 nobias; tanh; dense {OUT}"
                self.follow(
                    line,
                    model,
                    "softmax_cross_entropy",
                    text,
                    optimizer,
                    rate,
                    scheduler,
                    clip,
                    *data(),
                    *options,
                )


RECORDED = ("weights", "batch_offsets", "batch_items", "learning_rates")


def tearDownModule():
    print(f"torch {torch.__version__}, NumPy {np.__version__}; the largest errors:")
    for (name, kind), error in sorted(Case.worst.items()):
        print(f"  {name:20s} {kind}  {error:.2g}")


if __name__ == "__main__":
    if not PROGRAM:
        sys.exit("set PATHKERNEL_DECOMPOSE to the program pathkernel-decompose, or put it on the PATH")
    unittest.main()
