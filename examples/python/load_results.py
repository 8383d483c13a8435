"""What pathkernel-decompose wrote, in NumPy, and simple questions to it.

    python3 load_results.py RUN OUT        a run directory, and the --out folder of its decomposition

Every array is float64: M inputs, C outputs, N training examples, S steps.
"""

import os
import sys

import numpy as np


def load(folder):
    """{"initial": (M, C), "by_example": (M, C, N), ...}: every result in the folder, mapped, not read."""
    names = sorted(name[:-4] for name in os.listdir(folder) if name.endswith(".npy"))
    return {name: np.load(os.path.join(folder, name + ".npy"), mmap_mode="r") for name in names}


def manifest(run):
    """The network, loss and optimizer lines of a run."""
    with open(os.path.join(run, "run.txt"), encoding="utf-8") as file:
        lines = [line.split("#")[0].split(None, 1) for line in file]
    return {words[0]: words[1].strip() for words in lines if len(words) == 2}


def main(run, out):
    result = load(out)
    labels = np.load(os.path.join(run, "train_targets.npy"))
    final = result["final"]
    print(manifest(run)["network"], "|", ", ".join(f"{name} {array.shape}" for name, array in result.items()))

    # The identity, and its certificate: the closure is what quadrature and rounding left over.
    data = next(result[k].sum(axis=2) for k in ("by_example", "by_step", "by_layer") if k in result)
    parts = {"initial": result["initial"], "data": data}
    parts.update({name: result[name] for name in ("decay", "unattributed", "closure")})
    error = np.abs(sum(parts.values()) - final).max()
    print(f"sum of the parts - final: {error:.1e}; closure: {np.abs(result['closure']).max():.1e}")

    # How much of each decision came from where, on average?
    decided = final.argmax(axis=1)
    for name, part in parts.items():
        print(f"  {name:12s} {part[np.arange(len(final)), decided].mean():+.6f} of the output that decides")

    if "by_example" in result:
        # The first input: who spoke for its class, who against, and how many examples are half of it all?
        row = result["by_example"][0, decided[0]]
        order = np.argsort(-np.abs(row))
        half = 1 + int(np.searchsorted(np.cumsum(np.abs(row[order])), np.abs(row).sum() / 2))
        print(
            f"input 0 is decided as {decided[0]}; {half} of {len(row)} examples are half of what moved its output:"
        )
        for i in order[:5]:
            print(f"  example {i:5d}, target {labels[i]}: {row[i]:+.4f}")
        # The classes' contributions to it.
        if labels.ndim == 1 and labels.dtype == np.int64:
            classes = np.bincount(labels, row, minlength=final.shape[1])
            print("  by class:", " ".join(f"{k}:{value:+.3f}" for k, value in enumerate(classes)))
    if "by_step" in result:
        share = np.abs(result["by_step"]).sum(axis=(0, 1))
        half = np.searchsorted(share.cumsum(), share.sum() / 2)
        print(f"half of all contributions were made by step {half} of {len(share)}")
    if "by_layer" in result:
        share = np.abs(result["by_layer"]).sum(axis=(0, 1))
        print("share of the layers:", " ".join(f"{value:.0%}" for value in share / share.sum()))
    return 0 if error <= 1e-12 * max(1, np.abs(final).max()) else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
