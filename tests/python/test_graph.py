"""examples/pytorch/pathkernel_graph.py and the program: the line that is read from a model's graph computes what the model does.

    PATHKERNEL_DECOMPOSE=build/pathkernel-decompose python3 tests/python/test_graph.py

Each model is read, and a run of one step of gradient descent on one example is written with its weights, as PyTorch computes
them. `initial.npy` and `final.npy`, which the program computes from the line alone, must be the model's outputs before and
after it, and nothing of the step may be unattributed: the line's gradient is PyTorch's. Needs torch >= 1.13 and NumPy.
"""

import math
import os
import random
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


def copies(module, count):
    return nn.ModuleList([module() for _ in range(count)])


def into_parts(s, x):
    """A recurrent network that writes its states into a tensor."""
    out, h = torch.zeros(x.size(0), x.size(1), 4, dtype=x.dtype), x.new_zeros(x.size(0), 4)
    for t in range(x.size(1)):
        h = torch.tanh(s.i(x[:, t]) + s.h(h))
        out[:, t] = h
    return s.o(out.flatten(1))


def layer_norm(s, x):
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return s.o(s.a * (x - mean) / (std + s.epsilon) + s.b).flatten(1)


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def llama(s, i, complex_numbers):
    """Root-mean-square norms, rotary positions, one key for two queries, SwiGLU."""
    rows, count = i.shape
    norm = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * s.n
    x = s.t(i)
    q, k, v = (part(norm(x)).view(rows, count, -1, 4) for part in (s.q, s.k, s.v))
    angles = torch.outer(torch.arange(count, dtype=x.dtype), 10.0 ** -torch.arange(2, dtype=x.dtype))
    if complex_numbers:
        turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        turn = lambda t: torch.view_as_real(torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2)) * turns).flatten(3)
    else:
        both = torch.cat([angles, angles], -1)[None, :, None]
        turn = lambda t: rotated(t, both.cos(), both.sin())
    q, k = turn(q), turn(k)
    k = torch.repeat_interleave(k, 2, dim=2)
    v = v[:, :, :, None, :].expand(rows, count, 1, 2, 4).reshape(rows, count, 2, 4)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = torch.triu(torch.full((count, count), float("-inf"), dtype=x.dtype), diagonal=1)
    x = x + s.o((F.softmax(q @ k.transpose(2, 3) / 2 + mask, -1) @ v).transpose(1, 2).reshape(rows, count, -1))
    return s.u(x + s.w2(F.silu(s.w1(norm(x))) * s.w3(norm(x))))


def make_llama(complex_numbers):
    linear = lambda a, b: nn.Linear(a, b, bias=False)
    return model(
        lambda s, i: llama(s, i, complex_numbers),
        t=nn.Embedding(11, 8),
        n=parameter(8),
        q=linear(8, 8),
        k=linear(8, 4),
        v=linear(8, 4),
        o=linear(8, 8),
        w1=linear(8, 12),
        w2=linear(12, 8),
        w3=linear(8, 12),
        u=linear(8, 11),
    )


def swin(s, x):
    """Attention in windows of 2x2, with a table of relative positions."""
    C, near = x.shape[-1], torch.tensor([[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
    x = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
    windows = x.view(-1, 2, 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, C)
    q, k, v = s.qkv(windows).reshape(-1, 4, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) + s.table[near.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
    y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 2, 2, 2, 2, C)
    return s.o(y.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, 4, C).flatten(1))


def padded_encoder(s, i):
    mask = i == 0
    x = s.l(s.e(i), src_key_padding_mask=mask).masked_fill(mask.unsqueeze(-1), 0.0)
    return s.o(x.sum(1) / (~mask).sum(1, keepdim=True))


def splines(x, grid):
    """B-splines of second order, as efficient-kan computes them."""
    x = x.unsqueeze(-1)
    b = ((x >= grid[:-1]) & (x < grid[1:])).to(x.dtype)
    for k in (1, 2):
        up = (x - grid[: -(k + 1)]) / (grid[k:-1] - grid[: -(k + 1)])
        b = up * b[..., :-1] + (grid[k + 1 :] - x) / (grid[k + 1 :] - grid[1:-k]) * b[..., 1:]
    return b.flatten(1)


def functions(s, x):
    a, b = s.a(x), s.b(x)
    y = torch.log1p(a.abs()) + torch.expm1(a) + torch.sinh(a) / torch.cosh(a) + torch.tan(a / 3) + 2**a + a**3
    y = y + torch.logaddexp(a, b) + torch.logsumexp(b, 1, keepdim=True) + F.softshrink(a, 0.1) + F.logsigmoid(a)
    y = y + F.hardtanh(b, -0.3, 0.6) + F.threshold(a, 0.1, 0.1) + a.clamp(max=0.3) + b.clamp_min(-0.1) + F.celu(a, 0.5)
    return s.o(
        y + torch.maximum(a, b) - torch.minimum(a, x[:, :5]) + a.sin() * b.cos() + (1 + a * a).sqrt() / (1 + b.exp())
    )


def rendered(s, x):
    """Volume rendering, as in NeRF."""
    raw = s.o(torch.tanh(s.a(x)))
    alpha = 1 - torch.exp(-F.relu(raw[..., 3]) * 0.5)
    clear = torch.cumprod(torch.cat([torch.ones((alpha.shape[0], 1), dtype=x.dtype), 1 - alpha + 1e-10], -1), -1)
    return ((alpha * clear[:, :-1])[..., None] * torch.sigmoid(raw[..., :3])).sum(-2)


PADDED = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 9, 0], [1, 1, 2, 2, 3]])
EINSUMS = {
    "btd,hdk->bhtk": ((5, 8), (2, 8, 3)),
    "bij,ik->bjk": ((4, 6), (4, 2)),
    "bij,i->bj": ((4, 6), (4,)),
    "bij,kij->bk": ((4, 6), (3, 4, 6)),
    "bi,j->bij": ((4,), (3,)),
    "bchw,oc->bohw": ((2, 3, 3), (4, 2)),
    "bchw,c->bhw": ((2, 3, 3), (2,)),
    "bnd,mn->bmd": ((5, 4), (3, 5)),
    "bhid,hde->bhie": ((2, 3, 4), (2, 4, 3)),
    "...d,dk->...k": ((5, 8), (8, 3)),
    "bii,k->bk": ((3, 3), (2,)),
}
LINEAR = nn.Linear
SEQUENCE = nn.Sequential
def frozen_body(s, x):
    with torch.no_grad():
        x = torch.tanh(s.body(x))
    return s.head(x)


def running(norm, *shape):
    norm(torch.randn(9, *shape))
    return norm.eval()


MODELS = {
    "a parameter without use": (lambda: model(lambda s, x: s.a(x), a=nn.Linear(8, 2), b=parameter(8)), rows(8)),
    "instance norm by running statistics": (
        lambda: model(
            lambda s, x: s.o(torch.tanh(s.n(x)).flatten(1)),
            n=running(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), 3, 5),
            o=nn.Linear(15, 2),
        ),
        rows(3, 5),
    ),
    **{
        "einsum "
        + text: (
            lambda text=text, w=w: model(
                lambda s, x: torch.einsum(text, torch.tanh(x * s.a), s.w).flatten(1), w=parameter(*w), a=parameter()
            ),
            rows(*shape),
        )
        for text, (shape, w) in EINSUMS.items()
    },
    **{
        kind.__name__
        + " of two layers": (
            lambda kind=kind: model(
                lambda s, x: s.o(s.a(x)[0].mean(1)),
                a=kind(5, 3, num_layers=2, bidirectional=True, batch_first=True),
                o=LINEAR(6, 2),
            ),
            rows(3, 5),
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "repeated class token": (
        lambda: model(
            lambda s, x: s.h((torch.cat([s.c.repeat(x.size(0), 1, 1), x], 1) + s.p).tanh().mean(1)),
            c=parameter(1, 1, 8),
            p=parameter(1, 6, 8),
            h=LINEAR(8, 3),
        ),
        rows(5, 8),
    ),
    "products with vectors": (
        lambda: model(
            lambda s, x: torch.stack([torch.tanh(s.a(x)).mv(s.v), s.a(x) @ s.v, (s.u @ s.b(x)[:, :, None])[:, 0]], 1),
            a=LINEAR(8, 5),
            b=LINEAR(8, 4),
            u=parameter(4),
            v=parameter(5),
        ),
        rows(8),
    ),
    "GLU": (lambda: model(lambda s, x: s.o(F.glu(s.a(x))), a=LINEAR(8, 12), o=LINEAR(6, 2)), rows(8)),
    "choices by constants": (
        lambda: model(
            lambda s, x: s.o(
                torch.where(torch.arange(8) % 2 == 0, s.a(x), x.tanh()).masked_fill(torch.eye(8)[0].bool(), 0.5)
            ),
            a=LINEAR(8, 8),
            o=LINEAR(8, 2),
        ),
        rows(8),
    ),
    "moved numbers": (
        lambda: model(
            lambda s, x: s.o(
                torch.cat([s.a(x).flip(2), s.a(x)[:, ::2], s.a(x)[:, [2, 0, 1]], torch.roll(s.a(x), 1, 1)], 1).flatten(
                    1
                )
            ),
            a=LINEAR(4, 3),
            o=LINEAR(33, 2),
        ),
        rows(3, 4),
    ),
    "padded convolutions": (
        lambda: SEQUENCE(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
            nn.ReplicationPad2d(1),
            nn.ConstantPad2d(1, 0.3),
            nn.Conv2d(2, 1, 5),
            nn.Flatten(),
        ).double(),
        rows(2, 4, 4),
    ),
    "nn.Bilinear": (
        lambda: model(lambda s, x: s.b(x[:, :5], s.a(x)), a=LINEAR(8, 4), b=nn.Bilinear(5, 4, 3)),
        rows(8),
    ),
    "states written into a tensor": (
        lambda: model(into_parts, i=LINEAR(5, 4), h=LINEAR(4, 4), o=LINEAR(12, 2)),
        rows(3, 5),
    ),
    "layer norm by hand": (
        lambda: model(layer_norm, a=parameter(8), b=parameter(8), o=LINEAR(8, 2), epsilon=1e-6),
        rows(3, 8),
    ),
    "adaptive layer norm": (
        lambda: model(
            lambda s, x: s.o(F.layer_norm(s.a(x), (6,), s.w * 2) * (1 + s.g(x)) + s.b(x)),
            a=LINEAR(8, 6),
            w=parameter(6),
            g=LINEAR(8, 6),
            b=LINEAR(8, 6),
            o=LINEAR(6, 2),
        ),
        rows(8),
    ),
    "softmax over other axes": (
        lambda: model(
            lambda s, x: F.log_softmax(s.o((torch.softmax(s.a(x), 1) * x).sum(1)), 1), a=LINEAR(8, 1), o=LINEAR(8, 2)
        ),
        rows(5, 8),
    ),
    "learned temperature": (
        lambda: model(
            lambda s, x: s.t.exp() * F.normalize(s.a(x), dim=-1) @ F.normalize(s.c, dim=-1).t(),
            a=LINEAR(8, 5),
            c=parameter(4, 5),
            t=parameter(),
        ),
        rows(8),
    ),
    "cosines and distances": (
        lambda: model(
            lambda s, x: torch.cat(
                [
                    F.cosine_similarity(s.a(x)[:, None], s.c[None], dim=-1),
                    torch.cdist(s.a(x), s.c),
                    F.pairwise_distance(s.a(x), s.b(x), keepdim=True),
                ],
                1,
            ),
            a=LINEAR(8, 5),
            b=LINEAR(8, 5),
            c=parameter(3, 5),
        ),
        rows(8),
    ),
    "largest along axes": (
        lambda: model(
            lambda s, x: s.o(torch.cat([s.a(x).max(1)[0], s.a(x).amin(1), s.a(x).view(-1, 4, 2, 3).amax((1, 3))], 1)),
            a=LINEAR(8, 6),
            o=LINEAR(14, 2),
        ),
        rows(4, 8),
    ),
    "functions": (lambda: model(functions, a=LINEAR(8, 5), b=LINEAR(8, 5), o=LINEAR(5, 2)), rows(8)),
    "activations": (
        lambda: SEQUENCE(
            nn.Linear(8, 6),
            nn.SELU(),
            nn.Softplus(2.0),
            nn.Linear(6, 6),
            nn.RReLU(),
            nn.Softmin(1),
            nn.ELU(0.5),
            nn.Linear(6, 2),
            nn.Hardtanh(),
        ).double(),
        rows(8),
    ),
    "volumes": (
        lambda: SEQUENCE(
            nn.Conv3d(2, 3, 2, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(3, 2)
        ).double(),
        rows(2, 3, 3, 3),
    ),
    "pools": (
        lambda: SEQUENCE(
            nn.Conv2d(1, 3, 3),
            nn.AvgPool2d(2, padding=1, count_include_pad=False),
            nn.MaxPool2d(2, stride=1, ceil_mode=True),
            nn.AvgPool2d(2, stride=2, ceil_mode=True),
            nn.Flatten(),
        ).double(),
        rows(1, 7, 7),
    ),
    "sizes that are no multiples": (
        lambda: model(
            lambda s, x: F.interpolate(
                F.interpolate(F.interpolate(s.a(x), size=(7, 5)), size=(4, 6), mode="bilinear"),
                scale_factor=1.5,
                mode="bicubic",
            ),
            a=nn.Conv2d(1, 2, 3, padding=1),
        ),
        rows(1, 4, 3),
    ),
    "shuffled pixels": (
        lambda: SEQUENCE(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.PixelShuffle(2),
            nn.ReLU(),
            nn.PixelUnshuffle(2),
            nn.Flatten(),
        ).double(),
        rows(1, 3, 3),
    ),
    "computed weights": (
        lambda: model(
            lambda s, x: s.o(
                F.conv2d(x, s.w / s.w.std(dim=(1, 2, 3), keepdim=True), s.b, padding=1, groups=2).relu().flatten(1)
            )
            + F.linear(x.flatten(1), s.a.weight + s.B @ s.A, s.a.bias),
            w=parameter(4, 1, 3, 3),
            b=parameter(4),
            o=LINEAR(64, 2),
            a=LINEAR(32, 2),
            A=parameter(1, 32),
            B=parameter(2, 1),
        ),
        rows(2, 4, 4),
    ),
    "weight norm": (
        lambda: SEQUENCE(
            nn.utils.weight_norm(nn.Conv1d(2, 3, 3, dilation=2)),
            nn.ReLU(),
            nn.Flatten(),
            nn.utils.weight_norm(nn.Linear(12, 2)),
        ).double(),
        rows(2, 8),
    ),
    "instance norm": (
        lambda: SEQUENCE(
            nn.Conv2d(1, 3, 3),
            nn.InstanceNorm2d(3),
            nn.ReLU(),
            nn.InstanceNorm2d(3, affine=True),
            nn.Flatten(),
            nn.Linear(12, 2),
        ).double(),
        rows(1, 4, 4),
    ),
    "patches": (
        lambda: model(
            lambda s, x: s.o(torch.relu(s.a(F.unfold(x, 2, stride=2).transpose(1, 2))).flatten(1)),
            a=LINEAR(8, 3),
            o=LINEAR(12, 2),
        ),
        rows(2, 4, 4),
    ),
    "padding_idx and a mask": (
        lambda: model(
            lambda s, i: s.o((s.e(i) * (i != 0)[..., None]).sum(1) / (i != 0).sum(1, keepdim=True).clamp(min=1)),
            e=nn.Embedding(11, 4, padding_idx=0),
            o=LINEAR(4, 2),
        ),
        PADDED,
    ),
    "bags of tokens": (lambda: model(lambda s, i: s.o(s.e(i)), e=nn.EmbeddingBag(11, 4), o=LINEAR(4, 2)), tokens(5)),
    "columns of tokens and numbers": (
        lambda: model(
            lambda s, x: s.o(torch.cat([s.e(x[:, 0].long()), s.f(x[:, 1].long() + 2), s.b(x[:, 2:])], 1)),
            e=nn.Embedding(3, 2),
            f=nn.Embedding(6, 3),
            b=LINEAR(3, 4),
            o=LINEAR(9, 2),
        ),
        torch.cat([tokens(2, 3).double(), rows(3)], 1),
    ),
    "factorization machine": (
        lambda: model(
            lambda s, i: s.o(
                s.e(i + torch.tensor([0, 3, 7])).sum(1) ** 2 - (s.e(i + torch.tensor([0, 3, 7])) ** 2).sum(1)
            ),
            e=nn.Embedding(10, 4),
            o=LINEAR(4, 1),
        ),
        tokens(3, 3),
    ),
    "last token by length": (
        lambda: model(
            lambda s, i: s.o(torch.tanh(s.l(s.e(i)))[torch.arange(i.size(0)), (i != 0).sum(1) - 1]),
            e=nn.Embedding(11, 4),
            l=LINEAR(4, 4),
            o=LINEAR(4, 2),
        ),
        PADDED,
    ),
    "mask of the data": (
        lambda: model(
            lambda s, x: s.o(s.a(x) * (x > 0) + torch.where(x < 0.2, s.a(x).tanh(), torch.zeros_like(x))),
            a=LINEAR(8, 8),
            o=LINEAR(8, 2),
        ),
        rows(8),
    ),
    "splines": (
        lambda: model(lambda s, x: s.o(splines(x, torch.linspace(-3, 3, 8, dtype=x.dtype))), o=LINEAR(20, 2)),
        rows(4),
    ),
    "llama": (lambda: make_llama(False), tokens(4)),
    "llama in complex numbers": (lambda: make_llama(True), tokens(4)),
    "swin": (lambda: model(swin, qkv=LINEAR(4, 12), table=parameter(9, 2), o=LINEAR(64, 2)), rows(4, 4, 4)),
    "encoder with padding": (
        lambda: model(
            padded_encoder,
            e=nn.Embedding(11, 8),
            l=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1),
            o=LINEAR(8, 2),
        ),
        PADDED,
    ),
    "encoder with a causal mask": (
        lambda: model(
            lambda s, x: s.o(s.l(x, mask=torch.triu(torch.full((5, 5), float("-inf"), dtype=x.dtype), 1))[:, -1]),
            l=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 1),
            o=LINEAR(8, 2),
        ),
        rows(5, 8),
    ),
    "linear attention": (
        lambda: model(
            lambda s, x: s.o(
                (lambda q, k: (q @ (k.transpose(1, 2) @ x)) / (q @ k.sum(1)[..., None]))(
                    F.elu(s.q(x)) + 1, F.elu(s.k(x)) + 1
                ).mean(1)
            ),
            q=LINEAR(8, 4),
            k=LINEAR(8, 4),
            o=LINEAR(8, 2),
        ),
        rows(5, 8),
    ),
    "volume rendering": (lambda: model(rendered, a=LINEAR(3, 6), o=LINEAR(6, 4)), rows(5, 3)),
    "experts": (
        lambda: model(
            lambda s, x: (torch.softmax(s.g(x), -1).unsqueeze(-1) * torch.stack([e(x) for e in s.e], 1)).sum(1),
            g=LINEAR(8, 3),
            e=copies(lambda: SEQUENCE(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), 3),
        ),
        rows(8),
    ),
    "graph with constant edges": (
        lambda: model(
            lambda s, x: s.b(
                torch.tensor([[0.5, 0.5, 0], [0.3, 0.4, 0.3], [0, 0.2, 0.8]], dtype=x.dtype) @ F.relu(s.a(x))
            ).mean(1),
            a=LINEAR(3, 6),
            b=LINEAR(6, 2),
        ),
        rows(3, 3),
    ),
    "sums along an axis": (
        lambda: model(lambda s, x: s.o(s.a(x).cumsum(1).tanh().cumsum(-1).flatten(1)), a=LINEAR(4, 3), o=LINEAR(15, 2)),
        rows(5, 4),
    ),
    "dropout that drops nothing": (
        lambda: SEQUENCE(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 2)).double().train(),
        rows(8),
    ),
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
    "LSTM": (
        lambda: model(lambda s, x: s.o(s.a(x)[0][:, -1]), a=nn.LSTM(5, 4, batch_first=True), o=LINEAR(4, 2)),
        rows(3, 5),
    ),
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
    "outputs at every token": (
        lambda: model(lambda s, i: s.h(s.t(i)), t=nn.Embedding(11, 4), h=LINEAR(4, 11)),
        tokens(6),
    ),
}


def no_gradient(s, x):
    with torch.no_grad():
        scale = s.a(x)
    return s.a(x) * scale


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return -gradient


def hooked(s, x):
    y = s.b(x)
    y.register_hook(lambda gradient: -gradient)
    return s.a(y)


def counts(s, x):
    s.count = getattr(s, "count", 0) + 1
    return s.a(x) * s.count


class Buffer(nn.Module):
    """A buffer that the forward pass changes, in place or by another one."""

    def __init__(self, in_place):
        super().__init__()
        self.a, self.in_place = nn.Linear(8, 2), in_place
        self.register_buffer("m", torch.zeros(8))

    def forward(self, x):
        if self.in_place:
            self.m.mul_(0.9).add_(x.detach().mean(0) * 0.1)
        else:
            self.m = self.m * 0.9 + 0.1
        return self.a(x - self.m)


def linear(forward, *shape, **parts):
    """A forward(s, x) that has no line: s.a is linear."""
    return lambda: model(forward, **(parts or {"a": nn.Linear(8, 2)})), rows(*(shape or (8,)))


# (a model, its inputs, words of the refusal)
REFUSED = {
    "a constant of the batch's size": (*linear(lambda s, x: s.a(x) + x.size(0) * 0.01), ""),
    "a gradient that is cut off": (*linear(lambda s, x: s.a(x) * s.a(x).detach()), "no gradient"),
    "a gradient that is cut off by .data": (*linear(lambda s, x: s.a(x) * s.a.weight.data.sum()), "no gradient"),
    "a part without gradients": (*linear(no_gradient), "no gradient"),
    "whole numbers": (*linear(lambda s, x: s.a(x - x.long())), "whole"),
    "the batch as an axis of images": (
        *linear(lambda s, x: s.a(F.max_pool2d(x[None, None], (1, 2))[0, 0]), a=LINEAR(4, 2)),
        "first axis",
    ),
    "a choice by values": (*linear(lambda s, x: torch.where(s.a(x) > 0, s.a(x), 2 * s.a(x))), "depend on the weights"),
    "over the batch": (*linear(lambda s, x: s.a(x - x.mean(0))), "batch"),
    "over all of the batch": (*linear(lambda s, x: s.a(x / x.std())), "batch"),
    "softmax over the batch": (*linear(lambda s, x: torch.softmax(s.a(x), 0)), "batch"),
    "running sums over the batch": (*linear(lambda s, x: s.a(x).cumsum(0)), ""),
    "the batch turned around": (*linear(lambda s, x: s.a(x) + s.a(x.flip(0))), "rows of a batch"),
    "the batch rolled": (*linear(lambda s, x: s.a(x) + s.a(torch.roll(x, 1, 0))), "rows of a batch"),
    "the first row for all": (*linear(lambda s, x: s.a(x) + s.a(x[:1])), "batch"),
    "products of rows": (*linear(lambda s, x: s.a(x) @ s.a(x).t()), "product"),
    "a view that mixes rows": (*linear(lambda s, x: s.a(x.t().reshape(-1, 8))), "batch"),
    "attention over the batch": (
        *linear(lambda s, x: s.o(s.m(x, x, x)[0].flatten(1)), 4, 8, m=nn.MultiheadAttention(8, 2), o=nn.Linear(32, 2)),
        "",
    ),
    "fewer rows": (*linear(lambda s, x: s.a(x)[:2]), ""),
    "an output without inputs": (*linear(lambda s, x: torch.ones(x.size(0), 2)), "inputs"),
    "control flow by the data": (*linear(lambda s, x: s.a(x) if x.sum() > 0 else -s.a(x)), "Python code sees"),
    "a number of the data": (*linear(lambda s, x: s.a(x) * x.max().item()), "Python code sees"),
    "a number of a parameter": (*linear(lambda s, x: s.a(x) * float(s.a.weight.norm())), "Python code sees"),
    "NumPy": (*linear(lambda s, x: s.a(x * torch.from_numpy((x.numpy() > 0) * 1.0))), "Python code sees"),
    "how many are not zero": (*linear(lambda s, x: s.a(x) * len(torch.nonzero(x[0] > 0))), ""),
    "chosen by a mask": (*linear(lambda s, x: s.a(x) + x[x > 0].sum()), "index"),
    "a large batch": (*linear(lambda s, x: s.a(x) * (2 if x.size(0) > 64 else 1)), "on its size"),
    "an odd batch": (*linear(lambda s, x: s.a(x) * (1 + x.size(0) % 2)), "on its size"),
    "dropout": (*linear(lambda s, x: s.a(F.dropout(x))), ""),
    "noise": (*linear(lambda s, x: s.a(x + torch.randn_like(x))), "random"),
    "noise for all rows": (*linear(lambda s, x: s.a(x) * (torch.rand(1) < 0.9999)), "random"),
    "chance in Python": (*linear(lambda s, x: s.a(x) * (random.random() < 0.999999)), "random"),
    "chance in NumPy": (*linear(lambda s, x: s.a(x) * bool(np.random.rand() < 0.999999)), "random"),
    "a counter": (*linear(counts), ""),
    "a buffer that is changed": (lambda: Buffer(True).double(), rows(8), "changes buffers"),
    "a buffer that is replaced": (lambda: Buffer(False).double(), rows(8), "replaces buffers"),
    "a gradient by hand": (
        *linear(lambda s, x: s.a(Reversed.apply(s.b(x))), a=nn.Linear(4, 2), b=nn.Linear(8, 4)),
        "Reversed, an autograd.Function",
    ),
    "a hook": (*linear(hooked, a=nn.Linear(4, 2), b=nn.Linear(8, 4)), "hook"),
    "a straight-through estimator": (
        *linear(lambda s, x: (lambda p: s.a((p.round() - p).detach() + p))(x * s.g), a=nn.Linear(8, 2), g=parameter()),
        "",
    ),
    "signs": (*linear(lambda s, x: torch.sign(s.a(x))), "depend on the weights"),
    "the place of the largest": (*linear(lambda s, x: s.a(x) + s.a(x).argmax(1, keepdim=True)), "argmax"),
    "sorted numbers": (*linear(lambda s, x: torch.sort(s.a(x), 1)[0]), "sort"),
    "the largest two": (*linear(lambda s, x: s.a(x).topk(1, 1)[0]), "topk"),
    "half precision": (*linear(lambda s, x: s.a(x.half().double())), "float16"),
    "a jump": (*linear(lambda s, x: F.threshold(s.a(x), 0.1, 20)), "jumps"),
    "hard shrinking": (*linear(lambda s, x: F.hardshrink(s.a(x))), "jump"),
    "batch norm by the batch": (
        *linear(lambda s, x: s.n(s.a(x)), a=nn.Linear(8, 2), n=nn.BatchNorm1d(2, track_running_stats=False)),
        "statistics",
    ),
    "a table with padding_idx in two ways": (
        lambda: model(lambda s, i: F.linear(s.e(i).mean(1), s.e.weight), e=nn.Embedding(11, 4, padding_idx=0)),
        tokens(4),
        "padding_idx",
    ),
    "a codebook": (
        *linear(lambda s, x: s.c[torch.cdist(s.a(x), s.c).argmin(1)], a=nn.Linear(8, 3), c=parameter(5, 3)),
        "argmin",
    ),
}


class Graph(unittest.TestCase):
    def check(self, made, network, x):
        """One step of gradient descent on the first row's sum of squares / 2, by PyTorch and by the program."""
        weights = lambda: torch.cat([p.detach().reshape(-1) for p in network.parameters]).double().numpy()
        outputs = lambda: made(x).reshape(len(x), -1)
        loss = (outputs()[0] ** 2).sum() / 2
        gradients = torch.autograd.grad(loss, network.parameters)
        wanted, before = [outputs().detach().numpy()], weights()
        rate = 0.05 / max(max(float(g.abs().max()) for g in gradients), 1e-3)
        with torch.no_grad():
            for p, g in zip(network.parameters, gradients):
                p -= rate * g
        wanted.append(outputs().detach().numpy())
        with tempfile.TemporaryDirectory() as folder:
            arrays = {"constant_" + name: array for name, array in network.constants.items()}
            arrays.update(
                weights=np.stack([before, weights()]),
                learning_rates=np.array([rate]),
                batch_offsets=np.array([0, 1]),
                batch_items=np.array([0]),
                train_inputs=x.numpy()[:1],
                train_targets=np.zeros((1, wanted[0].shape[1])),
            )
            for name, array in arrays.items():
                np.save(os.path.join(folder, name + ".npy"), array)
            np.save(os.path.join(folder, "x.npy"), x.numpy())
            with open(os.path.join(folder, "run.txt"), "w") as file:
                file.write(f"pathkernel-run 1\nnetwork {network.line}\nloss squared\noptimizer sgd\n")
            inputs, out = os.path.join(folder, "x.npy"), os.path.join(folder, "out")
            done = subprocess.run([PROGRAM, folder, "--inputs", inputs, "--out", out], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, network.line + "\n" + done.stderr)
            found = {name: np.load(os.path.join(out, name + ".npy")) for name in ("initial", "final", "unattributed")}
        for name, value in zip(("initial", "final"), wanted):
            self.assertLess(np.abs(found[name] - value).max(), 1e-12 * np.abs(value).max(), network.line)
        self.assertLess(np.abs(found["unattributed"]).max(), 1e-12 * np.abs(wanted).max(), network.line)

    def test_frozen(self):
        """A body that is run without gradients is cut off where it is trained only."""
        made = model(frozen_body, body=nn.Linear(8, 4).requires_grad_(False), head=nn.Linear(4, 2))
        self.assertIn("dense 4; tanh; dense 2", read_network(made, rows(8)).line)
        made.body.weight.requires_grad_(True)
        with self.assertRaises(Unsupported):
            read_network(made, rows(8))

    def test_models(self):
        for name, (make, x) in MODELS.items():
            with self.subTest(name):
                torch.manual_seed(0)
                made = make()
                made = made if name == "dropout that drops nothing" else made.eval()
                self.check(made, read_network(made, x), x)

    def test_refused(self):
        for name, (make, x, words) in REFUSED.items():
            with self.subTest(name):
                with self.assertRaises(Unsupported) as caught:
                    read_network(make(), x)
                self.assertIn(words, str(caught.exception))


if __name__ == "__main__":
    unittest.main()
