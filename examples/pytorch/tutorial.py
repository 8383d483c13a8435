"""Train in PyTorch, record, decompose, look: why does the network call this digit a 4?

    python3 tutorial.py [--program PATH] [--out FOLDER] [--data FOLDER] [--steps 200]

Trains 64-32-32-10 on handwritten digits with AdamW, clipped gradients and a cosine schedule, in float32, records
the run with pathkernel_record.py, and calls pathkernel-decompose, which is the program of --program, of
$PATHKERNEL_DECOMPOSE, on the PATH, or in build/. Checks the identity; draws with matplotlib where there is one.
"""

import argparse
import os
import shutil
import subprocess
import sys

import numpy as np
import torch
from torch import nn

from pathkernel_record import Indexed, Recorder

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TRAIN, SHOWN = 1437, 10


def digits(folder):
    images = np.fromfile(os.path.join(folder, "digits-images-idx3-ubyte"), np.uint8)[16:].reshape(-1, 64)
    labels = np.fromfile(os.path.join(folder, "digits-labels-idx1-ubyte"), np.uint8)[8:]
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


def train(x, y, run, steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    criterion = nn.CrossEntropyLoss()
    # Indexed makes each batch start with the rows that it is made of: all that recording adds to the data side.
    loader = torch.utils.data.DataLoader(
        Indexed(torch.utils.data.TensorDataset(x, y)), batch_size=64, shuffle=True
    )
    with Recorder(run, model, loss=criterion, optimizer=optimizer, inputs=x, targets=y) as record:
        while record.steps < steps:
            for indices, inputs, labels in loader:
                optimizer.zero_grad()
                criterion(model(inputs), labels).backward()
                record.clip(1.0)
                optimizer.step()
                scheduler.step()
                record(indices)
                if record.steps == steps:
                    break
    return model


def find_program(given):
    for path in (
        given,
        os.environ.get("PATHKERNEL_DECOMPOSE"),
        shutil.which("pathkernel-decompose"),
        os.path.join(ROOT, "build", "pathkernel-decompose"),
    ):
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)
        if path and path in (given, os.environ.get("PATHKERNEL_DECOMPOSE")):
            sys.exit(f"{path} is no program")
    sys.exit(
        "pathkernel-decompose is not found: build it (cmake -B build && cmake --build build), or --program PATH"
    )


def draw(path, tests, labels, x, y, result):
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(SHOWN, 9, figsize=(9, 1.25 * SHOWN))
    for m in range(SHOWN):
        predicted = result["final"][m].argmax()
        row = result["by_example"][m, predicted]
        order = np.argsort(row)
        shown = [(tests[m], f"{labels[m]}, seen as {predicted}")] + [
            (x[i], f"{y[i]}: {row[i]:+.2f}") for i in [*order[:-5:-1], *order[:4]]
        ]
        for axis, (image, title) in zip(axes[m], shown):
            axis.imshow(image.reshape(8, 8), cmap="gray_r")
            axis.set_title(title, fontsize=7)
            axis.axis("off")
    figure.suptitle("test digit | four examples for | four against")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print("picture:", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program")
    parser.add_argument("--out", default="pathkernel-out/pytorch")
    parser.add_argument("--data", default=os.path.join(ROOT, "examples", "data"))
    parser.add_argument("--steps", type=int, default=200)
    settings = parser.parse_args()
    program, run, out = (
        find_program(settings.program),
        os.path.join(settings.out, "run"),
        os.path.join(settings.out, "result"),
    )

    x, y = digits(settings.data)
    tests, labels, x, y = x[TRAIN : TRAIN + 100], y[TRAIN : TRAIN + 100], x[:TRAIN], y[:TRAIN]
    os.makedirs(settings.out, exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    model = train(x, y, run, settings.steps)
    with torch.no_grad():
        outputs = model(tests).double().numpy()
    print(
        f"{100 * (outputs.argmax(1) == labels.numpy()).mean():.0f} of 100 test digits are right; the recorded run:"
    )
    with open(os.path.join(run, "run.txt"), encoding="ascii") as file:
        print(file.read())

    inputs = os.path.join(settings.out, "tests.npy")
    np.save(inputs, tests.numpy())
    # 0: closed to the tolerance. 1: computed, but the closure is larger. 2: something is wrong with the run.
    status = subprocess.run(
        [
            program,
            run,
            "--inputs",
            inputs,
            "--out",
            out,
            "--keep",
            "train",
            "--keep",
            "layer",
            "--keep",
            "step",
        ]
    ).returncode
    if status:
        return status

    result = {
        name[:-4]: np.load(os.path.join(out, name)) for name in os.listdir(out) if name.endswith(".npy")
    }
    parts = sum(result[name] for name in ("initial", "decay", "unattributed", "closure"))
    identity = max(
        np.abs(parts + result["by_" + axis].sum(2) - result["final"]).max()
        for axis in ("example", "step", "layer")
    )
    # The program evaluates the float32 weights in float64: it differs from PyTorch by PyTorch's own rounding.
    agreement = np.abs(result["final"] - outputs).max()
    print(f"\nsum of the parts - final  {identity:.1e}\nfinal - PyTorch's output  {agreement:.1e}")
    for name in ("closure", "unattributed", "decay"):
        print(f"largest {name:17s} {np.abs(result[name]).max():.1e}")
    draw(
        os.path.join(settings.out, "digits.png"), tests.numpy(), labels.numpy(), x.numpy(), y.numpy(), result
    )
    return 0 if identity < 1e-11 and agreement < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
