"""Records a PyTorch training run for pathkernel-decompose. Copy this file and pathkernel_graph.py; they need torch >= 1.13
and NumPy.

    from pathkernel_record import Recorder

    with Recorder("run", model, loss="softmax_cross_entropy", optimizer=opt, inputs=x, targets=y) as record:
        for step in range(steps):
            indices = torch.randperm(len(x))[:64]
            opt.zero_grad()
            criterion(model(x[indices]), y[indices]).backward()
            opt.step()
            record(indices)      # rows of inputs and targets; a scheduler may step before or after

The network line of run.txt is read from the graph of operations that the model computes (pathkernel_graph.py), the loss
line from the loss, the optimizer line and those of parameter groups from torch.optim's object. A loss that the format does
not name is recorded by its derivatives: what autograd gives each output of each example (loss="recorded"). What cannot be
recorded is refused with a RecordError that names it, and nothing is left of it on the disk. Checks catch what else would
only show later, as a large "unattributed" part:

    at the start    the model's outputs are those of the derived network, at its own weights and at random ones, so
                    layout and order agree
    at each step    the optimizer was given the gradient that autograd computed, times one factor (clipping, a
                    GradScaler), which is recorded; a few weights of each tensor moved by the rule of the optimizer
                    line; a few numbers of the batch's rows are as they were recorded
    at some steps   (the first eight, then ever fewer, and wherever the line above does not hold) the gradient is that of
                    the declared loss on the declared rows
    at the end      no step is missing, the weights are those of the last step, and the first line holds again

Rates, settings and gradients are taken when the optimizer steps; what changes afterwards does not matter.

With a DataLoader, wrap the dataset in Indexed: each batch then starts with the row numbers.

An optimizer that has made steps before (a checkpoint's) is recorded with its state, and what that contributes is told from the
examples (inherited.npy).

Every step appends one row to each .npy file, weights.npy last; a kill at any moment loses at most the step in
flight. Recorder(..., resume=True) goes on with such a run. One recorder at a time writes into a folder.
"""

import contextlib
import copy
import fcntl
import functools
import inspect
import itertools
import math
import os
import re
import stat
import types
import warnings
import weakref

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from pathkernel_graph import Unsupported, read_network

__all__ = ["Recorder", "RecordError", "Indexed", "Residual", "SelfAttention", "Position", "Token", "MeanTokens"]


class RecordError(ValueError):
    """The run, as it is, cannot be recorded; the message says why."""


class Residual(nn.Module):
    """body(x) + shortcut(x), or + x."""

    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body, self.shortcut = body, nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of tokens among themselves; causal: each sees those up to itself."""

    def __init__(self, dim, heads, causal=False, bias=True):
        super().__init__()
        self.attention, self.causal = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True), causal

    def forward(self, x):
        mask = None
        if self.causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(x, x, x, need_weights=False, attn_mask=mask)[0]


class Position(nn.Module):
    """Adds a learned vector to each token."""

    def __init__(self, tokens, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tokens, dim))

    def forward(self, x):
        return x + self.weight


class Token(nn.Module):
    """One of the tokens; -1 is the last."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x):
        return x[:, self.index]


class MeanTokens(nn.Module):
    """The mean of the tokens."""

    def forward(self, x):
        return x.mean(1)


class Indexed(torch.utils.data.Dataset):
    """A dataset whose samples start with their index: for indices, x, y in DataLoader(Indexed(data))."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        return (index, *sample) if isinstance(sample, (tuple, list)) else (index, sample)


_COUPLES = (
    "it couples the examples of a batch, so contributions of single examples are not defined; freeze its "
    "statistics with .eval()"
)
_INSTANCE = nn.modules.instancenorm._InstanceNorm
_RANDOM = "draws random numbers that the format does not keep; use p=0, or .eval() it"


def _number(value):
    return repr(float(value))


def _axes(shape):
    """The axes of an example that say anything: all but the first, and without the ones."""
    return [n for n in shape[1:] if n != 1]


# ---- the network language


def _of(x, name):
    """The function for images or, of values of two dimensions, for signals."""
    if x.ndim not in (3, 4):
        raise ValueError("it takes images of channels x height x width, or signals of channels x length")
    return getattr(F, f"{name}{x.ndim - 2}d")


def _kernel(x, size):
    """The sides of a kernel; of images one number is both."""
    return size if isinstance(size, tuple) else (size,) * (x.ndim - 2)


def _w_dense(net, x, outputs, nobias=False):
    y = x @ net.take("weight", outputs, x.shape[-1]).T
    return y if nobias else y + net.take("bias", outputs)


def _w_conv(net, x, channels, kernel, stride=1, pad=0, dilation=1, groups=1, nobias=False):
    weight = net.take("weight", channels, x.shape[1] // groups, *_kernel(x, kernel))
    bias = None if nobias else net.take("bias", channels)
    return _of(x, "conv")(x, weight, bias, stride, pad, dilation, groups)


def _w_conv_transpose(net, x, channels, kernel, stride=1, pad=0, output_pad=0, dilation=1, groups=1, nobias=False):
    weight = net.take("weight", x.shape[1], channels // groups, *_kernel(x, kernel))
    bias = None if nobias else net.take("bias", channels)
    return _of(x, "conv_transpose")(x, weight, bias, stride, pad, output_pad, groups, dilation)


def _w_upsample(net, x, factor, nearest=False, bilinear=False, linear=False, align_corners=False):
    mode = ("linear" if x.ndim == 3 else "bilinear") if bilinear or linear else "nearest"
    corners = None if mode == "nearest" else align_corners
    return F.interpolate(x, scale_factor=tuple(map(float, _kernel(x, factor))), mode=mode, align_corners=corners)


def _w_normalize(net, x, epsilon=1e-5, dims=1, groups=0):
    return F.group_norm(x, groups, eps=epsilon) if groups else F.layer_norm(x, x.shape[-dims:], eps=epsilon)


def _w_rms_normalize(net, x, epsilon=2.220446049250313e-16, dims=1):
    return x * ((x * x).mean(tuple(range(-dims, 0)), keepdim=True) + epsilon).rsqrt()


def _w_affine(net, x, nobias=False, dims=1, scalar=False):
    shape = (1,) if scalar else x.shape[-dims:] if dims else (x.shape[1],)
    beside = shape if dims else (x.shape[1], *(1,) * (x.ndim - 2))
    y = x * net.take("weight", *shape).reshape(beside)
    return y if nobias else y + net.take("bias", *shape).reshape(beside)


def _w_layer_norm(net, x, epsilon=1e-5, dims=1, noaffine=False):
    y = _w_normalize(net, x, epsilon, dims)
    return y if noaffine else _w_affine(net, y, dims=dims)


def _w_rms_norm(net, x, epsilon=2.220446049250313e-16, dims=1, noaffine=False):
    y = _w_rms_normalize(net, x, epsilon, dims)
    return y if noaffine else _w_affine(net, y, True, dims)


def _w_group_norm(net, x, groups, epsilon=1e-5, noaffine=False):
    y = _w_normalize(net, x, epsilon, groups=groups)
    return y if noaffine else _w_affine(net, y, dims=0)


def _w_batch_norm(net, x, name, epsilon=1e-5, noaffine=False):
    mean, variance = net.constant(name)
    y = F.batch_norm(x, mean, variance, eps=epsilon)
    return y if noaffine else _w_affine(net, y, dims=0)


def _w_embedding(net, x, tokens, width, padding=None, first=0, count=0, offset=0):
    index = net.values["input"][:, first : first + count if count else None].long() + offset
    y = F.embedding(index, net.take("weight", tokens, width))
    return y if padding is None else y.masked_fill((index == padding)[..., None], 0)


def _w_attention(net, x, heads, causal=False, shared=False, nobias=False):
    batch, tokens, width = x.shape
    parts = _w_dense(net, x, (1 if shared else 3) * width, nobias).split(width, 2)
    q, k, v = (p.reshape(batch, tokens, heads, -1).transpose(1, 2) for p in parts * (3 if shared else 1))
    scores = q @ k.transpose(2, 3) / (width // heads) ** 0.5
    if causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    y = (scores.softmax(3) @ v).transpose(1, 2).reshape(x.shape)
    return _w_dense(net, y, width, nobias)


def _w_propagate(net, x, name):
    row, column, value = net.constant(name).T
    return torch.zeros_like(x).index_add(1, row.long(), value[:, None] * x[:, column.long()])


def _w_pair(operation):
    def apply(net, x, name):
        y = net.values[name]
        both = (v.reshape(len(v), *(1,) * (max(x.ndim, y.ndim) - v.ndim), *v.shape[1:]) for v in (x, y))
        return operation(*both)

    return apply


def _w_gather(net, x, name):
    places = net.constant(name).long()
    x = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)  # the place -1 is the last
    return x[:, places.flatten()].reshape(len(x), *places.shape)


def _w_matmul(net, x, name, transpose=False):
    y = net.values[name]
    return x @ (y.transpose(-1, -2) if transpose else y)


def _w_concat(net, x, axis, *names):
    parts = [x, *(net.values[name] for name in names)]
    most = max(map(len, parts))
    return torch.cat([p.expand(most, *p.shape[1:]) for p in parts], axis + 1)


_WORDS = {  # of the language, on tensors; net gives weights, named values and arrays
    "identity": lambda net, x: x,
    "softplus": lambda net, x, beta=1.0: torch.logaddexp(beta * x, torch.zeros_like(x)) / beta,
    "leaky_relu": lambda net, x, slope=0.01: F.leaky_relu(x, slope),
    "gelu": lambda net, x, tanh=False: F.gelu(x, approximate="tanh" if tanh else "none"),
    "elu": lambda net, x, alpha=1.0: F.elu(x, alpha),
    "hard_sigmoid": lambda net, x: F.relu6(x + 3) / 6,
    "hard_tanh": lambda net, x: F.hardtanh(x),
    "prelu": lambda net, x, slopes=1: F.prelu(x, net.take("weight", slopes)),
    "sine": lambda net, x, beta=1.0: torch.sin(beta * x),
    "scale": lambda net, x, factor: factor * x,
    "power": lambda net, x, exponent: x**exponent,
    "softmax": lambda net, x: x.softmax(-1),
    "log_softmax": lambda net, x: x.log_softmax(-1),
    "softmin": lambda net, x: (-x).softmax(-1),
    "dense": _w_dense,
    "conv": _w_conv,
    "conv_transpose": _w_conv_transpose,
    "max_pool": lambda net, x, kernel, stride=None, pad=0, ceil_mode=False: _of(x, "max_pool")(
        x, kernel, stride, pad, ceil_mode=ceil_mode
    ),
    "avg_pool": lambda net, x, kernel, stride=None, pad=0, ceil_mode=False, count_include_pad=1: _of(x, "avg_pool")(
        x, kernel, stride, pad, ceil_mode, bool(count_include_pad)
    ),
    "adaptive_max_pool": lambda net, x, sizes: _of(x, "adaptive_max_pool")(x, sizes),
    "adaptive_avg_pool": lambda net, x, sizes: _of(x, "adaptive_avg_pool")(x, sizes),
    "global_avg_pool": lambda net, x: x.flatten(2).mean(2),
    "upsample": _w_upsample,
    "normalize": _w_normalize,
    "rms_normalize": _w_rms_normalize,
    "group_norm": _w_group_norm,
    "instance_norm": lambda net, x, epsilon=1e-5, noaffine=False: _w_group_norm(net, x, x.shape[1], epsilon, noaffine),
    "layer_norm": _w_layer_norm,
    "rms_norm": _w_rms_norm,
    "affine": _w_affine,
    "batch_norm": _w_batch_norm,
    "flatten": lambda net, x: x.flatten(1),
    "embedding": _w_embedding,
    "position": lambda net, x: x + net.take("weight", *x.shape[1:]),
    "attention": _w_attention,
    "token": lambda net, x, index: x[:, index],
    "mean_tokens": lambda net, x: x.mean(1),
    "select": lambda net, x: x[torch.arange(len(x), device=x.device), net.values["input"].reshape(-1).long()],
    "constant": lambda net, x, name: net.constant(name)[None],
    "propagate": _w_propagate,
    "parameter": lambda net, x, shape: net.take("weight", *(shape if isinstance(shape, tuple) else (shape,)))[None],
    "add": _w_pair(torch.add),
    "subtract": _w_pair(torch.sub),
    "multiply": _w_pair(torch.mul),
    "divide": _w_pair(torch.div),
    "gather": _w_gather,
    "above": lambda net, x, threshold=0: (x > threshold).to(x),
    "matmul": _w_matmul,
    "concat": _w_concat,
    "slice": lambda net, x, axis, first, count: x.narrow(axis + 1, first, count),
    "permute": lambda net, x, *axes: x.permute(0, *(axis + 1 for axis in axes)),
    "reshape": lambda net, x, shape: x.reshape(len(x), *(shape if isinstance(shape, tuple) else (shape,))),
    "sum": lambda net, x, axis: x.sum(axis + 1),
    "mean": lambda net, x, axis: x.mean(axis + 1),
    "max": lambda net, x, axis: x.max(axis + 1)[0],
    "min": lambda net, x, axis: x.min(axis + 1)[0],
}
for _word in ("relu", "tanh", "sigmoid", "erf", "abs", "exp", "log"):
    _WORDS[_word] = lambda net, x, function=getattr(torch, _word): function(x)
for _word, _name in (("log_sigmoid", "logsigmoid"), *((w, w) for w in "silu selu mish relu6 hardswish softsign".split())):
    _WORDS[_word] = lambda net, x, function=getattr(F, _name): function(x)


def _option(text):
    """A number, several such as 3x3, or a name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return tuple(map(int, text.split("x"))) if re.fullmatch(r"\d+(x\d+)+", text) else text


class _Line:
    """A network line as a function of torch, written apart from what reads models: what the recorder compares with."""

    def __init__(self, line, constants):
        self.line, self.constants = line, constants
        parts = re.findall(r"[;|()]|[^;|()\s]+", line)
        if len(parts) < 2 or parts[0] != "input" or not re.fullmatch(r"\d+(x\d+)*", parts[1]):
            raise RecordError(f"network: it starts with 'input' and its shape, not with '{line[:40]}'")
        self.shape, self.parts = tuple(map(int, parts[1].split("x"))), parts[2:]
        self.layers = []
        if self.parts[:1] == [";"]:
            self.parts.pop(0)
            self.layers = self._parse()
        if self.parts:
            raise RecordError(f"network: '{' '.join(self.parts[:4])}' is out of place in '{line}'")
        # Of the pieces that the layers take of the weights: how large they are, which one each time, what has a name.
        self.sizes, self.taken, self.named = [], [], {}
        with torch.no_grad():
            self.outputs = self(None, torch.zeros(1, *self.shape, dtype=torch.float64)).shape[1:]
        self.count = sum(self.sizes)

    def _parse(self):
        """[(text, word, positional, options)] up to what ends a branch; a residual has two such lists."""
        layers = []
        while True:
            words = []
            while self.parts and self.parts[0] not in (";", "|", "(", ")"):
                words.append(self.parts.pop(0))
            if words == ["residual"] and self.parts[:1] == ["("]:
                self.parts.pop(0)
                branches = [self._parse()]
                if self.parts[:1] == ["|"]:
                    self.parts.pop(0)
                    branches.append(self._parse())
                if self.parts[:1] != [")"]:
                    raise RecordError(f"network: the ')' of a residual is missing in '{self.line}'")
                self.parts.pop(0)
                layers.append(("residual", "residual", branches, {}))
            elif words and (words[0] in _WORDS or words[0] in ("as", "from")):
                word, *rest = words
                flags = inspect.signature(_WORDS[word]).parameters if word in _WORDS else {}
                flags = {w for w in rest if w == "transposed" or (w in flags and flags[w].default is False)}
                values = [_option(w) if w[0] in "-.0123456789" else w for w in rest if "=" not in w and w not in flags]
                options = {**dict(w.split("=", 1) for w in rest if "=" in w), **dict.fromkeys(flags, True)}
                options = {k: v if v is True or k in ("name", "tied") else _option(v) for k, v in options.items()}
                layers.append((" ".join(words), word, values, options))
            else:
                raise RecordError(f"network: '{' '.join(words)}' is not a layer that the recorder knows")
            if self.parts[:1] != [";"]:
                return layers
            self.parts.pop(0)

    def __call__(self, weights, x):
        """The outputs, with all weights in one vector. None: zeros, and the pieces are counted."""
        # In one split: the gradient of a slice is as large as the whole vector.
        self.pieces = None if weights is None else weights.split(self.sizes)
        self.next, self.values = iter(self.taken), {"input": x.reshape(len(x), *self.shape)}
        y = self._run(self.layers, self.values["input"])
        return y.expand(len(x), *y.shape[1:])

    def _run(self, layers, x):
        for text, word, values, options in layers:
            try:
                if word == "residual":
                    branches = [self._run(branch, x) for branch in values] + [x]
                    if branches[0].shape != branches[1].shape:
                        raise ValueError(f"its branches are {', '.join(str(tuple(b.shape[1:])) for b in branches)}")
                    x = branches[0] + branches[1]
                elif word == "as":
                    self.values[values[0]] = x
                elif word == "from":
                    x = self.values[values[0]]
                else:
                    self.tie = {k: options.get(k) for k in ("name", "tied", "transposed")}
                    x = _WORDS[word](self, x, *values, **{k: v for k, v in options.items() if k not in self.tie})
            except (RuntimeError, TypeError, ValueError, IndexError, KeyError, ZeroDivisionError) as error:
                if isinstance(error, RecordError):
                    raise
                raise RecordError(f"network: '{text}' does not fit values of {tuple(x.shape[1:])}: {error}") from None
        return x

    def take(self, tensor, *shape):
        """The next piece of the weights, or an earlier one that the layer shares."""
        if self.pieces is not None:
            piece, back = next(self.next)
            value = self.pieces[piece]
            return value.reshape(shape[::-1]).T if back else value.reshape(shape)
        name, _, only = (self.tie["tied"] or "").partition(".")
        piece = self.named.get((name, tensor)) if only in ("", tensor) else None
        back = piece is not None and bool(self.tie["transposed"]) and tensor == "weight"
        if piece is None:
            piece = len(self.sizes)
            self.sizes.append(math.prod(shape))
        self.taken.append((piece, back))
        if self.tie["name"]:
            self.named.setdefault((self.tie["name"], tensor), piece)
        return torch.zeros(shape, dtype=torch.float64)

    def constant(self, name):
        if name not in self.constants:
            raise RecordError(f"network: the array '{name}' is missing: constants={{'{name}': ...}}")
        return torch.as_tensor(np.asarray(self.constants[name], np.float64)).to(self.values["input"])


# ---- the loss line


def _one_hot(y, f):
    if y.dtype == torch.int64 and f.shape[1] > 1:  # classes; with one output, numbers
        return F.one_hot(y, f.shape[1]).to(f)
    return y.to(f).reshape(f.shape)


def _hinge(f, y):
    if f.shape[1] == 1:
        return (1 - y * f).clamp(min=0).sum(1)
    margins = (1 - (f * y).sum(1, keepdim=True) + f).clamp(min=0) * (1 - y)
    return margins.sum(1) / f.shape[1]


def _huber(f, y, delta=None, beta=None):
    if delta is not None:
        return F.huber_loss(f, y, reduction="none", delta=float(delta)).mean(1)
    return F.smooth_l1_loss(f, y, reduction="none", beta=float(beta or 1)).mean(1)


def _logistic(f, y, pos_weight=None):
    weight = None if pos_weight is None else torch.as_tensor(np.array(pos_weight.split(","), np.float64)).to(f)
    return F.binary_cross_entropy_with_logits(f, y, reduction="none", pos_weight=weight).mean(1)


def _kl_div(f, y, log_target=0):
    return F.kl_div(f, y, reduction="none", log_target=bool(int(log_target))).sum(1)


_LOSSES = {  # per example, of outputs and target vectors, with the options of the line
    "squared": lambda f, y: ((f - y) ** 2).sum(1) / 2,
    "mean_squared": lambda f, y: ((f - y) ** 2).mean(1),
    "softmax_cross_entropy": lambda f, y: -(y * torch.log_softmax(f, 1)).sum(1),
    "logistic": _logistic,
    "nll": lambda f, y: -(y * f).sum(1),
    "huber": _huber,
    "hinge": _hinge,
    "l1": lambda f, y: (f - y).abs().mean(1),
    "kl_div": _kl_div,
    "binary_cross_entropy": lambda f, y: F.binary_cross_entropy(f, y, reduction="none").mean(1),
}
_LOSS_MODULES = {
    nn.CrossEntropyLoss: "softmax_cross_entropy",
    nn.MSELoss: "mean_squared",
    nn.NLLLoss: "nll",
    nn.BCEWithLogitsLoss: "logistic",
    nn.SmoothL1Loss: "huber",
    nn.HuberLoss: "huber",
    nn.MultiMarginLoss: "hinge",
    nn.L1Loss: "l1",
    nn.KLDivLoss: "kl_div",
    nn.BCELoss: "binary_cross_entropy",
}
_LOSS_OPTIONS = {  # those that the format has; others have to be as they are here
    "softmax_cross_entropy": ("label_smoothing", "ignore_index", "weight"),
    "nll": ("ignore_index", "weight"),
    "logistic": ("pos_weight",),
    "huber": ("delta", "beta"),
    "kl_div": ("log_target",),
}
_LOSS_SETTINGS = {"weight": None, "p": 1, "margin": 1.0}
_LOSS_FUNCTIONS = {  # modules of torch.nn whose function this is
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.nll_loss: nn.NLLLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.l1_loss: nn.L1Loss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
}


def _loss_option(name, value):
    """name=value of a loss line; numbers of any precision to their last digit."""
    if torch.is_tensor(value):
        value = ",".join(_number(v) for v in value.detach().double().reshape(-1).tolist())
    elif not isinstance(value, str):
        value = str(int(value)) if name in ("ignore_index", "log_target") else _number(value)
    return f"{name}={value}"


def _loss_module(loss):
    """The module of torch.nn that a function of torch.nn.functional is, with the settings of a functools.partial of it."""
    function, settings = (loss.func, loss.keywords) if isinstance(loss, functools.partial) and not loss.args else (loss, {})
    try:
        kind = _LOSS_FUNCTIONS.get(function)
    except TypeError:  # not hashable
        kind = None
    return loss if kind is None else kind(**settings)


def _is_named_loss(loss):
    """Whether a line of the format can say what the loss is; else its derivatives are recorded."""
    return isinstance(loss, str) and loss.split()[:1] != ["recorded"] or type(loss) in _LOSS_MODULES


def loss_line(loss, targets=None):
    """The format's line for a loss: such a line itself, or a module of torch.nn. Where targets are given, ignore_index is
    stated if they have it."""
    if not _is_named_loss(loss):
        if not (callable(loss) or loss == "recorded"):
            raise RecordError(f"loss {loss!r} is no line of the format, no module and no function")
        return "recorded"
    if isinstance(loss, str):
        word, *options = loss.split() or [loss]
        if word not in _LOSSES:
            raise RecordError(f"loss '{word}' is none of {', '.join(_LOSSES)}")
        for option in options:
            if option.split("=")[0] not in _LOSS_OPTIONS.get(word, ()) or "=" not in option:
                known = ", ".join(_LOSS_OPTIONS.get(word, ())) or "none"
                raise RecordError(f"loss {word}: '{option}' is not one of its options ({known})")
        return " ".join([word, *options])
    word = _LOSS_MODULES[type(loss)]
    has = _LOSS_OPTIONS.get(word, ())
    for setting, only in _LOSS_SETTINGS.items():
        value = getattr(loss, setting, only)
        if setting not in has and not (value is None if only is None else value == only):
            return "recorded"  # the format has no such setting
    if loss.reduction not in ("mean", "sum", "batchmean"):
        return "recorded"
    options = []
    for name in has:
        value = getattr(loss, name, None)
        default = {"label_smoothing": 0, "delta": 1, "beta": 1, "log_target": False, "ignore_index": -100}.get(name)
        if name == "ignore_index" and value == default and targets is not None:
            labels = targets.ndim == 1 and targets.dtype.kind in "iu"
            default = None if labels and bool((targets == value).any()) else default
        if value is None or (not torch.is_tensor(value) and value == default):
            continue
        if name == "beta" and value == 0:
            return "l1"
        options.append(_loss_option(name, value))
    return " ".join([word, *options])


class _Loss:
    """A loss line, as it is computed."""

    def __init__(self, line, reduction="mean"):
        self.line, self.reduction = line, reduction
        self.word, *options = line.split()
        self.options = dict(option.split("=", 1) for option in options)
        pick = lambda name: self.options.pop(name, None) if self.word in ("softmax_cross_entropy", "nll") else None
        weight, smoothing, ignored = pick("weight"), pick("label_smoothing"), pick("ignore_index")
        self.weight = None if weight is None else np.array(list(map(float, weight.split(","))))
        self.smoothing = float(smoothing or 0)
        self.ignored = None if ignored is None else int(ignored)

    def is_ignored(self, y):
        return np.zeros(len(y), bool) if self.ignored is None or y.dtype.kind not in "iu" else y == self.ignored

    def each(self, f, y):
        """The loss of each example, from outputs and targets."""
        ignored = None
        if self.ignored is not None and y.dtype == torch.int64:
            ignored = y == self.ignored
            y = y.masked_fill(ignored, 0)
        vectors = _one_hot(y, f)
        if self.smoothing:
            vectors = (1 - self.smoothing) * vectors + self.smoothing / f.shape[1]
        if self.weight is not None:
            vectors = vectors * torch.as_tensor(self.weight).to(vectors)
        if ignored is not None:
            vectors = vectors.masked_fill(ignored.reshape(-1, 1), 0)
        return _LOSSES[self.word](f, vectors, **self.options)

    def weights(self, y, outputs):
        """What the module's reduction multiplies the loss of each example of a batch with, whose targets are y."""
        if self.reduction == "sum":
            return np.full(len(y), 1.0 if self.word in ("softmax_cross_entropy", "nll", "kl_div") else float(outputs))
        if self.word == "kl_div" and self.reduction == "mean":
            return np.full(len(y), 1 / (len(y) * outputs))
        if (self.weight is None and self.ignored is None) or y.dtype.kind not in "iu":
            return np.full(len(y), 1 / len(y))
        ignored = self.is_ignored(y)
        counted = np.where(ignored, 0, 1 if self.weight is None else self.weight[np.where(ignored, 0, y)])
        if not counted.sum() > 0:
            raise RecordError(
                "each label of the batch is ignored or has the weight 0: the mean of its losses is 0 / 0"
            )
        return np.full(len(y), 1 / counted.sum())


# ---- the optimizer line


def _nadam_counts_twice():
    """Whether this PyTorch's NAdam without foreach has a factor too many in what it divides the momentum by, as versions
    before 2.0 have: mu_1^2 mu_2 instead of mu_1 mu_2 in its first step, which moves a weight by less."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    w.grad = torch.ones_like(w)
    torch.optim.NAdam([w], lr=1.0, betas=(0.5, 0.5), eps=0.0, momentum_decay=0.0).step()
    return abs(float(w.detach()[0]) + 1 + 0.25 * 0.5 / (1 - 0.25 * 0.25)) > 1e-3


def _group_line(kind, group):
    def no(setting, reason):
        return RecordError(f"optimizer {kind.__name__}: {setting} = {group[setting]}: {reason}")

    name, values, switches = kind.__name__.lower(), {}, ["maximize"]
    if kind is torch.optim.SGD:
        values = {k: group[k] for k in ("momentum", "dampening", "weight_decay") if group[k] != 0}
        switches = ["nesterov", *switches]
    elif kind is torch.optim.RMSprop:
        values = {"alpha": group["alpha"], "epsilon": group["eps"]}
        values.update({k: group[k] for k in ("weight_decay", "momentum") if group[k] != 0})
        switches = ["centered", *switches]
    elif kind is torch.optim.Adagrad:
        values = {k: group[k] for k in ("lr_decay", "weight_decay", "initial_accumulator_value") if group.get(k)}
        values["epsilon"] = group["eps"]
    else:
        values = {"beta1": group["betas"][0], "beta2": group["betas"][1], "epsilon": group["eps"]}
        values["weight_decay"] = group["weight_decay"]
        if kind is torch.optim.NAdam:
            if _nadam_counts_twice():
                if not group.get("foreach"):
                    raise no(
                        "foreach",
                        f"PyTorch {torch.__version__} computes another rule then, which later versions have mended; "
                        "foreach=True is the one that the format has",
                    )
                if group["weight_decay"] != 0:
                    raise no(
                        "weight_decay",
                        f"with foreach=True PyTorch {torch.__version__} adds the decay to the gradients that it was given, "
                        "so that they cannot be compared; later versions do not",
                    )
            values["momentum_decay"] = group["momentum_decay"]
            switches = ["decoupled_weight_decay", "float32_product", *switches]
            group = {**group, "float32_product": torch.get_default_dtype() != torch.float64}  # the type of mu_product
        else:
            name = "adamw" if group.get("decoupled_weight_decay", kind is torch.optim.AdamW) else "adam"
            switches = ["amsgrad", *switches]
    if name == "rmsprop" and not 0 <= group["alpha"] < 1:
        raise no("alpha", "the format has 0 to below 1")
    words = [f"{k}={_number(v)}" for k, v in values.items()] + [f"{k}=1" for k in switches if group.get(k)]
    return " ".join([name, *words])


def _check_optimizer(optimizer):
    kind, o = type(optimizer), torch.optim
    if kind not in (o.SGD, o.Adam, o.AdamW, o.RMSprop, o.Adagrad, o.NAdam):
        raise RecordError(
            f"optimizer {kind.__name__} is not supported; SGD, Adam, AdamW, RMSprop, Adagrad and NAdam of torch.optim are"
        )


class _Group:
    """Parameters of one group of the optimizer, by their numbers in w; number None: those that nobody trains."""

    def __init__(self, number, members, line="", base=""):
        self.number, self.members, self.line = number, members, line
        own, other = (dict(word.split("=") for word in text.split()[1:]) for text in (line, base or line))
        keys = [k for k in (*own, *(k for k in other if k not in own))]
        words = [f"{k}={own.get(k, '0')}" for k in keys if float(own.get(k, 0)) != float(other.get(k, 0))]
        self.words = ["frozen"] if number is None else words
        if line.split()[:1] != (base or line).split()[:1]:
            raise RecordError(
                f"optimizer: its parameter groups have the rules '{line}' and '{base}', the format has one for the run "
                "(decoupled_weight_decay?)"
            )

    def text(self):
        spans = []  # 1,3,5-7
        for n in self.members:
            if spans and spans[-1][1] == n - 1:
                spans[-1][1] = n
            else:
                spans.append([n, n])
        return " ".join([",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans), *self.words])


def _groups(model, parameters, optimizer):
    """The groups of the parameters in w: first that of the optimizer line, then those of group lines."""
    names = {id(p): name for name, p in model.named_parameters()}
    number = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
    if any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        raise RecordError("the optimizer trains parameters that are not the model's")
    for p in parameters:
        if p.dtype not in (torch.float32, torch.float64) or p.dtype != parameters[0].dtype:
            raise RecordError(
                f"parameter '{names[id(p)]}' is {p.dtype}; the format has float32 or float64, one for all: train in one of "
                "them, without model.bfloat16(), model.half() or autocast"
            )
    owner = [number.get(id(p)) if p.requires_grad else None for p in parameters]
    groups, base = [], ""
    for g in sorted({n for n in owner if n is not None}):
        line = _group_line(type(optimizer), optimizer.param_groups[g])
        groups.append(_Group(g, [i for i, n in enumerate(owner) if n == g], line, base))
        base = base or line
    if not groups:
        raise RecordError("no parameter that the outputs depend on is trained by the optimizer")
    frozen = [i for i, n in enumerate(owner) if n is None]
    return groups + [_Group(None, frozen)] * bool(frozen)


def _updates_made(model, optimizer):
    """How many updates the optimizer has made before: 0, or of one that does not count them (SGD) 1. It has to be one number
    for all tensors."""
    names, made = {id(p): name for name, p in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and not group["momentum"]:
            continue
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            count = int(state["step"]) if "step" in state else int(torch.is_tensor(state.get("momentum_buffer")))
            if p.requires_grad:
                made.setdefault(count, names.get(id(p)))
    if len(made) < 2:
        return next(iter(made), 0)
    fewest, most = min(made), max(made)
    if isinstance(optimizer, torch.optim.SGD):
        raise RecordError(
            f"the optimizer has a momentum of parameter '{made[1]}' and none of '{made[0]}', whose first step goes by another "
            "rule; the format has one for all tensors: begin with a fresh optimizer, or give all tensors a momentum_buffer"
        )
    raise RecordError(
        f"the optimizer has made {most} steps with parameter '{made[most]}' and {fewest} with '{made[fewest]}'; the format has "
        "one number for all tensors, by which their moments are corrected: begin with a fresh optimizer, or train them from "
        "the start together"
    )


def _precision(optimizer):
    """Of the optimizer's scalars: double, unless they are tensors."""
    tensors = [v for group in optimizer.param_groups for k, v in group.items() if k != "params" and torch.is_tensor(v)]
    tensors += [torch.zeros(0)] * any(group.get("capturable") for group in optimizer.param_groups)
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0)


class _Rule:
    """The rule of an optimizer line, in float64, at a few weights: what each step has to be."""

    def __init__(self, line, epsilon, optimizer):
        self.kind, *words = line.split()
        given = {key: float(value) for key, value in (word.split("=") for word in words)}
        names = ("momentum", "dampening", "nesterov", "weight_decay", "beta1", "beta2", "epsilon", "maximize", "amsgrad")
        names += ("alpha", "centered", "lr_decay", "initial_accumulator_value")
        names += ("momentum_decay", "decoupled_weight_decay", "float32_product")
        self.options = types.SimpleNamespace(**{**dict.fromkeys(names, 0), **given})
        o = self.options
        # The names of the optimizer's vectors in torch.optim; that of the second moments that it divides by.
        buffer = ("momentum_buffer",) * bool(o.momentum)
        self.vectors, self.moments = {
            "sgd": (buffer, None),
            "rmsprop": (
                ("square_avg", *buffer, *("grad_avg",) * bool(o.centered)),
                None if o.momentum or o.centered else "square_avg",
            ),
            "adagrad": (("sum",), "sum"),
        }.get(self.kind, (("exp_avg", "exp_avg_sq", *("max_exp_avg_sq",) * bool(o.amsgrad)), None))
        if "exp_avg_sq" in self.vectors:
            self.moments = self.vectors[-1]
        # Rounding of the weights, and of what such a vector forgets slowly.
        self.epsilon = epsilon
        scalars = _precision(optimizer)
        slow = max(o.momentum if o.momentum < 1 else 0, o.beta1, o.beta2, o.alpha)
        self.tolerance = (100 + 2 / (1 - slow)) * max(epsilon, scalars)
        self.state, self.size, self.steps, self.product = [0.0] * len(self.vectors), 0.0, 0, None
        if self.kind == "adagrad":
            self.state = [o.initial_accumulator_value]

    def resume(self, state, steps):
        self.state, self.steps = [np.array(vector) for vector in state], steps
        moved = [v for name, v in zip(self.vectors, self.state) if name in ("momentum_buffer", "exp_avg")]
        self.size = np.abs(moved[0]) if moved else 0.0

    def _mu(self, k):
        return self.options.beta1 * (1 - 0.5 * 0.96 ** (k * self.options.momentum_decay))

    def step(self, w, g, rate):
        """The update of weights w by gradients g, and by how much rounding can change it."""
        o, decay, first = self.options, self.options.weight_decay * w, self.steps == 0
        self.steps += 1
        size, decoupled = np.abs(g), self.kind == "adamw" or o.decoupled_weight_decay
        g = -g if o.maximize else g
        if not decoupled and o.weight_decay:
            g, size = g + decay, size + np.abs(decay)
        if self.kind == "sgd":
            if o.momentum:
                old, new = (0, 1) if first else (o.momentum, 1 - o.dampening)
                self.state[0] = buffer = old * self.state[0] + new * g
                self.size = old * self.size + new * size
                g, size = (g + o.momentum * buffer, size + o.momentum * self.size) if o.nesterov else (buffer, self.size)
            update, size = -rate * g, abs(rate) * size
        elif self.kind == "rmsprop":
            state = dict(zip(self.vectors, self.state))
            state["square_avg"] = v = o.alpha * state["square_avg"] + (1 - o.alpha) * g * g
            if o.centered:
                state["grad_avg"] = mean = o.alpha * state["grad_avg"] + (1 - o.alpha) * g
                left = np.maximum(v - mean * mean, np.finfo(float).tiny)
                v, size = left, size * np.maximum(1, v / left)  # rounding of a difference
            root = np.sqrt(v) + o.epsilon
            update, size = g / root, size / root
            if o.momentum:
                state["momentum_buffer"] = update = o.momentum * state["momentum_buffer"] + update
                self.size = size = o.momentum * self.size + size
            self.state = list(state.values())
            update, size = -rate * update, abs(rate) * size
        elif self.kind == "adagrad":
            self.state = [self.state[0] + g * g]
            factor = rate / (1 + (self.steps - 1) * o.lr_decay) / (np.sqrt(self.state[0]) + o.epsilon)
            update, size = -factor * g, np.abs(factor) * size * (1 + self.steps / 100)
        else:
            m, v, *most = self.state
            m = o.beta1 * m + (1 - o.beta1) * g
            v = o.beta2 * v + (1 - o.beta2) * g * g
            most = [np.maximum(most[0], v)] if most else []
            self.state, self.size = [m, v, *most], o.beta1 * self.size + (1 - o.beta1) * size
            root = np.sqrt((most[0] if most else v) / (1 - o.beta2**self.steps)) + o.epsilon
            if self.kind == "nadam":
                mu, following = self._mu(self.steps), self._mu(self.steps + 1)
                kind = np.float32 if o.float32_product else np.float64  # PyTorch's product is a tensor of its default type
                for k in range(self.steps if self.product is not None else 1, self.steps + 1):  # all of them once resumed
                    self.product = kind((1 if k == 1 else self.product) * kind(self._mu(k)))
                product = float(self.product)
                direct, enter = (1 - mu) / (1 - product), following / (1 - product * following)
                update = -rate * (direct * g + enter * m) / root
                size = abs(rate) * (abs(direct) * size + abs(enter) * self.size) / root
            else:
                factor = rate / (1 - o.beta1**self.steps) / root
                update, size = -factor * m, abs(factor) * self.size
            if decoupled and o.weight_decay:
                update, size = update - rate * decay, size + np.abs(rate * decay)
        return update, self.tolerance * size + 4 * self.epsilon * np.abs(w)


# ---- files


def _open(path, flags):
    """Opens a regular file (or, with O_DIRECTORY, a folder) and nothing else: follows no link, waits for no FIFO. Never
    descriptor 0, 1 or 2: where a standard stream is closed, what others print would go into the file."""
    folder = flags & os.O_DIRECTORY
    try:
        file = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | (0 if folder else os.O_NOFOLLOW), 0o666)
    except OSError as error:
        if flags & os.O_CREAT and not isinstance(error, FileExistsError):
            raise
        raise RecordError(f"{path} is no {'folder' if folder else 'regular file of a run'}: {error.strerror}") from None
    if file < 3:
        low, file = file, fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    if not (folder or stat.S_ISREG(os.fstat(file).st_mode)):
        os.close(file)
        raise RecordError(f"{path} is no regular file")
    return file


_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL


def _save(path, array):
    with os.fdopen(_open(path, _NEW), "wb") as file:
        np.save(file, array)


def _load(path):
    """The array of a .npy file, mapped."""
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        try:
            major, _ = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype.hasobject or not math.prod(shape):
                raise ValueError("no numbers")
            return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")
        except ValueError as error:
            raise RecordError(f"{path} is no array as a run has them: {error}") from None


class _Growing:
    """A .npy file that grows by whole rows. Its header is brought up to date after the data, so that np.load
    can always read it; pathkernel-decompose goes by the size of the file and sees every row."""

    def __init__(self, path, dtype, row_shape=(), resume=False):
        self.path, self.dtype, self.row_shape = path, np.dtype(dtype).newbyteorder("<"), tuple(row_shape)
        self.row_bytes = self.dtype.itemsize * math.prod(self.row_shape)
        self.rows = self.appends = 0
        self.room = -(-len(self._header(10**19, 0)) // 64) * 64
        self.file = _open(path, os.O_RDWR if resume else _NEW)
        if not resume:
            os.write(self.file, self._header(0, self.room))
            return
        with os.fdopen(os.dup(self.file), "rb") as file:
            start = file.read(self.room)
        text = start[10:].decode("latin-1")
        wanted = re.escape(self._header(0, 0)[10:].decode("ascii").strip()).replace(r"\(0,", r"\((\d+),")
        if len(start) < self.room or start[:8] != b"\x93NUMPY\x01\x00" or not re.match(wanted, text):
            os.close(self.file)
            raise RecordError(f"{path} cannot be resumed: it does not start as this recording would write it")
        self.rows = (os.fstat(self.file).st_size - self.room) // self.row_bytes

    def _header(self, rows, room):
        text = (
            f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {(rows, *self.row_shape)}, }}"
        )
        text = text.ljust(room - 11) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii")

    def append(self, *parts):
        """Arrays that, one after the other, are whole rows."""
        parts = [np.ascontiguousarray(part, self.dtype) for part in parts]
        size = sum(part.nbytes for part in parts)
        try:
            written = os.writev(self.file, parts[:1024])  # no system takes more
            if written < size:
                rest = memoryview(b"".join(parts))[written:]
                while rest:
                    rest = rest[os.write(self.file, rest) :]
        except OSError:  # a full disk: back to the rows before
            os.ftruncate(self.file, self.room + self.rows * self.row_bytes)
            raise
        self.rows, self.appends = self.rows + size // self.row_bytes, self.appends + 1
        if self.appends % 256 == 0:
            self.update()

    def row(self, number):
        row = os.pread(self.file, self.row_bytes, self.room + number * self.row_bytes)
        return np.frombuffer(row, self.dtype).reshape(self.row_shape)

    def cut(self, rows):
        """Only the first rows stay, and what comes is written after them."""
        os.ftruncate(self.file, self.room + rows * self.row_bytes)
        os.lseek(self.file, 0, os.SEEK_END)
        self.rows = rows
        self.update()

    def update(self):
        os.pwrite(self.file, self._header(self.rows, self.room), 0)

    def close(self, update=True):
        try:
            if update:
                self.update()
        finally:
            os.close(self.file)


_INTEGERS, _NUMBERS = ("batch_offsets", "batch_items"), ("learning_rates", "batch_weights", "gradient_scales")
_ITEMS = ("batch_items", "batch_weights", "loss_gradients")  # a row for each item of a batch
# In the order in which a step writes them. optimizer_samples.npy is the recorder's own: the optimizer's vectors at
# a few weights, by which it knows, when it resumes, the state that the recorded steps give.
_FILES = (*_NUMBERS, "momenta", "group_rates", "loss_gradients", *_INTEGERS, "second_moments", "optimizer_samples", "weights")

# A process that is forked from one that records (a worker of a DataLoader) writes nothing, and holds no lock.
_RECORDING = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [record._close(False) for record in list(_RECORDING)])


# ---- values


def _numbers(values):
    if not torch.is_tensor(values):
        return np.asarray(values)
    values = values.detach()
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().numpy()


def _double(tensor):
    return tensor.cpu().numpy().astype(np.float64)


def _array(values, what):
    """Training data as an array of numbers, or of int64 where they are integers."""
    if torch.is_tensor(values) and values.dtype in (torch.bfloat16, torch.float16):
        raise RecordError(f"{what} are {values.dtype}, not float32 or float64; pass what the model is given")
    try:
        values = _numbers(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecordError(f"{what} are no array of numbers: {error}") from None
    if values.ndim == 0:
        raise RecordError(f"{what} are a single number, not rows")
    if values.dtype.kind in "biu":
        return values.astype(np.int64)
    if values.dtype not in (np.float32, np.float64):
        raise RecordError(f"{what} are {values.dtype}, not float32 or float64; pass what the model is given")
    if not np.isfinite(values).all():
        raise RecordError(f"{what} hold a NaN or an infinity")
    return values


def _version(values):
    """A number that grows whenever torch writes to a tensor; None where there is none."""
    return values._version if torch.is_tensor(values) and not values.is_inference() else None


class _Watched:
    """Training data as the user holds it, in order to see whether it changes while it is recorded."""

    def __init__(self, values, what):
        self.what, self.values = what, values if torch.is_tensor(values) else np.asarray(values)
        self.version, self.flat = _version(values), None
        if torch.is_tensor(values) and values.device.type == "cpu":
            values = _numbers(values)
        if isinstance(values, np.ndarray) and values.flags.c_contiguous:
            self.flat = values.reshape(len(values), -1)
            self.columns = _spread(self.flat.shape[1], 4)
            self.kept = np.ascontiguousarray(self.flat[:, self.columns])

    def touched(self):
        return _version(self.values) != self.version

    def differs(self, recorded, items=None):
        """Whether these rows (or all) differ from the recorded ones. Unless torch has written to them or all are asked
        for, only a few numbers of a few rows are looked at."""
        if items is not None and not self.touched():
            few = items[:32]
            return self.flat is not None and not (self.flat[few[:, None], self.columns] == self.kept.take(few, 0)).all()
        rows = slice(None) if items is None else torch.as_tensor(items) if torch.is_tensor(self.values) else items
        now, recorded = _numbers(self.values[rows]), recorded[slice(None) if items is None else items]
        return not np.array_equal(now.astype(recorded.dtype).reshape(-1), recorded.reshape(-1))


def _spread(size, count):
    """Up to count positions in an array of some size, anywhere in it, always the same ones."""
    return np.unique(np.arange(min(size, count), dtype=np.uint64) * np.uint64(2654435761) % np.uint64(size)).astype(int)


def _unwrapped(model):
    """The model, if it is a module that can be looked into; what to pass instead is said otherwise."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise RecordError(
            f"the model is wrapped in {type(model).__name__}: pass the module in it, model.module; train through the "
            "wrapper as before"
        )
    for name, module in model.named_modules():
        which = f"its module '{name}'" if name else "the model"
        if hasattr(module, "_orig_mod"):
            raise RecordError(
                f"{which} is wrapped by torch.compile: pass the module behind it, "
                f"{'of which the model was made' if name else 'model._orig_mod'}; train through the compiled one as before"
            )
        if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise RecordError(f"{which} was made by torch.jit: pass the module that it was made from, and train that")
    return model


def _setting(value):
    """The value itself, where it is a tensor that a scheduler may change in place."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_setting, value))
    return float(value) if torch.is_tensor(value) else value


class Recorder:
    """Records the steps of a training loop; see the top of the file.

    loss        a line of the format (docs/run-directory.md), a module of torch.nn or a function of torch.nn.functional; any
                other function, or "recorded": what autograd gives each output of each example is recorded instead
    inputs      (N, ...) and targets: all training data, tensors or arrays, in the order that indices refer to
    network     the network line, where it cannot be derived; weights are then in the order of model.parameters()
    constants   {name: array} of the arrays that such a line names
    second_moments  True: also record the second moments that the optimizer divides by; otherwise they are recomputed
    check       at how many first steps the gradient is computed again and compared; from there at ever fewer, each
                1.5 times as far as the one before, and wherever something looks wrong. 0: only there
    resume      True: go on with the run in the directory, if there is one. Restore the model's and the optimizer's
                state_dict first: they have to be those after its last step. A number: those after that step of it;
                the steps after it are dropped

    record.parameters are the model's parameters in the order of the network line, which is that of weights.npy: where
    a model registers them in the order in which it uses them, that of parameters_to_vector(model.parameters()).
    record.steps is the number of recorded steps.
    """

    def __init__(
        self,
        directory,
        model,
        *,
        loss,
        optimizer,
        inputs,
        targets,
        network=None,
        constants=None,
        second_moments=False,
        check=8,
        resume=False,
    ):
        self.directory, self.model, self.optimizer = os.fspath(directory), _unwrapped(model), optimizer
        self.parameters = list(model.parameters())
        if not self.parameters:
            raise RecordError("the model has no parameters, so nothing to train")
        _check_optimizer(optimizer)
        loss = _loss_module(loss)
        loss_line(loss)  # so that it is refused first
        self.inputs, self.targets = _array(inputs, "inputs"), _array(targets, "targets")
        self.watched = [_Watched(inputs, "inputs"), _Watched(targets, "targets")]
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise RecordError(f"{len(self.inputs)} inputs and {len(self.targets)} targets")
        self.constants = {name: _numbers(array).astype(np.float64) for name, array in (constants or {}).items()}
        self.resume = None if resume is False else resume
        self.groups = _groups(model, self.parameters, optimizer)
        if self.resume is None:
            _updates_made(model, optimizer)
        self._watch_modes()
        if self._mode_problem():
            raise RecordError(self._mode_problem())
        embeds = any(isinstance(m, nn.Embedding) for m in model.modules())
        embeds = embeds or "embedding" in (network or "") or "select" in (network or "")
        wide = str(self.watched[0].values.dtype) in ("int64", "torch.int64")
        if self.inputs.dtype == np.int64 and not (wide or embeds):  # bytes or masks that the model takes as numbers
            self.inputs = self.inputs.astype(_numbers(self.parameters[0][:0]).dtype)
        shape = self._output_shape()
        if network is None:
            self._read_network()
        else:
            self.network = network
        self.net = _Line(self.network, self.constants)
        has = sum(p.numel() for p in self.parameters)
        if has != self.net.count:
            raise RecordError(f"the model has {has} parameters, '{self.network}' has {self.net.count}; is a weight in two layers?")
        flat = self.inputs.ndim < 3 and math.prod(self.inputs.shape[1:]) == math.prod(self.net.shape)
        if not flat and _axes(self.inputs.shape) != _axes((1, *self.net.shape)):
            raise RecordError(f"inputs of shape {self.inputs.shape} do not fit '{self.network}': axes in another order?")
        if len(self.net.outputs) != 1:
            raise RecordError(
                f"the outputs of '{self.network}' are {tuple(self.net.outputs)} numbers, the format has one vector"
            )
        self._check_loss(loss, shape)
        self.moments = second_moments
        self._check_outputs()
        epsilon = torch.finfo(self.parameters[0].dtype).eps
        self.check, self.steps, self.failed = check, 0, False
        trained = [group for group in self.groups if group.number is not None]
        self.updates = [_Rule(group.line, epsilon, optimizer) for group in trained]
        if second_moments and (not self.updates[0].moments or len({update.moments for update in self.updates}) > 1):
            raise RecordError(
                "second_moments=True is for Adam, AdamW, NAdam, Adagrad and RMSprop without momentum that is not centered"
            )
        # Of every trained parameter a few numbers, at which each step is looked at; and which of them are of each group.
        self.trained = sorted(i for group in trained for i in group.members)
        self.places = [_spread(self.parameters[i].numel(), 16) for i in self.trained]
        self.starts = np.cumsum([0] + [len(places) for places in self.places])
        spans = dict(zip(self.trained, zip(self.starts, self.starts[1:])))
        self.columns = [np.concatenate([np.arange(*spans[i]) for i in group.members]) for group in trained]
        self.moving = {"adam": "beta1", "adamw": "beta1", "nadam": ""}.get(self.updates[0].kind, "momentum")
        self.frozen = [p for i, p in enumerate(self.parameters) if i not in spans]
        self.rated = [g.number for g in self.groups[1:]] if any(g.number is not None for g in self.groups[1:]) else []
        self.files, self.lock, self.pending, self.scale, self.settings, self.mean, self.momentum = None, None, [], None, None, (), 0.0
        self.arriving, self.parts, self.calls, self.rows, self.last, self.unit, self.divided = None, [], [], 0, None, None, None
        self.watching, self.begun, self.initial = None, 0, None  # begun: the optimizer's updates before step 0
        self.clipped = False  # whether the gradient is the one that clip() has seen

    def _read_network(self):
        """The line, the parameters in its order and its arrays, from the graph of what the model computes."""
        model, first = self.model, self.parameters[0]
        if first.device.type != "cpu":
            model = copy.deepcopy(model).cpu()
        rows = torch.as_tensor(np.array(self.inputs[:8]))
        compiled = [(m, m.__dict__.pop("_compiled_call_impl")) for m in model.modules() if "_compiled_call_impl" in m.__dict__]
        try:
            with torch.random.fork_rng([]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                network = read_network(model, rows.to(first.dtype) if rows.is_floating_point() else rows)
        except Unsupported as error:
            raise RecordError(f"the model cannot be recorded: {error}. Where the language has it, pass network=") from error
        except RecordError:
            raise
        except Exception as error:
            raise RecordError(
                f"the model cannot be followed on the first rows of inputs, {rows.dtype} {tuple(self.inputs.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for module, call in compiled:
                module.__dict__["_compiled_call_impl"] = call
        same = {id(a): b for a, b in zip(model.parameters(), self.model.parameters())}
        self.network, self.constants = network.line, network.constants
        self.parameters = [same[id(p)] for p in network.parameters]
        self.groups = _groups(self.model, self.parameters, self.optimizer)

    def _output(self, rows, seed=0):
        """What the model gives for rows: its first output, if it gives several."""
        first = self.parameters[0]
        with torch.random.fork_rng([first.device] if first.is_cuda else []), torch.no_grad():
            torch.manual_seed(seed)
            out = nn.Module._call_impl(self.model, rows)  # not what module.compile() has made of it
        out = out[0] if isinstance(out, (tuple, list)) and out else out
        if not torch.is_tensor(out) or out.ndim < 1 or len(out) != len(rows):
            what = f"a tensor of shape {tuple(out.shape)}" if torch.is_tensor(out) else f"a {type(out).__name__}"
            raise RecordError(
                f"the model returns {what} for {tuple(rows.shape)}; return the tensor of its outputs, the rows first"
            )
        return out

    def _output_shape(self):
        rows = self._rows(slice(2))
        try:
            once, again = self._output(rows), self._output(rows, 1)
            if not torch.equal(once.nan_to_num(), again.nan_to_num()):
                raise RecordError(f"the model gives the same rows other outputs each time: it (a dropout by function?) {_RANDOM}")
            return tuple(once.shape[1:])
        except RecordError:
            raise
        except Exception as error:
            raise RecordError(
                f"the model does not take the first rows of inputs, {rows.dtype} {tuple(rows.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _rows(self, rows):
        """Rows of the inputs as the model takes them."""
        rows, first = torch.as_tensor(np.array(self.inputs[rows])), self.parameters[0]
        return rows.to(first) if rows.is_floating_point() else rows.to(first.device)

    @contextlib.contextmanager
    def _other_weights(self):
        """The model with random weights, no two alike, which tell every parameter from every other."""
        first, generator = self.parameters[0], torch.Generator().manual_seed(0)
        saved = [p.detach().clone() for p in self.parameters]
        with torch.random.fork_rng([first.device] if first.is_cuda else []), torch.no_grad():
            try:
                for p in self.parameters:
                    random = torch.randn(p.shape, generator=generator)
                    p.copy_(random / max(p[:1].numel(), 1) ** 0.5 if p.ndim > 1 else 1 + random / 2)
                for module in self.model.modules():
                    if getattr(module, "padding_idx", None) is not None:  # its row is zeros, and stays so
                        module.weight[module.padding_idx] = 0
                yield
            finally:
                for p, value in zip(self.parameters, saved):
                    p.copy_(value)

    def _watch_modes(self):
        """Modules that draw random numbers or couple the examples of a batch when they train, and their numbers."""
        kinds = nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm
        named = [(f"'{name}' ({type(m).__name__})", m) for name, m in self.model.named_modules()]
        self.random = [(name, m) for name, m in named if isinstance(m, kinds[0]) and m.p]
        self.random += [(name, m) for name, m in named if getattr(m, "dropout", None) and isinstance(m, nn.MultiheadAttention)]
        self.random += [(name, m) for name, m in named if isinstance(m, nn.RNNBase) and m.dropout and m.num_layers > 1]
        self.random += [(name, m) for name, m in named if isinstance(m, nn.RReLU)]
        self.norms = [(name, m) for name, m in named if isinstance(m, kinds[1]) and not isinstance(m, _INSTANCE)]
        self.fixed = [(b, b._version) for _, m in self.norms for b in (m.running_mean, m.running_var) if b is not None]

    def _mode_problem(self):
        """What is wrong with the modes of modules, if anything."""
        for name, module in self.random:
            if module.training:
                return f"module {name} is in training mode: its dropout {_RANDOM}"
        for name, module in self.norms:
            if module.training or module.running_mean is None:
                return f"module {name} is in training mode: {_COUPLES}"
        if any(b._version != version for b, version in self.fixed):
            return "the running statistics of a BatchNorm have changed since the recording began"
        return None

    def _check_loss(self, loss, shape):
        """The loss line, and targets as it takes them. shape: of the model's outputs for one row."""
        y, outputs, line = self.targets, self.net.outputs[0], loss_line(loss, self.targets)
        several = len(_axes((1, *shape))) > 1
        if several and line.split()[0] in ("softmax_cross_entropy", "nll", "hinge", "kl_div"):
            line = "recorded"  # a class for each position
        self.loss = _Loss(line, getattr(loss, "reduction", "batchmean"))
        if line == "recorded":
            if y.ndim > 1:
                self.targets = y.reshape(len(y), -1)
            return
        if y.dtype == np.int64 and y.ndim == 2 and y.shape[1] == outputs > 1:  # vectors of integers: one-hot, bits
            self.targets = y = y.astype(_numbers(self.parameters[0][:0]).dtype)
        wanted = _axes((1, *shape))
        if y.ndim > 1 and _axes(y.shape) == ([] if y.dtype == np.int64 or outputs == 1 else wanted):
            self.targets = y = y.reshape(len(y), -1) if y.dtype != np.int64 else y.reshape(-1)
        if y.dtype == np.int64:
            classes = y[~self.loss.is_ignored(y)] if y.ndim == 1 else y
            if y.ndim != 1 or (outputs > 1 and classes.size and not (0 <= classes.min() and classes.max() < outputs)):
                raise RecordError(
                    f"integer targets are classes, shape (N,), from 0 to {outputs - 1}; these have shape "
                    f"{y.shape}, from {y.min()} to {y.max()}"
                )
        elif y.shape != (len(y), outputs) and (outputs != 1 or y.ndim != 1):
            raise RecordError(f"targets have shape {y.shape}, the network has {outputs} outputs")

    def _check_outputs(self):
        """The model is the network of the line, with weights in the order of self.parameters."""
        self._compare_outputs()
        with self._other_weights():
            self._compare_outputs()

    def _compare_outputs(self):
        order = {id(p): n for n, p in self.model.named_parameters()}
        first, rows = self.parameters[0], self._rows(slice(8))
        given = self._output(rows)
        with torch.no_grad():
            wanted = self.net(self._weights().double(), torch.as_tensor(np.array(self.inputs[:8])).double())
        given = given.double().cpu()
        if given.numel() != wanted.numel():
            raise RecordError(
                f"the model maps {tuple(rows.shape)} to {tuple(given.shape)}, not to "
                f"{tuple(wanted.shape)} as '{self.network}' does"
            )
        given = given.reshape(wanted.shape)
        error = (given - wanted).abs().max() / (1 + wanted.abs().max())
        if not error < (1e-4 if first.dtype == torch.float32 else 1e-7):
            raise RecordError(
                f"the model is not '{self.network}' with the weights in the order of "
                f"{', '.join(order.get(id(p), '?') for p in self.parameters)}: outputs differ by {error:.2g}"
            )

    def _weights(self):
        return torch.cat([p.detach().reshape(-1).cpu() for p in self.parameters])

    # ---- start and end

    def __enter__(self):
        missing = os.path.abspath(self.directory)  # and the folders above it that are to be made
        self.made, self.created = [], []
        while not os.path.lexists(missing):
            self.made.append(missing)
            missing = os.path.dirname(missing)
        try:
            with contextlib.suppress(FileExistsError):  # _open says it
                os.makedirs(self.directory, exist_ok=True)
            self.lock = _open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
            self._take_lock()
            self.indices = [torch.as_tensor(places) for places in self.places]
            if self.resume is not None and os.path.lexists(self._path("run.txt")):
                self._continue()
            else:
                self._start()
            self._watch()
        except BaseException:
            self._close(False)
            self._remove()
            raise
        return self

    def __exit__(self, kind, error, trace):
        self._unwatch()
        problem = None
        try:
            if kind is None and self.files is not None and not self.failed:
                problem = self._end_problem()
        finally:
            forked, refused = self.files is None, isinstance(error, RecordError)
            self._close()
            # Nothing is left of a script that was wrong from its start, so that the corrected one can run.
            if not forked and (kind is not None and not self.steps or refused and self.steps < 4):
                self._remove()
        if problem:
            raise RecordError(f"after {self.steps} steps in {self.directory}: {problem}")

    def _path(self, name):
        return os.path.join(self.directory, name)

    def _take_lock(self):
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(f"{self.directory} is being recorded by another recorder") from None
        except OSError:  # a file system without locks: go without
            pass

    def _arrays(self):
        arrays = {f"constant_{name}": array for name, array in self.constants.items()}
        if self.initial is not None:
            arrays["initial_state"] = self.initial
        return {**arrays, "train_inputs": self.inputs, "train_targets": self.targets}

    def _text(self):
        text = f"pathkernel-run 1\nnetwork   {self.network}\nloss      {self.loss.line}\noptimizer {self.groups[0].line}\n"
        text += f"initial_step {self.begun}\n" if self.begun else ""
        return text + "".join(f"group     {group.text()}\n" for group in self.groups[1:])

    def _begin(self):
        """The state that the optimizer has already, if it has made steps before."""
        self.begun = _updates_made(self.model, self.optimizer)
        vectors = max(len(update.vectors) for update in self.updates)
        if not self.begun or not vectors:
            return
        self.initial = np.zeros((vectors, sum(p.numel() for p in self.parameters)))
        ends = np.cumsum([0] + [p.numel() for p in self.parameters])
        no = lambda reason: RecordError(f"the optimizer has made steps before, and {reason}")
        for update, group, state in zip(self.updates, self.groups, self._states(no, 0)):
            for i in group.members:
                own = self.optimizer.state[self.parameters[i]]
                for k, name in enumerate(update.vectors):
                    self.initial[k, ends[i] : ends[i + 1]] = _double(own[name].detach()).reshape(-1)
                if torch.is_tensor(own.get("mu_product")):  # it tells whether the betas were those of now
                    kind, product = np.float32 if update.options.float32_product else np.float64, 1.0
                    for n in range(1, self.begun + 1):
                        product = kind(product * kind(update._mu(n)))
                    if abs(float(own["mu_product"]) - product) > 1e-6 * product:
                        raise no(
                            "NAdam's mu_product is not that of the betas and the momentum_decay of now, by which the format "
                            "computes it: begin with a fresh optimizer"
                        )
            update.resume(state, self.begun)
        if not np.isfinite(self.initial).all():
            raise no("its state holds a NaN or an infinity")

    def _start(self):
        """Writes what a run starts with, into a folder that has no run yet."""
        self._begin()
        arrays = self._arrays()
        names = [f + ".npy" for f in dict.fromkeys((*_FILES, *arrays, "initial_state"))] + ["run.txt"]
        cut_off = os.path.lexists(self._path("run.txt.tmp")) and not os.path.lexists(self._path("run.txt"))
        if cut_off:  # a start that was killed: nothing is recorded there
            with os.fdopen(_open(self._path("run.txt.tmp"), os.O_RDONLY), "rb") as file:
                cut_off = file.read(16) in (b"pathkernel-run 1", b"")
        for name in names if cut_off else ():
            if os.path.lexists(self._path(name)):
                os.unlink(self._path(name))
        for name in names + ["run.txt.tmp"] * (not cut_off):
            if os.path.lexists(self._path(name)):
                raise RecordError(
                    f"{self._path(name)} exists already: record elsewhere, or go on with this run (resume=True)"
                )
        if cut_off:
            os.unlink(self._path("run.txt.tmp"))
        self.created += names + ["run.txt.tmp"]
        with os.fdopen(_open(self._path("run.txt.tmp"), _NEW), "w", encoding="ascii", newline="\n") as file:
            file.write(self._text())
            file.flush()
            os.fsync(file.fileno())
        for name, array in arrays.items():
            _save(self._path(name + ".npy"), np.ascontiguousarray(array))
        self._open_files(False)
        self.files["batch_offsets"].append(0)
        self.files["weights"].append(self._weights().numpy())
        # With its manifest the directory is a run: the last thing to appear.
        os.replace(self._path("run.txt.tmp"), self._path("run.txt"))
        os.fsync(self.lock)

    def _open_files(self, resume):
        weights, self.files = self._weights().numpy(), {}
        rated, vectors = bool(self.rated), max(len(update.vectors) for update in self.updates)
        shapes = {"second_moments": weights.shape, "weights": weights.shape, "group_rates": (len(self.groups) - 1,)}
        shapes.update(loss_gradients=self.net.outputs, optimizer_samples=(vectors, int(self.starts[-1])))
        absent = {"second_moments": not self.moments, "optimizer_samples": not vectors, "group_rates": not rated}
        absent["momenta"] = not (resume and os.path.lexists(self._path("momenta.npy")))
        absent["loss_gradients"] = self.loss.line != "recorded"
        for name in _FILES:
            if not absent.get(name):
                kind = "<i8" if name in _INTEGERS else "<f8"
                kind = weights.dtype if name in ("second_moments", "weights", "loss_gradients") else kind
                self.files[name] = _Growing(self._path(name + ".npy"), kind, shapes.get(name, ()), resume)

    def _continue(self):
        """Goes on with the run in the folder, if it is this one, and the model and the optimizer stand where it does."""

        def no(reason):
            return RecordError(f"{self.directory} cannot be resumed: {reason}")

        moved = os.path.lexists(self._path("momenta.npy"))
        with os.fdopen(_open(self._path("run.txt"), os.O_RDONLY), "rb") as file:
            said = [line.split("#")[0].split() for line in file.read(2**24).decode("latin-1").splitlines()]
        self.begun = next((int(words[1]) for words in said if words[:1] == ["initial_step"] and words[1:]), 0)
        if os.path.lexists(self._path("initial_state.npy")):
            self.initial = _load(self._path("initial_state.npy"))
        for was, now in itertools.zip_longest(filter(None, said), map(str.split, self._text().splitlines())):
            if was != now and not (moved and was and now and self._fixed(" ".join(was)) == self._fixed(" ".join(now))):
                raise no(f"its run.txt says '{' '.join(was or ())}', not '{' '.join(now or ())}'")
        for name, array in self._arrays().items():
            there = _load(self._path(name + ".npy"))
            if there.dtype != array.dtype or there.shape != array.shape or not np.array_equal(there, array):
                raise no(f"{name}.npy holds other data than was given")
        if os.path.lexists(self._path("second_moments.npy")) != bool(self.moments):
            raise no("second_moments has to be as it was")
        self._open_files(True)
        files, weights = self.files, self.files["weights"]
        counts = {name: file.rows - (name in ("weights", "batch_offsets")) for name, file in files.items()}
        offsets = files["batch_offsets"]
        items = min(files[name].rows for name in _ITEMS if name in files)
        while counts["batch_offsets"] > 0 and offsets.row(counts["batch_offsets"]) > items:
            counts["batch_offsets"] -= 1
        complete = min(count for name, count in counts.items() if name not in _ITEMS)
        if counts["weights"] > complete or complete < 0:
            raise no(f"weights.npy has {counts['weights']} steps, another file only {complete}; a kill does not do that")
        steps = complete if self.resume is True else int(self.resume)
        if not 0 <= steps <= complete:
            raise no(f"it has {complete} steps, so not at step {steps}")
        now = self._weights().numpy()
        if not np.array_equal(weights.row(steps), now):
            near = range(complete, max(complete - 1000, -1), -1)
            at = next((k for k in near if np.array_equal(weights.row(k), now)), None)
            if at is None:
                raise no(
                    f"the model's weights are not those after its step {steps}: restore the state_dict of the model and "
                    f"the optimizer as they were then (after an earlier step K: resume=K drops the steps after it)"
                )
            raise no(
                f"the model's weights are those after step {at}, the run goes on to step {complete}: restore a later "
                f"state_dict, or drop the steps after it by resume={at}"
            )
        recorded = files["optimizer_samples"].row(steps - 1) if steps and "optimizer_samples" in files else None
        tolerance = 1e-3 if self.updates[0].epsilon > 1e-10 else 1e-9
        for update, columns, state in zip(self.updates, self.columns, self._states(no, steps) if steps else []):
            for name, there, here in zip(update.vectors, recorded if update.vectors else (), state):
                if not np.linalg.norm(here - there[columns]) <= tolerance * np.linalg.norm(there[columns]):
                    raise no(
                        f"the optimizer's {name} is not the one that the recorded steps give: restore its state_dict as it "
                        f"was after step {steps}"
                    )
        if not steps:
            self._continue_at_start(no)
        for update, columns in zip(self.updates, self.columns):
            if steps:
                state = [] if recorded is None else [row[columns] for row in recorded[: len(update.vectors)]]
                update.resume(state, self.begun + steps)
        weights.cut(steps + 1)  # first, since it says how many steps there are
        end = int(offsets.row(steps))
        for name, file in files.items():
            file.cut(end if name in _ITEMS else steps + (name in ("weights", "batch_offsets")))
        self.steps = steps

    def _continue_at_start(self, no):
        """Goes on with a run of no steps: the optimizer has to be as the run begins."""
        begun, initial = self.begun, self.initial
        self.begun, self.initial = 0, None
        self._begin()
        same = initial is None if self.initial is None else initial is not None and np.array_equal(initial, self.initial)
        if self.begun != begun or not same:
            raise no(
                f"it begins with an optimizer that has made {begun} steps"
                f"{' and has another state' if self.begun == begun else f', this one has made {self.begun}'}"
            )

    def _states(self, no, steps):
        """The optimizer's vectors at the numbers that are looked at, of each group; steps: since step 0."""
        for update, group in zip(self.updates, self.groups):
            states = [self.optimizer.state.get(self.parameters[i], {}) for i in group.members]
            for state in states:
                lacks = [name for name in update.vectors if not torch.is_tensor(state.get(name))]
                if lacks:
                    raise no(f"the optimizer has no {lacks[0]}: restore its state_dict as it was after step {steps}")
                if "step" in state and update.kind != "sgd" and int(state["step"]) != steps + self.begun:
                    made = int(state["step"])
                    raise no(f"the optimizer has made {made} steps, not {steps + self.begun}: restore its state_dict")
                product = state.get("mu_product")
                if update.options.float32_product and torch.is_tensor(product) and product.dtype == torch.float64:
                    raise no(
                        "load_state_dict has made NAdam's mu_product float64, it was float32: for state in "
                        "optimizer.state.values(): state['mu_product'] = state['mu_product'].float()"
                    )
            at = [self.trained.index(i) for i in group.members]
            yield [
                np.concatenate([_double(self._take(state[name], k)) for k, state in zip(at, states)])
                for name in update.vectors
            ]

    def _close(self, update=True):
        files, self.files, self.pending, lock, self.lock = self.files or {}, None, [], self.lock, None
        _RECORDING.discard(self)
        try:
            for file in files.values():
                file.close(update)
        finally:
            if lock is not None:
                os.close(lock)

    def _remove(self):
        """What this recorder has put on the disk."""
        for name in reversed(self.created):
            with contextlib.suppress(OSError):
                os.unlink(self._path(name))
        for folder in self.made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    # ---- steps

    def _watch(self):
        """Looks at settings and gradients when the optimizer steps: a scheduler changes the rate right after that, and
        zero_grad the gradients. And at what autograd gives each parameter, which is what the gradient should be."""
        self.first = self.next_check = self.steps
        self.inputs, self.targets = _load(self._path("train_inputs.npy")), _load(self._path("train_targets.npy"))
        self.fixed_weights = [(p, p._version) for p in self.frozen]
        trained = [self.parameters[i] for i in self.trained]
        self.at, self.seen = _double(self._sample(trained)), [None] * len(trained)

        def arrived(i, gradient):
            self._pass_begins()
            if self.mark is None:
                grad = trained[i].grad
                self.mark = trained[i], grad, None if grad is None else grad._version
            self.arriving.append((i, self._take(gradient, i)))

        self.hooks = [p.register_hook(functools.partial(arrived, i)) for i, p in enumerate(trained)]
        if self.loss.line == "recorded":
            self.hooks.append(self.model.register_forward_hook(self._called))

        def before(*_):
            groups = self.optimizer.param_groups
            self.now = [{k: _setting(v) for k, v in group.items() if k != "params"} for group in groups]

        def after(*_):
            if self.files is not None:
                self._stepped(self.now)

        if hasattr(self.optimizer, "register_step_post_hook"):  # torch 2: next to the step, inside of others' hooks
            self.hooks.append(self.optimizer.register_step_pre_hook(before))
            self.hooks.append(self.optimizer.register_step_post_hook(after))
            self.optimizer._optimizer_step_post_hooks.move_to_end(self.hooks[-1].id, last=False)
        else:
            self.before, step = self.optimizer.__dict__.get("step"), self.optimizer.step

            @functools.wraps(step)
            def watched(optimizer, *arguments, **options):
                before()
                result = step(*arguments, **options)
                after()
                return result

            # A method, as schedulers want it.
            self.watching = self.optimizer.step = types.MethodType(watched, self.optimizer)
        _RECORDING.add(self)

    def _unwatch(self):
        for hook in self.hooks:
            hook.remove()
        if self.optimizer.__dict__.get("step", self) is self.watching:  # a scheduler may have put its own in front of it
            del self.optimizer.step
            if self.before is not None:
                self.optimizer.step = self.before

    def _refusal(self, reason):
        return RecordError(f"step {self.steps}: {reason}")

    def _take(self, tensor, i):
        tensor = tensor.detach() if tensor.requires_grad else tensor
        try:
            return tensor.take(self.indices[i])
        except RuntimeError:  # the tensor is on another device than before
            self.indices[i] = self.indices[i].to(tensor.device)
            return tensor.take(self.indices[i])

    def _sample(self, tensors):
        """A few numbers of one tensor for each parameter."""
        return torch.cat([self._take(t, i) for i, t in enumerate(tensors)])

    def _fixed(self, line):
        """An optimizer line without what momenta.npy has."""
        return [word for word in line.split() if not self.moving or not word.startswith(self.moving + "=")]

    def _move_momentum(self, settings):
        """OneCycleLR, CyclicLR or the user may have moved the momentum, or beta1: from then on there is a file of it."""
        trained = [group.number for group in self.groups if group.number is not None]
        momenta = [settings[g]["betas"][0] if "betas" in settings[g] else settings[g].get("momentum", 0) for g in trained]
        self.momentum = momenta[0]
        if "momenta" not in self.files:
            was = [dict(w.split("=") for w in g.line.split()[1:]).get(self.moving, 0) for g in self.groups[: len(trained)]]
            if list(map(float, was)) == momenta or not self.moving:
                return
            new, path = self._path("momenta.npy.tmp"), self._path("momenta.npy")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            self.created += ["momenta.npy.tmp", "momenta.npy"]
            file = _Growing(new, "<f8")
            file.append([float(was[0])] * self.steps)
            file.update()
            os.replace(new, path)
            files = {**self.files, "momenta": file}
            self.files = {name: files[name] for name in _FILES if name in files}
            if any(m != was[0] for m in was):
                momenta = [*momenta, None]
        if any(m != momenta[0] for m in momenta) or not 0 < momenta[0] < 1:
            raise self._refusal(
                f"a schedule moves the momentum of groups to {momenta}; where it moves, the format has one between 0 and 1 for all"
            )
        for update in self.updates:
            setattr(update.options, self.moving, self.momentum)

    def _called(self, module, inputs, outputs):
        """The model was called: what autograd gives its outputs is what the loss makes of them."""
        outputs = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
        if torch.is_tensor(outputs) and outputs.requires_grad and self.files is not None:

            def arrived(gradient, number=len(self.calls)):
                self._pass_begins()
                self.returning.append((number, gradient.detach()))

            outputs.register_hook(arrived)
            self.calls.append([])

    def _pass_begins(self):
        """A backward pass has reached outputs or parameters; what it does to the gradients shows when it ends."""
        if self.arriving is None:
            self.arriving, self.returning, self.mark = [], [], None
            torch.autograd.Variable._execution_engine.queue_callback(self._pass_ends)

    def _pass_ends(self):
        arriving, returning, self.arriving = self.arriving, self.returning, None
        if self.mark is None:
            return
        parameter, was, version = self.mark
        if parameter.grad is None or (parameter.grad is was and was._version == version):
            return  # torch.autograd.grad: for another purpose
        self.clipped = False
        for i, values in arriving:
            self.seen[i] = values if self.seen[i] is None else self.seen[i] + values
        for number, gradient in returning:
            self.calls[number].append(gradient)

    def _loss_gradients(self, step, items):
        """Of the outputs of each example of the step, in the order of the calls that made them."""
        calls, self.calls = [sum(call[1:], call[0]) for call in self.calls if call], []
        while len(calls) > 1 and sum(map(len, calls)) > len(items):  # those before zero_grad: the gradient has to tell
            calls.pop(0)
            step.ratio = None
        self.rows = len(items)
        count, outputs = sum(map(len, calls)), self.net.outputs[0]
        if any(call[0].numel() != outputs for call in calls if len(call)):
            shape = next(tuple(call.shape) for call in calls if call[0].numel() != outputs)
            raise self._refusal(
                f"the model gave outputs of {shape}, which are not the {outputs} numbers for a row that it gives for inputs "
                "alone: has it another forward in training?"
            )
        if count != len(items):
            raise self._refusal(
                f"the loss had outputs of {count} rows since the last record(), and indices are {len(items)}: are they those "
                "of all calls of the model that the gradient comes from, in their order? (A model that is trained through a "
                "compiled wrapper needs a loss that the format names.)"
            )
        return torch.cat([call.reshape(len(call), -1) for call in calls]).cpu()

    def _stepped(self, settings):
        """The optimizer has made a step: takes what record() needs, before others change it."""
        found = getattr(self.optimizer, "found_inf", None)  # of a GradScaler, where the optimizer looks at it itself
        if found is not None and float(found):
            return
        gradients = [self.parameters[i].grad for i in self.trained]
        if any(g is None for g in gradients):
            name = self._name(self.starts[next(i for i, g in enumerate(gradients) if g is None)])
            raise self._refusal(
                f"parameter '{name}' has no gradient, and the optimizer leaves it out: freeze it (requires_grad_(False)), or "
                "let each step's loss depend on it"
            )
        taken, seen, self.seen = self._sample(gradients), self.seen, [None] * len(gradients)
        seen = None if any(values is None for values in seen) else torch.cat(seen)
        step = types.SimpleNamespace(settings=settings, taken=taken, seen=seen, whole=None, scale=self.scale)
        step.ratio, self.clipped = self._ratio(step), False
        rows = sum(len(call[0]) for call in self.calls if call)
        if self._due() or not self._is_known(step) or rows != self.rows:
            step.whole = [g.detach().clone() for g in gradients]
        self.pending.append(step)

    def _due(self):
        """Whether the gradient of this step is looked at in any case."""
        step = self.steps + len(self.pending)
        return bool(self.check) and step >= self.next_check

    def _ratio(self, step):
        """The factor between what the optimizer was given and what autograd computed: 1, or one for all that clipping or a
        GradScaler applied; None where there is no such factor (another backward pass before zero_grad, say)."""
        if step.seen is None or not step.seen.any():
            return None
        if torch.equal(step.seen, step.taken):
            return 1.0
        seen, taken = _double(step.seen), _double(step.taken)
        square = seen @ seen
        ratio = float(seen @ taken / square) if square and math.isfinite(square) else 0.0
        most = np.maximum.reduceat(np.abs(seen), self.starts[:-1]).repeat(np.diff(self.starts))
        alike = np.abs(taken - ratio * seen) <= 100 * self.updates[0].epsilon * abs(ratio) * most
        return ratio if ratio and alike.all() else None

    def _is_known(self, step):
        """Whether the factor of the step's gradient is known without computing the gradient again."""
        if step.ratio is None or self.parts and self.divided is None:
            return False
        if step.scale is not None:
            return abs(step.ratio - step.scale) <= 1e-4 * abs(step.scale)
        if step.ratio == 1 or self.unit == 1 or self.loss.line == "recorded":
            return True
        return self.last is not None and abs(step.ratio - self.last[0]) <= 1e-6 * abs(self.last[0])

    def clip(self, max_norm, norm_type=2.0):
        """clip_grad_norm_ on the model's parameters, remembered for this step. Returns the norm before."""
        norm = clip_grad_norm_(self.parameters, max_norm, norm_type)
        # The same expression in the same precision as clip_grad_norm_'s: the factor to the last bit.
        factor = float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        self.scale, self.clipped = factor * (self.scale if self.clipped else 1.0), True  # twice the same gradient?
        return norm

    def __call__(self, indices, weights=None, gradient_scale=None):
        """Records the optimizer step that was just made.

        indices         rows of inputs and targets in its batch, which may repeat; or a mask of all rows
        weights         of each example's loss in the objective; default: those of the loss module's reduction, a mean where the
                        loss is given as a line
        gradient_scale  what the gradient was multiplied by, if clipped otherwise than by clip()
        """
        if self.files is None or self.failed:
            raise RecordError("record() outside of `with Recorder(...) as record`, or after a full disk")
        if len(self.pending) > 1:
            count, self.pending = len(self.pending), []
            raise self._refusal(f"{count} optimizer steps since the last record(); one each")
        items, weights = self._rows_of_batch(indices, weights)
        if not self.pending:
            return self._without_step(items, weights)
        step = self.pending.pop()
        if gradient_scale is not None:
            step.scale = float(gradient_scale)
        self.scale = None
        if step.scale is not None and not math.isfinite(step.scale):
            raise self._refusal(f"the gradient was multiplied by {step.scale}")
        parts, self.parts = [*self.parts, (items, weights)], []
        items = np.concatenate([part[0] for part in parts])
        own = weights is not None
        if self.loss.line == "recorded":
            cotangents, weights, own = self._loss_gradients(step, items), np.ones(len(items)), True
            step.cotangents = _numbers(cotangents)
        else:
            weights = np.concatenate([self._weights_of(*part) / (1 if own else len(parts)) for part in parts])
        rates = [float(group.pop("lr")) for group in step.settings]
        if step.settings != self.settings:  # else they are those of the step before
            for group in self.groups:
                line = group.line if group.number is None else _group_line(type(self.optimizer), step.settings[group.number])
                if self._fixed(line) != self._fixed(group.line):
                    raise self._refusal(
                        f"the optimizer is now '{line}', it was '{group.line}'; the format has one for the whole run, but for "
                        "rates and the momentum, or beta1 of Adam and AdamW"
                    )
            self.settings = step.settings
            self._move_momentum(step.settings)
        if self._mode_problem():
            raise self._refusal(self._mode_problem())
        moved = next((p for p, version in self.fixed_weights if p._version != version), None)
        if moved is not None:
            name = next(name for name, p in self.model.named_parameters() if p is moved)
            raise self._refusal(
                f"parameter '{name}' is not trained (requires_grad=False, or not in the optimizer), and has changed: set its grad "
                "to None, for which an optimizer still decays it; what another optimizer trains cannot be recorded"
            )
        row = [_numbers(p) for p in self.parameters]  # no copies on the CPU
        at = np.concatenate([row[i].reshape(-1).take(places) for i, places in zip(self.trained, self.places)])
        at, due = at.astype(np.float64), self._due()
        finite = np.isfinite(at).all() and (not due or all(np.isfinite(a).all() for a in row))
        if not finite or not all(map(math.isfinite, rates)):
            raise self._refusal("a weight or the learning rate is not finite")
        looks = due or self.steps % 8 == 0  # at what torch has not written to, which costs more than to see that it has
        changed = [
            w.what
            for w, a in zip(self.watched, (self.inputs, self.targets))
            if (looks or w.touched()) and w.differs(a, items)
        ]
        several, divided = len(parts) > 1 and not own, self.divided
        weights = weights * len(parts) if several and divided is False else weights
        scale = self._scale(step, items, weights, changed, len(parts) if several else 1, due)
        weights = weights * len(parts) if several and divided is None and self.divided is False else weights
        self._check_update(at, _double(step.taken), rates)
        samples = np.zeros(self.files["optimizer_samples"].row_shape) if "optimizer_samples" in self.files else None
        for update, columns in zip(self.updates, self.columns):
            for k, state in enumerate(update.state):
                samples[k, columns] = state
        rows = {
            "learning_rates": [rates[self.groups[0].number]],
            "group_rates": [[0.0 if g.number is None else rates[g.number] for g in self.groups[1:]]],
            "momenta": [self.momentum],
            "batch_offsets": [self.files["batch_items"].rows + len(items)],
            "batch_items": [items],
            "batch_weights": [weights],
            "gradient_scales": [scale],
            "optimizer_samples": [samples],
            "weights": row,
        }
        if self.loss.line == "recorded":
            rows["loss_gradients"] = [step.cotangents]
        if self.moments:
            states = [self.optimizer.state[p] for p in self.parameters]
            rows["second_moments"] = [
                _numbers(state[self.updates[0].moments]) if state else np.zeros(p.shape)
                for p, state in zip(self.parameters, states)
            ]
        self.failed = True
        for name in self.files:  # weights last: they commit the step
            self.files[name].append(*rows[name])
        self.failed = False
        self.steps, self.at = self.steps + 1, at

    def _rows_of_batch(self, indices, weights):
        items = _numbers(indices)
        if items.dtype == bool and items.shape == (len(self.inputs),):
            items = np.flatnonzero(items)
        if items.ndim != 1 or not len(items) or items.dtype.kind not in "iu":
            raise self._refusal(f"indices are row numbers in one dimension, not {items.dtype} {items.shape}")
        items = items.astype(np.int64)  # a copy
        # A negative number is the largest without its sign. (argmax, because max takes 30 us.)
        if not 0 <= items[items.view(np.uint64).argmax()] < len(self.inputs):
            raise self._refusal(f"indices {items.min()} to {items.max()}, but there are {len(self.inputs)} rows")
        if weights is not None:
            weights = _numbers(weights).astype(np.float64)
            if weights.shape != items.shape or not np.isfinite(weights).all():
                raise self._refusal(f"weights have shape {weights.shape} for {len(items)} indices, or are not finite")
        return items, weights

    def _weights_of(self, items, weights):
        """What the loss of each of these examples is multiplied by: as given, or by the loss module's reduction."""
        if weights is not None:
            return weights
        if self.loss.weight is not None or self.loss.ignored is not None:
            return self.loss.weights(self.targets[items], self.net.outputs[0])
        if len(self.mean) != len(items):
            self.mean = self.loss.weights(items, self.net.outputs[0])
        return self.mean

    def _without_step(self, items, weights):
        """record() where the optimizer made no step: a GradScaler skipped it, or the gradient of a part of the batch was
        added to those of the parts before."""
        gradients, seen = [self.parameters[i].grad for i in self.trained], self.seen
        known = not any(v is None for v in (*gradients, *seen))
        finite = all(v is None or bool(torch.isfinite(v).all()) for v in (*gradients, *seen))
        if finite and not (known and torch.equal(self._sample(gradients), torch.cat(seen))):
            raise self._refusal(
                "0 optimizer steps since the last record(), and the gradient is not the sum of those since then"
            )
        if finite:
            self.parts.append((items, weights))
        else:
            self.parts, self.calls, self.seen = [], [], [None] * len(seen)

    def _scale(self, step, items, weights, changed, parts, due):
        """What the gradient of the loss was multiplied by, and the checks of it."""
        scale, ratio = step.scale, step.ratio
        recorded = self.loss.line == "recorded"
        if recorded and (ratio is not None or scale is None):
            scale = step.scale = ratio if scale is None or not self._is_known(step) else scale
        known = self._is_known(step) and (recorded or parts == 1 or self.divided is not None)
        if scale is None and known:
            at_last = ratio != 1 and self.unit != 1
            scale = self.last[1] * ratio / self.last[0] if at_last else ratio
        elif scale is None and ratio is None and not recorded:
            scale = 1.0
        if due or changed or not known:
            factor = self._check_gradient(step, items, weights, scale, changed)
            if scale is None and recorded:
                scale = factor
            elif scale is None:  # the loss was multiplied by a power of 2, and the gradient divided again
                unit = factor / ratio
                if parts > 1 and self.divided is None:
                    self.divided = abs(unit / parts - 1) > 1e-3
                    unit /= 1 if self.divided else parts
                power = 2.0 ** round(math.log2(abs(unit))) if unit > 0 and math.isfinite(unit) else 0.0
                if abs(unit - power) > 1e-3 * power or (ratio == 1 and power != 1):
                    self._wrong_gradient(step, changed, "", unit)
                self.unit, scale = power, ratio * power
                self.last = ratio, scale
            done = self.steps - self.first
            self.next_check = self.first + (done + 1 if done + 1 < self.check else max(done + 1, done * 3 // 2))
        return scale

    def _name(self, number):
        """Of the parameter that a sampled number belongs to."""
        parameter = self.parameters[self.trained[int(np.searchsorted(self.starts, number, side="right")) - 1]]
        return next(name for name, p in self.model.named_parameters() if p is parameter)

    def _check_update(self, at, gradient, rates):
        """Each step: the weights moved as the optimizer lines say, by the gradient that the optimizer was given."""
        for update, columns, group in zip(self.updates, self.columns, self.groups):
            was, now = self.at[columns], at[columns]
            moved, allowed = update.step(was, gradient[columns], rates[group.number])
            error = np.abs(now - was - moved)
            if not (error <= allowed).all():
                worst = int((error - allowed).argmax())
                raise self._refusal(
                    f"the weights did not move by '{group.line}' with the gradient that the optimizer was given: a weight of "
                    f"'{self._name(columns[worst])}' by {now[worst] - was[worst]:.9g}, not {moved[worst]:.9g}. Were weights, "
                    "settings or the optimizer's state changed otherwise (averaging, clamping, a hook)?"
                )

    def _gradient(self, w, items, weights, cotangents=None, noise=0.0):
        """Of the declared loss on these rows, in float64; with rounding of the weights and inputs, if asked for."""
        generator = torch.Generator().manual_seed(self.steps)
        rows = lambda array: torch.as_tensor(np.asarray(array[items])).to(w.device)
        blur = lambda v: v + noise * v * torch.randn(v.shape, generator=generator).to(v) if noise else v
        x = rows(self.inputs)
        x = blur(x.double()) if x.is_floating_point() else x.double()
        w = blur(w).detach().requires_grad_()
        with torch.enable_grad():
            f = self.net(w, x)
            if self.loss.line == "recorded":
                return torch.autograd.grad((f * cotangents.to(w)).sum(), w)[0]
            losses = self.loss.each(f, rows(self.targets)) * torch.as_tensor(weights).to(w.device)
            return torch.autograd.grad(losses.sum(), w)[0]

    def _check_gradient(self, step, items, weights, scale, changed):
        """The gradient that the optimizer was given is that of the declared loss on the declared rows, as recorded, times
        the scale; scale None: times what is returned."""
        parameters = [self.parameters[i] for i in self.trained]
        if step.whole is None:  # it looked right when the optimizer stepped
            step.whole = [p.grad.detach() for p in parameters if p.grad is not None]
            if len(step.whole) < len(parameters) or not torch.equal(self._sample(step.whole), step.taken):
                raise self._refusal(f"{' and '.join(changed)} changed in place since the recording began")
        device, dtype = step.whole[0].device, step.whole[0].dtype
        device, epsilon = "cpu" if device.type == "mps" else device, torch.finfo(dtype).eps
        given = torch.cat([g.reshape(-1) for g in step.whole]).to(device).double()
        w = torch.as_tensor(self.files["weights"].row(self.steps).copy()).to(device).double()
        sizes = [p.numel() for p in self.parameters]
        cotangents = torch.as_tensor(step.cotangents) if self.loss.line == "recorded" else None

        def gradient(noise=0.0):
            whole = self._gradient(w, items, weights, cotangents, noise).split(sizes)
            return torch.cat([whole[i] for i in self.trained])

        wanted = gradient()
        factor = float(given @ wanted / (wanted @ wanted)) if bool(wanted.any()) else 1.0
        scale = factor if scale is None else scale
        half = self._half_precision(step.seen)
        norms = lambda vector: torch.stack([part.norm() for part in vector.split([p.numel() for p in parameters])])
        difference, tolerance = norms(given - scale * wanted), 1e-5 if half else 1e-2 if dtype == torch.float32 else 1e-8
        allowed = tolerance * norms(scale * wanted) + 100 * epsilon * (1 + abs(scale) * wanted.norm())
        if not (difference <= allowed).all():  # how much rounding changes it: where much cancels, a lot
            allowed = allowed + 100 * norms(scale * (gradient(epsilon) - wanted))
        if not (difference <= allowed).all():
            most = given.abs().max()
            if (norms(given - (scale * wanted).clamp(-most, most)) <= allowed).all():
                raise self._refusal(
                    f"the gradient was clipped number by number, at {float(most):.6g} (clip_grad_value_). That multiplies each "
                    "weight's gradient by a factor of its own, and the format has one factor a step: clip the norm, by "
                    "record.clip(max_norm) or clip_grad_norm_, or do not clip"
                )
            size = (given - scale * wanted).norm() / (scale * wanted).norm()
            alike = (given - factor * wanted).norm() < 1e-3 * given.norm()
            self._wrong_gradient(step, changed, f": it differs by {float(size):.2g} of its size", alike and factor / scale)
        return factor

    def _wrong_gradient(self, step, changed, how, factor):
        """factor: the gradient is the declared one times that, if there is such a factor."""
        half = self._half_precision(step.seen)
        what = "that of the outputs' recorded derivatives" if self.loss.line == "recorded" else f"that of loss '{self.loss.line}'"
        reason = f"the gradient that the optimizer was given is not {what} on these rows{how}. "
        if changed:
            reason += f"{' and '.join(changed).capitalize()} changed in place since the recording began. "
        if half:
            reason += (
                f"It was computed in {half}, under autocast (with or without a GradScaler): train in float32 or float64. "
            )
        elif factor:
            reason += f"It is that times {factor:.6g}: is the loss multiplied by it, or not divided (a GradScaler)? "
        raise self._refusal(
            reason + "Are indices the rows of this batch? Are inputs what the model is given? Is it another loss or "
            'reduction (loss="recorded" takes any), or are there terms beside it, such as a penalty on weights? Were '
            "gradients accumulated (zero_grad?), or clipped otherwise than by one factor?"
        )

    @staticmethod
    def _half_precision(seen):
        """The type that autograd computed in, if all its numbers fit into one that is narrower than the weights."""
        if seen is None or np.count_nonzero(_double(seen)) < 8:
            return None
        return next((t for t in (torch.bfloat16, torch.float16) if torch.equal(seen.to(t).to(seen), seen)), None)

    def _end_problem(self):
        """What is wrong where the recording ends, if anything."""
        if self.pending:
            return (
                "the optimizer made a step that was not recorded: record() was not called after it (a break before it?). "
                "The run is complete up to there"
            )
        if self.parts and not self.steps:
            return "record() was called, but the optimizer made no step"
        if self._mode_problem():
            return self._mode_problem()
        if not np.array_equal(self._weights().numpy(), self.files["weights"].row(self.steps)):
            return (
                "the model's weights are not those after the last recorded step: leave `with Recorder(...)` before they "
                "are averaged, swapped, restored or trained otherwise. The run is complete up to there"
            )
        for watched, recorded in zip(self.watched, (self.inputs, self.targets)):
            # Where torch counts its writes, each step has looked at its rows.
            if not watched.touched() and watched.differs(recorded):
                return f"{watched.what} were changed in place at some time; from then on the run is not what was trained"
        try:
            self._compare_outputs()
        except RecordError as error:
            return f"{error}; from some time on the run is not what was trained. Has a buffer changed?"
        return None
