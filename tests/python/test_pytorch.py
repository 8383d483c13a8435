"""examples/pytorch/pathkernel_record.py and the program: what PyTorch trains is decomposed to rounding.

    PATHKERNEL_DECOMPOSE=build/pathkernel-decompose python3 tests/python/test_pytorch.py

Needs torch >= 1.13 and NumPy. The program is $PATHKERNEL_DECOMPOSE, or pathkernel-decompose on the PATH.
"""

import copy
import functools
import io
import math
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
from torch.nn import functional as F

try:
    from torch.func import functional_call
except ImportError:  # PyTorch 1.13
    from torch.nn.utils.stateless import functional_call

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "examples", "pytorch"))
from pathkernel_record import (  # noqa: E402
    Indexed,
    MeanTokens,
    Position,
    RecordError,
    Recorder,
    Residual,
    SelfAttention,
    Token,
    _Growing,
)

PROGRAM = os.environ.get("PATHKERNEL_DECOMPOSE") or shutil.which("pathkernel-decompose")
class Apply(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


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
        self.record = record
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
            lambda: Apply(torch.abs),
            lambda: Apply(torch.erf),
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
        F.hardsigmoid(at).backward()
        shutil.rmtree(self.run_dir, ignore_errors=True)
        model = network(nn.Hardsigmoid, F64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        if abs(at.grad.item() * 6 - 1) > 1e-12:
            with self.assertRaisesRegex(RecordError, "(?i)hard_?sigmoid|not that of loss"):
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
                        F.cross_entropy(model(inputs), labels, reduction="none") * weights
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
                    F.cross_entropy(model(x), y).backward()
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
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class LeNet(nn.Module):
    """Functions and views, of images that come as rows of numbers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 2)
        self.fc = nn.Linear(4, OUT)

    def forward(self, x):
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
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.out(x[:, -1])


class Two(nn.Module):
    """Positions of the same value: a table, a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.late, self.early = nn.Embedding(3, 4), nn.Parameter(torch.zeros(3, 4))
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, OUT)
        self.register_buffer("fixed", torch.zeros(3, 4))
        nn.init.zeros_(self.late.weight)

    def forward(self, x):
        x = torch.tanh(self.inner(x + self.early)) + self.late(torch.arange(3))
        return self.out((x + self.fixed).mean(1))


def between(first, *layers):
    """A layer, others behind it, and what makes outputs of it; for images of 2 x 6 x 6 or signals of 2 x 6."""
    shape = (2, 6, 6) if isinstance(first, (nn.Conv2d, nn.ConvTranspose2d)) else (2, 6)
    for p in first.parameters():
        nn.init.normal_(p.data, std=0.3)
    body = nn.Sequential(first, *layers, nn.Tanh(), nn.Flatten())
    with torch.no_grad():
        width = body.eval()(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(body, nn.Linear(width, OUT)), shape


def around(*layers):
    return nn.Sequential(nn.Linear(5, 4), *layers, nn.Tanh(), nn.Flatten(), nn.Linear(12, OUT)), (3, 5)


def running(norm, *shape):
    """A norm in eval mode, with statistics of its own."""
    norm(torch.randn(9, *shape) * 2 + 1)
    return norm.eval()


def layers():
    """name: (model, shape of its inputs, or how many tokens)."""
    torch.manual_seed(3)
    convolutions = (
        nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), bias=False),
        nn.Conv2d(2, 4, (3, 2), dilation=2, groups=2),
        nn.Conv2d(2, 4, (3, 2), padding="same", dilation=(1, 2)),
        nn.Conv1d(2, 4, 3, 2, 2, 2, 2, bias=False),
        nn.ConvTranspose2d(2, 4, (3, 2), (2, 1), (1, 0), groups=2, bias=False),
        nn.ConvTranspose2d(2, 4, (3, 2), 2, output_padding=(1, 0), dilation=(1, 2)),
        nn.ConvTranspose1d(2, 3, 3, 2, 0, 1),
    )
    found = {str(layer): between(layer) for layer in convolutions}
    images = (
        nn.MaxPool2d((3, 2), (2, 1), (1, 0)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(4, 4, 1, True, False),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((None, 4)),
        nn.AdaptiveMaxPool2d(4),
        nn.Upsample(scale_factor=2),
        nn.Upsample(size=(12, 6)),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.UpsamplingBilinear2d(12),
        nn.GroupNorm(3, 3),
        nn.GroupNorm(1, 3, 1e-3, affine=False),
        nn.InstanceNorm2d(3),
        nn.InstanceNorm2d(3, affine=True),
        running(nn.InstanceNorm2d(3, track_running_stats=True), 3, 6, 6),
        running(nn.BatchNorm2d(3, eps=1e-3), 3, 6, 6),
        running(nn.BatchNorm2d(3, affine=False), 3, 6, 6),
    )
    found.update({str(layer): between(nn.Conv2d(2, 3, 3, padding=1), layer) for layer in images})
    signals = (
        nn.MaxPool1d(2, ceil_mode=True),
        nn.AvgPool1d(2, padding=1),
        nn.AdaptiveMaxPool1d(4),
        nn.Upsample(scale_factor=2, mode="linear"),
        nn.PReLU(3),
    )
    found.update({str(layer): between(nn.Conv1d(2, 3, 2), layer) for layer in signals})
    norms = [
        nn.LayerNorm(4),
        nn.LayerNorm((3, 4), 1e-3),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.Softmax(-1),
        nn.LogSoftmax(2),
        running(nn.BatchNorm1d(3), 3, 4),
    ]
    if hasattr(nn, "RMSNorm"):
        norms += [nn.RMSNorm(4), nn.RMSNorm((3, 4), 0.01, False), nn.LayerNorm(4, bias=False)]
    found.update({str(norm): around(norm) for norm in norms})
    encoder = lambda first: nn.TransformerEncoderLayer(6, 2, 8, 0.0, "gelu", batch_first=True, norm_first=first)
    found.update(
        {
            "ResNet": (ResNet().eval(), (1, 8, 8)),
            "LeNet": (LeNet(), (36,)),
            "transformer": (Transformer(), 4),
            "transformer, positions that are not trained": (Transformer(positions="fixed"), 4),
            "positions": (Two(), (3, 4)),
            "order of use": (nn.Sequential(nn.Linear(IN, 6), Swapped(), nn.Linear(6, OUT)), (IN,)),
            "modules for tokens": (
                nn.Sequential(
                    nn.Embedding(7, 6),
                    Position(4, 6),
                    Residual(nn.Sequential(nn.LayerNorm(6), SelfAttention(6, 2, causal=True))),
                    Residual(nn.Linear(6, 5), nn.Linear(6, 5, bias=False)),
                    SelfAttention(5, 1, bias=False),
                    MeanTokens(),
                    nn.Linear(5, OUT),
                ),
                4,
            ),
            "a token": (nn.Sequential(nn.Embedding(7, 6), nn.Tanh(), Token(-1), nn.Linear(6, OUT)), 4),
        }
    )
    for first in (False, True):
        name = f"nn.TransformerEncoder, norm_first={first}"
        body = nn.TransformerEncoder(encoder(first), 2, **({} if first else {"norm": nn.LayerNorm(6)}))
        found[name] = nn.Sequential(nn.Embedding(7, 6), body, Token(0), nn.Linear(6, OUT)), 3
    return found


class Modules(Case):
    """Each kind of module: read, recorded, decomposed."""

    def inputs(self, shape, dtype=F64, n=N):
        g = torch.Generator().manual_seed(7 if n == N else 9)
        if isinstance(shape, int):
            return torch.randint(7, (n, shape), generator=g)
        return torch.randn(n, *shape, generator=g, dtype=F64).to(dtype)

    def check(self, model, shape, optimizer="adamw", dtype=F64):
        shutil.rmtree(self.run_dir, ignore_errors=True)
        torch.manual_seed(4)
        with torch.no_grad():  # factors of norms that differ, so that their order matters
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        model, x = model.to(dtype), self.inputs(shape, dtype)
        self.train(model, OPTIMIZERS[optimizer](model.parameters()), steps=4, recorded_data=(x, data()[1]))
        last = np.load(os.path.join(self.run_dir, "weights.npy"))[-1]
        vector = nn.utils.parameters_to_vector(self.record.parameters).detach().numpy()
        np.testing.assert_array_equal(last, vector)
        self.set_tests = self.inputs(shape, dtype, M)
        return self.certify(model)

    def test_layers(self):
        for number, (name, (model, shape)) in enumerate(layers().items()):
            with self.subTest(name):
                self.check(model, shape, ("adamw", "momentum", "sgd")[number % 3])

    def test_float32(self):
        for name, (model, shape) in layers().items():
            if name.startswith(("Conv", "LayerNorm((4", "RMSNorm((4", "modules")):  # a norm's epsilon depends on the type
                with self.subTest(name):
                    self.check(model, shape, dtype=F32)

    def test_given_line(self):
        """A line of the user's, with an array, for a model that cannot be read."""

        class Graph(nn.Module):
            def __init__(self, matrix):
                super().__init__()
                self.matrix, self.first, self.second = matrix, nn.Linear(2, 6), nn.Linear(6, OUT)

            def forward(self, x):
                x = torch.stack([self.matrix @ row for row in torch.tanh(self.first(x))])  # row by row
                return self.second(x.mean(1))

        matrix = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0.3, 0, 0.7]], dtype=F64)
        triples = [[i, j, float(matrix[i, j])] for i in range(3) for j in range(3) if matrix[i, j]]
        model, x, y = Graph(matrix).double(), self.inputs((3, 2)), data()[1]
        given = dict(network="input 3x2; dense 6; tanh; propagate a; mean_tokens; dense 3", constants={"a": np.array(triples)})
        optimizer = OPTIMIZERS["adam"](model.parameters())
        self.train(model, optimizer, steps=4, recorded_data=(x, y), **given)
        self.set_tests = self.inputs((3, 2), F64, M)
        self.certify(model)
        attention = nn.Sequential(Position(4, 6), SelfAttention(6, 2), MeanTokens(), nn.Linear(6, OUT)).double()
        shutil.rmtree(self.run_dir)
        given = dict(network="input 4x6; position; attention 2; mean_tokens; dense 3")
        x, optimizer = self.inputs((4, 6)), OPTIMIZERS["adam"](attention.parameters())
        self.train(attention, optimizer, steps=4, recorded_data=(x, y), **given)
        self.set_tests = self.inputs((4, 6), F64, M)
        self.certify(attention)


class Crash(Case):
    def rows(self, name):
        """How many whole rows a file has, whatever its header says."""
        path = os.path.join(self.run_dir, name + ".npy")
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            return (os.path.getsize(path) - file.tell()) // (dtype.itemsize * int(np.prod(shape[1:])))

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
        F.cross_entropy(model(x[i]), y[i]).backward()
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
            # And the middle of a write of the weights, which come last: unless the kill came in the middle of a step itself.
            steps = {self.rows("learning_rates"), self.rows("batch_items") // BATCH, self.rows("batch_weights") // BATCH}
            if trial == 2 and steps == {self.rows("weights") - 1}:
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
                F.cross_entropy(model(x), y).backward()
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
            (r"'1.0' \(BatchNorm1d\).*couples", nn.BatchNorm1d(6)),
            (r"'1.0' \(Dropout\).*random", nn.Dropout(0.1)),
            (r"'1.0' \(RReLU\).*random", nn.RReLU()),
            ("hard_?shrink", nn.Hardshrink()),
            ("does not take the first rows.*cannot be multiplied", nn.Linear(5, 6)),
            ("batch", nn.LogSoftmax(0)),
            ("torch", nn.Flatten(0)),
        ):
            with self.subTest(str(layer)):
                self.refuse(words, around(layer))
        self.refuse(
            "no parameters",
            nn.Sequential(nn.Tanh()),
            optimizer=lambda m: torch.optim.SGD([torch.zeros(1)], lr=1),
            inputs=None,
        )
        self.refuse("float16|torch.half", network().half())
        self.refuse("outputs differ", network="input 5; dense 7; relu; dense 6 nobias; tanh; dense 3")
        tied = nn.Sequential(nn.Linear(IN, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, OUT)).double()
        tied[2].weight = tied[1].weight
        self.refuse("in two layers", tied, network="input 5; dense 6; dense 6; dense 6; dense 3")

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
            (
                "not the model's",
                lambda m: o.SGD([*m.parameters(), nn.Parameter(torch.zeros(1).double())], lr=1),
            ),
        ):
            with self.subTest(words):
                self.refuse(words, optimizer=make)
        if OLD_NADAM:
            for words, settings in (
                ("NAdam: foreach = .*foreach=True is the one", {}),
                ("NAdam: weight_decay = 0.1: .*adds the decay to the gradients", {"foreach": True, "weight_decay": 0.1}),
            ):
                self.refuse(words, optimizer=lambda m, s=settings: o.NAdam(m.parameters(), **s))
        frozen = network().requires_grad_(False)
        self.refuse("no parameter.*is trained", frozen)
        decoupled = lambda m: o.Adam([{"params": [p], "decoupled_weight_decay": bool(i)} for i, p in enumerate(m.parameters())])
        if "decoupled_weight_decay" in o.Adam([torch.zeros(1)]).defaults:
            self.refuse("its parameter groups have the rules", optimizer=decoupled)

    def test_losses_and_data(self):
        x, y = data()
        for words, loss in (
            ("no module and no function", 3),
            ("'delta=1' is not one of its options", "mean_squared delta=1"),
            ("'mse' is none", "mse"),
        ):
            with self.subTest(words):
                self.refuse(words, loss=loss)
        self.refuse("does not take the first rows of inputs, torch.int64", inputs=torch.ones(N, IN, dtype=torch.int64))
        self.refuse("24 inputs and 23 targets", targets=y[1:])
        self.refuse("from 0 to 2", targets=y + 1)
        self.refuse("NaN", inputs=x / 0)
        self.refuse("does not take", inputs=x[:, :4])
        self.refuse(
            "does not take", inputs=x[:, :4], network="input 5; dense 7; tanh; dense 6 nobias; tanh; dense 3"
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
                criterion = options.pop("criterion", F.cross_entropy)
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
            criterion=lambda f, t: 2 * F.cross_entropy(f, t),
        )
        attempt("0 optimizer steps", lambda r, o, s: r(rows))
        attempt("2 optimizer steps", stepped(lambda r, o, s: (o.step(), r(rows))))
        attempt("there are 24 rows", stepped(lambda r, o, s: r([0, 24])))
        attempt("one dimension", stepped(lambda r, o, s: r([])))
        attempt("one dimension", stepped(lambda r, o, s: r([0.5])))
        attempt("weights have shape", stepped(lambda r, o, s: r(rows, weights=[1.0])))
        attempt(
            "step 1: the optimizer is now.*weight_decay=0.8",
            stepped(lambda r, o, s: (r(rows), o.param_groups[0].update(weight_decay=0.8))),
        )
        attempt(
            "step 1: a weight or the learning rate is not finite",
            stepped(lambda r, o, s: (r(rows), o.param_groups[0].update(lr=float("inf")))),
        )

        attempt("not finite|multiplied by nan", lambda r, o, s: (o.step(), r(rows, gradient_scale=float("nan"))))

    def test_modes_and_statistics(self):
        model = (
            nn.Sequential(nn.Linear(IN, 6), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, OUT))
            .double()
            .eval()
        )
        x, y = data()
        for words, change in (
            ("step 0: module '1' .BatchNorm1d. is in training mode.*couples", lambda: model[1].train()),
            ("step 0: module '2' .Dropout. is in training mode", lambda: model[2].train()),
            ("step 0: the running statistics.*changed", lambda: model[1].running_var.mul_(2)),
        ):
            optimizer = torch.optim.SGD(model.eval().parameters(), lr=0.1)
            with self.subTest(words), self.assertRaisesRegex(RecordError, words):
                options = dict(loss="softmax_cross_entropy", optimizer=optimizer, inputs=x, targets=y)
                with Recorder(self.run_dir, model, **options) as record:
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    change()
                    record(range(N))
        line = "input 5; dense 6; tanh; dense 3"
        model.train()[2].eval()
        self.refuse("BatchNorm1d. is in training mode", model, network=line)

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
        self_attending = lambda **o: Own(lambda m, x: m.o(m.a(x, x, x)[0].mean(1)), a=attend(**o), o=nn.Linear(8, OUT))
        x, images = torch.randn(N, IN).double(), torch.randn(N, 2, 8, 8).double()
        dense = nn.Linear(IN, OUT)
        for words, inputs, model in (
            (r"'1' \(BatchNorm2d\).*couples", images, image(nn.BatchNorm2d(3))),
            ("couples", images, image(nn.BatchNorm2d(3, track_running_stats=False).eval())),
            ("dropout draws random", images, image(nn.Dropout2d(0.1))),
            ("dropout draws random", images[:, 0], self_attending(dropout=0.1)),
            ("dropout draws random", images[:, 0], nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))),
            ("random", x, Own(lambda m, x: F.dropout(m.o(x), 0.1, m.training), o=dense)),
            ("random", x, Own(lambda m, x: m.o(x + torch.randn_like(x)), o=dense)),
            ("data", x, Own(lambda m, x: m.o(x if x.sum() > 0 else -x), o=dense)),
            ("sort", x, Own(lambda m, x: m.o(x.sort(1)[0]), o=dense)),
            ("returns a dict", x, Own(lambda m, x: {"logits": m.o(x)}, o=dense)),
            ("returns a tensor of shape", x, Own(lambda m, x: m.o(x).sum(), o=dense)),
            ("batch", x, Own(lambda m, x: m.o(x - x.mean(0)), o=dense)),
            ("gradient", x, Own(lambda m, x: m.o(m.p(x).detach()), p=nn.Linear(IN, IN), o=dense)),
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
        (scale * F.cross_entropy(s.model(s.x[s.rows]), s.y[s.rows])).backward()

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
        for optimizer in ("sgd", "adamw"):
            for start in (5, 31):  # also where no gradient is computed again
                how = dict(complete=start, steps=40, optimizer=optimizer)
                self.refuse(f"step {start}.*zero_grad", other(start, zero=False), **how)
        self.refuse("step 1.*zero_grad", other(0, zero=False))
        self.refuse("step 6.*It is that times 0.5", other(6, scale=0.5), 6)
        self.refuse("step 0.*times 65536: .*GradScaler", other(0, scale=65536.0), dtype=F32)
        part = lambda s: nn.utils.clip_grad_norm_(parameters(s)[:2], 1e-3) and None
        self.refuse("step 5.*clipped otherwise than by one factor", changed(part), 5)
        values = lambda s: nn.utils.clip_grad_value_(parameters(s), 1e-3)
        self.refuse("step 5.*clipped number by number, at 0.001", changed(values), 5)
        self.refuse("step 5.*not that of loss", changed(lambda s: parameters(s)[0].grad.zero_()), 5)

        def closure(shift):
            def step(s):
                def again():
                    s.optimizer.zero_grad()
                    loss = F.cross_entropy(s.model(s.x[s.rows]), s.y[s.rows])
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
                (F.cross_entropy(s.model(s.x[rows]), s.y[rows]) / 3).backward()
            s.optimizer.step()
            s.record(s.rows)

        def logged(s):
            F.cross_entropy(s.model(s.x), s.y).backward()
            self.usual(s)

        def by_hand(s):
            parameters = list(s.model.parameters())
            loss = F.cross_entropy(s.model(s.x[s.rows]), s.y[s.rows])
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
                    F.mse_loss(model(x), y).backward()
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
            self.certify(self.loop(given=lambda s: (s.x, F.one_hot(s.y, OUT).to(kind))).model)

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
            ("returns a dict", Returns(lambda f: {"logits": f})),
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
            F.cross_entropy(self.model(self.x[rows]), self.y[rows]).backward()
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
        F.cross_entropy(case.model(x), y).backward()
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
                F.cross_entropy(self.model(data()[0]), data()[1]).backward()
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
                    F.cross_entropy(self.outputs(v, x[i : i + 1]), y[i : i + 1])
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
            x = F.conv2d(x, w[:18].reshape(3, 1, 3, 2), w[18:21], (2, 1), 1)
            x = F.avg_pool2d(torch.tanh(x), 2).flatten(1)
            return x @ w[21:48].reshape(OUT, 9).T + w[48:]

        # embedding 5 4; position; residual( layer_norm; attention 1 causal ); mean_tokens; dense
        def transformer(w, x):
            cut = list(torch.split(w, [20, 12, 4, 4, 48, 12, 16, 4, 12, 3]))
            x = F.one_hot(x, 5).to(w) @ cut[0].reshape(5, 4) + cut[1].reshape(3, 4)
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


class Shares:
    """by_example and decay by their definition, forward in time, of any optimizer with any groups: one state for each example
    and one, the last row, for the decay; Gauss-Legendre along each step."""

    def __init__(self, model, optimizer):
        self.model, self.kind, self.updates, self.states = model, type(optimizer).__name__, [], {}
        self.names = {p: name for name, p in model.named_parameters()}
        self.weights = [self.snap()]

    def snap(self):
        return {name: p.detach().double().clone() for p, name in self.names.items()}

    def gradients(self, items, terms):
        """terms: what each item adds to the objective, before the step."""
        live = [p for p in self.names if p.requires_grad]
        self.given = {p: torch.zeros(N + 1, p.numel(), dtype=F64) for p in live}
        for item, term in zip(items.tolist(), terms):
            for p, g in zip(live, torch.autograd.grad(term, live, retain_graph=True, allow_unused=True)):
                self.given[p][item] += 0 if g is None else g.detach().double().flatten()

    def step(self, groups, scale):
        """After the step; groups: the optimizer's, as they were."""
        with torch.no_grad():
            made = {p: self.update(p, group, scale * self.given[p]) for group in groups for p in group["params"] if p in self.given}
        self.weights.append(self.snap())
        self.updates.append({self.names[p]: update for p, update in made.items()})

    def update(self, p, group, g):
        state, rate, decay, w = self.states.setdefault(p, {}), float(group["lr"]), group["weight_decay"], p.detach().clone()
        w = self.weights[-1][self.names[p]].flatten()
        own = torch.zeros_like(g)
        own[-1] = decay * w
        if self.kind == "AdamW":
            own = -rate * own
        else:
            g, own = g + own, 0
        if self.kind == "SGD":
            if group["momentum"]:
                g = g if "m" not in state else group["momentum"] * state["m"] + g
                state["m"] = g
            return -rate * g
        (b1, b2), k = group["betas"], state.get("k", 0) + 1
        m, v = b1 * state.get("m", 0) + (1 - b1) * g, b2 * state.get("v", 0) + (1 - b2) * g.sum(0) ** 2
        state.update(m=m, v=v, k=k)
        return own - rate / (1 - b1**k) * m / ((v / (1 - b2**k)).sqrt() + group["eps"])

    def along(self, x, outputs, nodes=16):
        """(M, C, N + 1). outputs(model called with weights, x): (M, C)."""
        total = 0
        for start, end, update in zip(self.weights, self.weights[1:], self.updates):
            for t, weight in zip(*np.polynomial.legendre.leggauss(nodes)):
                w = {n: (v + (t + 1) / 2 * (end[n] - v)).requires_grad_(n in update) for n, v in start.items()}
                f = outputs(w, x)
                rows = [torch.autograd.grad(f[m, c], [w[n] for n in update], retain_graph=True, allow_unused=True)
                        for m in range(len(f)) for c in range(f.shape[1])]  # fmt: skip
                zero = lambda g, n: torch.zeros_like(w[n]).flatten() if g is None else g.flatten()
                phi = torch.stack([torch.cat([zero(g, n) for g, n in zip(row, update)]) for row in rows])
                total = total + weight / 2 * (phi @ torch.cat(list(update.values()), 1).T).reshape(*f.shape, -1)
        return total.numpy()


class Attention(nn.Module):
    """A transformer as in nanoGPT: attention by hand, outputs at every token, the head tied to the table."""

    def __init__(self, vocabulary=5, tokens=3, width=4):
        super().__init__()
        self.table, self.places = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.table.weight = self.head.weight
        self.register_buffer("mask", torch.ones(tokens, tokens).tril())
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        batch, length = x.shape
        h = self.table(x) + self.places(torch.arange(length))
        q, k, v = (t.view(batch, length, 2, -1).transpose(1, 2) for t in self.qkv(self.norm(h)).chunk(3, -1))
        scores = (q @ k.transpose(-2, -1) / 2**0.5).masked_fill(self.mask[:length, :length] == 0, -math.inf)
        return self.head(h + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(h.shape)))


class SetUps(Case):
    """What training scripts do, entry by entry against the definition."""

    def go(self, model, x, y, loss, term, optimizer, objective=None, steps=4, step=None, clip=None, schedule=None, **options):
        """loss: as given to the Recorder; objective(f, y): what is trained; term(f, y, batch): an example's part of it."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        model, objective = model.double(), objective or loss
        optimizer = optimizer(model)
        shares, schedule = Shares(model, optimizer), schedule and schedule(optimizer)
        generator = torch.Generator().manual_seed(3)
        parameters = [p for p in model.parameters() if p.requires_grad]
        with Recorder(self.run_dir, model, loss=loss, optimizer=optimizer, inputs=x, targets=y, **options) as record:
            for _ in range(steps):
                rows = torch.randperm(N, generator=generator)[:BATCH]
                shares.gradients(rows, [term(model(x[i : i + 1]), y[i : i + 1], y[rows]) for i in rows])
                groups = [dict(group) for group in optimizer.param_groups]
                if step:
                    scale = step(model, optimizer, objective, x, y, rows, record)
                else:
                    optimizer.zero_grad()
                    objective(model(x[rows]), y[rows]).backward()
                    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
                    scale = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
                    optimizer.step()
                    if schedule:
                        schedule.step()
                    record(rows)
                if scale:  # else no step was made
                    shares.step(groups, scale)
        self.set_tests = x[:M]
        result = self.decompose()
        names = {n: shares.names[p] for n, p in named(model)}
        outputs = lambda w, x: functional_call(model, {n: w[m] for n, m in names.items()}, (x,)).reshape(len(x), -1)
        expected = shares.along(x[:M], outputs)
        size = np.abs(expected).max()
        for name, found, wanted in (
            ("by_example", result["by_example"], expected[..., :N]),
            ("decay", result["decay"], expected[..., N]),
            ("unattributed", result["unattributed"], 0),
        ):
            error = np.abs(found - wanted).max() / size
            Case.worst["set-ups " + name, "float64"] = max(Case.worst.get(("set-ups " + name, "float64"), 0), error)
            self.assertLess(error, 1e-10, name)
        with open(os.path.join(self.run_dir, "run.txt")) as file:
            return file.read()

    mean = staticmethod(lambda f, y, batch: F.cross_entropy(f, y) / len(batch))

    def plain(self, optimizer, model=None, **options):
        return self.go(model or network(nn.Tanh), *data(), F.cross_entropy, self.mean, optimizer, **options)

    def test_groups(self):
        o, s = torch.optim, torch.optim.lr_scheduler

        def decayed(m):
            sides = [p for p in m.parameters() if p.ndim > 1], [p for p in m.parameters() if p.ndim < 2]
            return [{"params": sides[0], "weight_decay": 0.1}, {"params": sides[1], "weight_decay": 0.0}]

        said = self.plain(lambda m: o.AdamW(decayed(m), lr=0.02, betas=(0.9, 0.95)), clip=0.3)
        self.assertIn("group     1,4 weight_decay=0.0\n", said)
        by_layer = lambda m: [{"params": [p], "lr": 0.1 / (i + 1), "momentum": 0.5 * (i % 2)} for i, p in enumerate(m.parameters())]
        self.plain(lambda m: o.SGD(by_layer(m), lr=0.1))
        two = lambda m: [{"params": m[0].parameters()}, {"params": [*m[2].parameters(), *m[3].parameters()], "betas": (0.5, 0.9)}]
        rates = lambda optimizer: s.LambdaLR(optimizer, [lambda k: 0.5**k, lambda k: 1 / (k + 1)])
        self.plain(lambda m: o.Adam(two(m), lr=0.02), schedule=rates)

    def test_momenta_that_move(self):
        s, adam = torch.optim.lr_scheduler, lambda m: torch.optim.AdamW(m.parameters(), lr=0.02)
        momentum = lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        one = lambda optimizer: s.OneCycleLR(optimizer, 0.05, total_steps=8)
        cyclic = lambda optimizer: s.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2)
        warm = lambda optimizer: types.SimpleNamespace(step=lambda: optimizer.param_groups[0].update(momentum=0.95))
        for optimizer, schedule in ((adam, one), (momentum, one), (momentum, cyclic), (momentum, warm)):
            self.plain(optimizer, schedule=schedule, steps=5)
            moved = np.load(os.path.join(self.run_dir, "momenta.npy"))
            self.assertEqual((len(moved), moved[0] != moved[1]), (5, True))
        by_group = lambda m: [{"params": [p], "momentum": 0.5 + 0.1 * i} for i, p in enumerate(m.parameters())]
        with self.assertRaisesRegex(RecordError, "step 1: a schedule moves the momentum of groups"):
            self.plain(lambda m: torch.optim.SGD(by_group(m), lr=0.1), schedule=warm)

    def test_frozen(self):
        sgd = lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        model = network(nn.Tanh)
        model[0].requires_grad_(False)
        self.assertIn("group     0-1 frozen\n", self.plain(sgd, model))
        model[2].requires_grad_(False)
        model.zero_grad(set_to_none=True)  # else it is decayed
        all_of_them = lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1)
        self.assertIn("group     0-2 frozen\n", self.plain(all_of_them, model))
        head = lambda m: torch.optim.SGD(m[3].parameters(), lr=0.1)
        self.assertIn("group     0-2 frozen\n", self.plain(head, network(nn.Tanh)))

        class Body(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.Linear(IN, 6).requires_grad_(False), nn.Linear(6, OUT)

            def forward(self, x):
                with torch.no_grad():
                    x = torch.tanh(self.body(x))
                return self.head(x)

        self.assertIn("frozen", self.plain(sgd, Body()))
        with self.assertRaisesRegex(RecordError, "step 1: parameter 'body.weight' is not trained"):
            shutil.rmtree(self.run_dir)
            model, (x, y) = Body().double(), data()
            with Recorder(self.run_dir, model, loss=F.cross_entropy, optimizer=sgd(model), inputs=x, targets=y) as record:
                for _ in range(2):
                    F.cross_entropy(model(x), y).backward()
                    record.optimizer.step()
                    record(range(N))
                    record.optimizer.zero_grad()
                    with torch.no_grad():
                        model.body.weight.mul_(0.9)

    def test_outputs_at_every_token(self):
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randint(5, (N, 3), generator=generator), torch.randint(5, (N, 3), generator=generator)
        y[::3, 0] = -1
        term = lambda f, y, batch: F.cross_entropy(f[0], y[0], ignore_index=-1, reduction="sum") / int((batch != -1).sum())
        adamw = lambda m: torch.optim.AdamW(m.parameters(), lr=0.02, weight_decay=0.1)
        flat = lambda f, y: F.cross_entropy(f.view(-1, 5), y.view(-1), ignore_index=-1)
        criterion = nn.CrossEntropyLoss(ignore_index=-1)
        said = self.go(Attention(), x, y, flat, term, adamw, clip=0.5)
        self.assertIn("loss      recorded", said)
        self.assertIn("tied=", said)
        self.go(Attention(), x, y, criterion, term, adamw, objective=lambda f, y: criterion(f.transpose(1, 2), y))

    def test_losses_of_ones_own(self):
        x, y = data()

        def focal(f, y):
            loss = F.cross_entropy(f, y, reduction="none")
            return ((1 - torch.exp(-loss)) ** 2 * loss).mean()

        adam = lambda m: torch.optim.Adam(m.parameters(), lr=0.02)
        self.go(network(nn.Tanh), x, y, focal, lambda f, y, batch: focal(f, y) / len(batch), adam, clip=0.1)
        both = lambda f, y: F.cross_entropy(f[:, :2], y % 2) + 0.3 * F.smooth_l1_loss(f[:, 2], y.double())
        self.go(network(nn.Tanh), x, y, both, lambda f, y, batch: both(f, y) / len(batch), adam)
        smooth = functools.partial(F.cross_entropy, label_smoothing=0.1)
        said = self.go(network(nn.Tanh), x, y, smooth, lambda f, y, batch: smooth(f, y) / len(batch), adam)
        self.assertIn("loss      softmax_cross_entropy label_smoothing=0.1\n", said)
        penalty = lambda f, y: F.cross_entropy(f, y) + 0.1 * f.square().mean()  # of outputs; that of weights is none of f
        self.go(network(nn.Tanh), x, y, penalty, lambda f, y, batch: penalty(f, y) / len(batch), adam)
        model = network(nn.Tanh)
        weights = lambda f, y: F.cross_entropy(f, y) + 0.1 * sum(p.square().sum() for p in model.parameters())
        with self.assertRaisesRegex(RecordError, "step 0.*a penalty on weights"):
            self.go(model, x, y, weights, lambda f, y, batch: weights(f, y) / len(batch), adam)

    def test_accumulation(self):
        sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)

        def parts(divided, together, clip=None):
            def step(model, optimizer, objective, x, y, rows, record):
                optimizer.zero_grad()
                for part in rows.split(2):
                    (objective(model(x[part]), y[part]) / (3 if divided else 1)).backward()
                    if not together and part is not rows.split(2)[-1] and not torch.equal(part, rows[-2:]):
                        record(part)
                norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
                optimizer.step()
                record(rows if together else rows[-2:])
                return (1 if divided else 3) * (min(1.0, clip / (float(norm) + 1e-6)) if clip else 1)

            return step

        for divided, together in ((True, True), (True, False), (False, False)):
            for clip in (None, 0.2):
                self.plain(sgd, step=parts(divided, together, clip))
        focal = lambda f, y: (F.cross_entropy(f, y, reduction="none") ** 2).mean()
        term = lambda f, y, batch: focal(f, y) / len(batch)
        for divided in (True, False):
            self.go(network(nn.Tanh), *data(), focal, term, sgd, step=parts(divided, False, 0.2))

    def test_gradient_scaler(self):
        if not NEW_TORCH:
            return print(f"not tried: a GradScaler: that of PyTorch {torch.__version__} is for CUDA alone")
        for fused, clip, loss in ((False, None, F.cross_entropy), (False, 0.2, F.cross_entropy), (True, None, F.cross_entropy),
                                  (False, 0.2, lambda f, y: F.cross_entropy(f, y))):  # fmt: skip
            scaler, calls = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2), []

            def step(model, optimizer, objective, x, y, rows, record):
                calls.append(0)
                optimizer.zero_grad()
                value = scaler.scale(objective(model(x[rows]), y[rows]))
                (value * (math.inf if len(calls) == 3 else 1)).backward()  # one step is skipped
                scale = 1.0
                if clip:
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
                    scale = min(1.0, clip / (float(norm) + 1e-6))
                scaler.step(optimizer)
                scaler.update()
                record(rows)
                return 0 if len(calls) == 3 else scale

            adam = lambda m: torch.optim.Adam(m.parameters(), lr=0.02, fused=fused)
            with self.subTest(fused=fused, clip=clip):
                self.go(network(nn.Tanh), *data(), loss, self.mean, adam, step=step, steps=6)
                self.assertEqual(len(np.load(os.path.join(self.run_dir, "learning_rates.npy"))), 5)

    def test_shapes_of_outputs(self):
        class Squeezed(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = network(nn.Tanh, outputs=1)
                self.register_buffer("mean", torch.linspace(-1, 1, IN))

            def forward(self, x):
                return self.net((x - self.mean) / 0.7).squeeze(-1)

        sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1)
        x, y = data("squared", outputs=1)
        self.go(Squeezed(), x, y[:, 0], nn.MSELoss(), lambda f, y, batch: F.mse_loss(f, y) / len(batch), sgd)
        images = torch.randn(N, 1, 4, 4, dtype=F64)
        coder = nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.Tanh(), nn.ConvTranspose2d(2, 1, 2, 2))
        self.go(coder, images, images.clone(), nn.MSELoss(), lambda f, y, batch: F.mse_loss(f, y) / len(batch), sgd)
        labels = torch.randint(2, (N, 4, 4))
        mask = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.SiLU(), nn.Conv2d(2, 2, 1))
        self.go(mask, images, labels, nn.CrossEntropyLoss(), lambda f, y, batch: F.cross_entropy(f, y) / len(batch), sgd)

    def test_loaders(self):
        x, y = data()
        data_set = torch.utils.data.TensorDataset(x, y)
        subset, sampler = torch.utils.data.Subset(data_set, [3, 5, 7, 9, 11, 12]), torch.utils.data.WeightedRandomSampler
        loader = lambda *arguments, **options: torch.utils.data.DataLoader(*arguments, **options)
        many = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(data_set), 5, drop_last=True)
        for name, loader, inputs, targets in (
            ("workers", loader(Indexed(data_set), 7, shuffle=True, num_workers=2), x, y),
            ("with replacement", loader(Indexed(data_set), 5, sampler=sampler(torch.rand(N), N)), x, y),
            ("sampler of batches", loader(Indexed(data_set), batch_sampler=many), x, y),
            ("subset", loader(Indexed(subset), 4, shuffle=True), x[subset.indices], y[subset.indices]),
        ):
            with self.subTest(name):
                shutil.rmtree(self.run_dir, ignore_errors=True)
                model = network(nn.Tanh)
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
                with Recorder(
                    self.run_dir, model, loss=F.cross_entropy, optimizer=optimizer, inputs=inputs, targets=targets, check=99
                ) as record:
                    for indices, a, b in loader:
                        optimizer.zero_grad()
                        F.cross_entropy(model(a), b).backward()
                        optimizer.step()
                        record(indices)
                self.certify(model)


def named(model):
    """Every name of every parameter, those that are shared as well."""
    for prefix, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                yield prefix + ("." if prefix else "") + name, p


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
