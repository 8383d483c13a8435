"""examples/pytorch/pathkernel_graph.py and the program: the line that is read from a model's graph computes what the model does.

    PATHKERNEL_DECOMPOSE=build/pathkernel-decompose python3 tests/python/test_graph.py

Each model is read, and a run of one step that changes nothing is written with its weights; `initial.npy`, which the program
computes from the line alone, must be the model's outputs. Needs torch >= 1.13 and NumPy.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "examples", "pytorch"))
from pathkernel_graph import Unsupported, read_network  # noqa: E402

NEW_TORCH = int(torch.__version__.split(".")[0]) >= 2
PROGRAM = os.environ.get("PATHKERNEL_DECOMPOSE") or shutil.which("pathkernel-decompose")
torch.set_num_threads(1)


def model(forward, **parts):
    """A module with these parts and this forward(self, x)."""
    torch.manual_seed(0)
    made = nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    made.forward = lambda x: forward(made, x)
    return made.double()


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) / 2)


def rows(*shape):
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(length, count=11):
    return torch.randint(0, count, (5, length), generator=torch.Generator().manual_seed(1))


def heads_of(s, x, causal):
    """Attention of two heads written by hand, as in minGPT."""
    B, T, C = x.size()
    q, k, v = s.qkv(x).split(C, dim=2)
    q, k, v = [t.view(B, T, 2, C // 2).transpose(1, 2) for t in (q, k, v)]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
    if causal:
        scores = scores.masked_fill(torch.tril(torch.ones(T, T)).view(1, 1, T, T) == 0, float("-inf"))
    return s.out((torch.softmax(scores, -1) @ v).transpose(1, 2).contiguous().view(B, T, C))


def gpt(s, i):
    x = s.tokens(i) + s.places(torch.arange(i.size(1)))
    x = x + heads_of(s, s.n1(x), True)
    x = x + s.down(F.gelu(s.up(s.n2(x))))
    return F.linear(x, s.tokens.weight)[:, -1]


def einsum_transformer(s, i):
    """In the style of interpretability work: no layers, only tensors."""
    x = torch.einsum("dbp->bpd", s.E[:, i]) + s.pos[: i.shape[-1]]
    q, k, v = (torch.einsum("ihd,bpd->biph", w, x) for w in (s.Q, s.K, s.V))
    scores = torch.einsum("biph,biqh->biqp", k, q)
    mask = torch.tril(torch.ones(3, 3, dtype=x.dtype))
    scores = torch.softmax((scores * mask - 1e10 * (1 - mask)) / 2, -1)
    z = torch.einsum("biph,biqp->biqh", v, scores).permute(0, 2, 1, 3).reshape(i.shape[0], 3, -1)
    x = x + z @ s.O.T
    return ((x + F.relu(x @ s.i.T + s.b) @ s.o.T) @ s.U)[:, -1]


def vit(s, x):
    x = s.patch(x).flatten(2).transpose(1, 2)
    x = torch.cat([s.cls.expand(x.size(0), -1, -1), x], 1) + s.pos
    x = x + heads_of(s, s.n1(x), False)
    return s.head(x[:, 0])


def unet(s, x):
    x = (x - 0.3) / 0.5
    h = F.relu(s.a(x))
    y = F.interpolate(F.relu(s.b(F.max_pool2d(h, 2))), scale_factor=2)
    return s.c(torch.cat([h, y], 1)).flatten(1)


def recurrent(s, x):
    h = torch.zeros(x.size(0), 6, dtype=x.dtype)
    for t in range(x.size(1)):
        h = torch.tanh(s.i(x[:, t]) + s.h(h))
    return s.o(h)


def rms(s, x):
    return s.o(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * s.g)


LINEAR = nn.Linear
MODELS = {
    "residual": (lambda: model(lambda s, x: s.b(F.relu(s.a(x)) + x), a=LINEAR(8, 8), b=LINEAR(8, 3)), rows(8)),
    "gate": (
        lambda: model(
            lambda s, x: s.c(F.silu(s.a(x)) * s.b(x) * s.g + 1).squeeze(-1),
            a=LINEAR(8, 6),
            b=LINEAR(8, 6, bias=False),
            c=LINEAR(6, 1),
            g=parameter(),
        ),
        rows(8),
    ),
    "autoencoder with tied weights": (
        lambda: model(lambda s, x: F.linear(F.relu(s.e(x)), s.e.weight.t(), s.b), e=LINEAR(8, 4), b=parameter(8)),
        rows(8),
    ),
    "bilinear": (lambda: model(lambda s, x: torch.einsum("bi,oij,bj->bo", x, s.w, x), w=parameter(3, 8, 8)), rows(8)),
    "mixer": (
        lambda: model(
            lambda s, x: s.o((x + s.c(x.transpose(1, 2)).transpose(1, 2)).mean(1)), c=LINEAR(6, 6), o=LINEAR(8, 3)
        ),
        rows(6, 8),
    ),
    "recurrent": (lambda: model(recurrent, i=LINEAR(5, 6), h=LINEAR(6, 6), o=LINEAR(6, 2)), rows(4, 5)),
    "LSTM": (lambda: model(lambda s, x: s.o(s.a(x)[0][:, -1]), a=nn.LSTM(5, 4, batch_first=True), o=LINEAR(4, 2)), rows(3, 5)),
    "RMS norm by hand": (lambda: model(rms, g=parameter(8), o=LINEAR(8, 3)), rows(8)),
    "gpt": (
        lambda: model(
            gpt,
            tokens=nn.Embedding(11, 8),
            places=nn.Embedding(6, 8),
            n1=nn.LayerNorm(8),
            qkv=LINEAR(8, 24),
            out=LINEAR(8, 8),
            n2=nn.LayerNorm(8),
            up=LINEAR(8, 16),
            down=LINEAR(16, 8),
        ),
        tokens(6),
    ),
    "einsum transformer": (
        lambda: model(
            einsum_transformer,
            E=parameter(8, 11),
            pos=parameter(3, 8),
            Q=parameter(2, 4, 8),
            K=parameter(2, 4, 8),
            V=parameter(2, 4, 8),
            O=parameter(8, 8),
            i=parameter(12, 8),
            b=parameter(12),
            o=parameter(8, 12),
            U=parameter(8, 11),
        ),
        tokens(3),
    ),
    "vit": (
        lambda: model(
            vit,
            patch=nn.Conv2d(1, 8, 2, 2),
            cls=parameter(1, 1, 8),
            pos=parameter(1, 10, 8),
            n1=nn.LayerNorm(8),
            qkv=LINEAR(8, 24),
            out=LINEAR(8, 8),
            head=LINEAR(8, 3),
        ),
        rows(1, 6, 6),
    ),
    "u-net": (
        lambda: model(unet, a=nn.Conv2d(1, 3, 3, padding=1), b=nn.Conv2d(3, 3, 3, padding=1), c=nn.Conv2d(6, 2, 1)),
        rows(1, 4, 4),
    ),
    "encoder layer": (
        lambda: model(
            lambda s, x: s.o(s.l(x).mean(1)),
            l=nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True),
            o=LINEAR(8, 3),
        ),
        rows(4, 8),
    ),
    "norms of images": (
        lambda: model(
            lambda s, x: s.l(s.m(s.n(s.c(x))).flatten(1)),
            c=nn.Conv2d(3, 4, 3),
            n=nn.GroupNorm(2, 4),
            m=nn.AdaptiveAvgPool2d(1),
            l=LINEAR(4, 2),
        ),
        rows(3, 5, 5),
    ),
    "batch norm in eval mode": (
        lambda: model(
            lambda s, x: s.l(s.p(s.n(s.c(x)).flatten(1))),
            c=nn.Conv1d(3, 4, 3),
            n=nn.BatchNorm1d(4),
            p=nn.PReLU(),
            l=LINEAR(12, 2),
        ),
        rows(3, 5),
    ),
    "outputs at every token": (lambda: model(lambda s, i: s.h(s.t(i)), t=nn.Embedding(11, 4), h=LINEAR(4, 11)), tokens(6)),
}
def no_gradient(s, x):
    with torch.no_grad():
        scale = s.a(x)
    return s.a(x) * scale


REFUSED = {
    "a constant of the batch's size": (lambda: model(lambda s, x: s.a(x) + x.size(0) * 0.01, a=LINEAR(8, 2)), rows(8), ""),
    "a factor that is computed": (
        lambda: model(lambda s, x: s.a(F.layer_norm(x, (8,), s.g, s.b * 3)), a=LINEAR(8, 2), g=parameter(8), b=parameter(8)),
        rows(8),
        "no parameter",
    ),
    "a gradient that is cut off": (lambda: model(lambda s, x: s.a(x) * s.a(x).detach(), a=LINEAR(8, 2)), rows(8), ""),
    "a part without gradients": (lambda: model(no_gradient, a=LINEAR(8, 2)), rows(8), ""),
    "whole numbers": (lambda: model(lambda s, x: s.a(x - x.long()), a=LINEAR(8, 2)), rows(8), ""),
    "the batch as an axis of images": (
        lambda: model(lambda s, x: s.a(F.max_pool2d(x[None, None], (1, 2))[0, 0]), a=LINEAR(4, 2)),
        rows(8),
        "",
    ),
    "a choice by the data": (
        lambda: model(lambda s, x: s.a(torch.where(x > 0, x, s.b)), a=LINEAR(8, 2), b=parameter(8)),
        rows(8),
        "gt",
    ),
    "over the batch": (lambda: model(lambda s, x: s.a(x - x.mean(0)), a=LINEAR(8, 2)), rows(8), "batch"),
    "a parameter without use": (lambda: model(lambda s, x: s.a(x), a=LINEAR(8, 2), b=parameter(8)), rows(8), "b"),
}


class Graph(unittest.TestCase):
    def outputs(self, network, x, count):
        weights = torch.cat([p.detach().reshape(-1) for p in network.parameters]).double().numpy()
        with tempfile.TemporaryDirectory() as folder:
            arrays = {"constant_" + name: array for name, array in network.constants.items()}
            arrays.update(
                weights=np.stack([weights, weights]),
                learning_rates=np.zeros(1),
                batch_offsets=np.array([0, 1]),
                batch_items=np.array([0]),
                train_inputs=x.numpy()[:1],
                train_targets=np.zeros((1, count)),
            )
            for name, array in arrays.items():
                np.save(os.path.join(folder, name + ".npy"), array)
            np.save(os.path.join(folder, "x.npy"), x.numpy())
            with open(os.path.join(folder, "run.txt"), "w") as file:
                file.write(f"pathkernel-run 1\nnetwork {network.line}\nloss squared\noptimizer sgd\n")
            inputs, out = os.path.join(folder, "x.npy"), os.path.join(folder, "out")
            done = subprocess.run([PROGRAM, folder, "--inputs", inputs, "--out", out], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, network.line + "\n" + done.stderr)
            return np.load(os.path.join(out, "initial.npy"))

    def test_models(self):
        for name, (make, x) in MODELS.items():
            if name == "LSTM" and not NEW_TORCH:
                print(f"not tried: {name}: PyTorch {torch.__version__} hides its weights from functional_call")
                continue
            with self.subTest(name):
                made = make()
                network = read_network(made.eval(), x)
                with torch.no_grad():
                    wanted = made.eval()(x).reshape(len(x), -1).numpy()
                found = self.outputs(network, x, wanted.shape[1])
                self.assertLess(np.abs(found - wanted).max(), 1e-13 * np.abs(wanted).max(), network.line)

    def test_refused(self):
        for name, (make, x, words) in REFUSED.items():
            with self.subTest(name):
                with self.assertRaises(Unsupported) as caught:
                    read_network(make(), x)
                self.assertIn(words, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
