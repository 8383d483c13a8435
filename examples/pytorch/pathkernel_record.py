"""Records a PyTorch training run for pathkernel-decompose. Copy this file; it needs torch >= 1.13 and NumPy.

    from pathkernel_record import Recorder

    with Recorder("run", model, loss="softmax_cross_entropy", optimizer=opt, inputs=x, targets=y) as record:
        for step in range(steps):
            indices = torch.randperm(len(x))[:64]
            opt.zero_grad()
            criterion(model(x[indices]), y[indices]).backward()
            record.clip(1.0)     # only where gradients are clipped, in place of clip_grad_norm_
            opt.step()
            record(indices)      # rows of inputs and targets; a scheduler may step before or after

The network, loss and optimizer lines of run.txt are derived from the module, the loss and torch.optim's
object: the model runs on the first rows of inputs, and what its forward does is written down, whether it is a
Sequential or hand-written with residuals, views and functions of torch.nn.functional. What the format cannot say
is refused with a RecordError that names it, and nothing is left of it on the disk. Checks catch what else would only
show later, as a large "unattributed" part:

    at the start    the model's outputs are those of the derived network, at its own weights and at random ones, so
                    layout and order agree
    at each step    the optimizer was given the gradient that autograd computed, times the recorded scale; a few weights
                    of each tensor moved by the rule of the optimizer line; a few numbers of the batch's rows are as
                    they were recorded
    at some steps   (the first eight, then ever fewer, and wherever the line above does not hold) the gradient is that of
                    the declared loss on the declared rows
    at the end      no step is missing, the weights are those of the last step, and the first line holds again

Rates, settings and gradients are taken when the optimizer steps; what changes afterwards does not matter.

A module that cannot be followed may describe itself in the network language, by one method (see describe):

    def pathkernel_line(self):
        return f"residual( {describe(self.norm, self.inner)} )"

With a DataLoader, wrap the dataset in Indexed: each batch then starts with the row numbers.

Every step appends one row to each .npy file, weights.npy last; a kill at any moment loses at most the step in
flight. Recorder(..., resume=True) goes on with such a run. One recorder at a time writes into a folder.
"""

import contextlib
import fcntl
import functools
import itertools
import math
import os
import re
import stat
import types
import weakref

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

__all__ = ["Recorder", "RecordError", "Indexed", "describe", "Abs", "Erf", "Residual", "SelfAttention"]
__all__ += ["Position", "Token", "MeanTokens"]


class RecordError(ValueError):
    """The run, as it is, cannot be recorded; the message says why."""


class Abs(nn.Module):
    """|x|, which torch.nn does not have as a module."""

    def forward(self, x):
        return x.abs()


class Erf(nn.Module):
    """erf(x), which torch.nn does not have as a module."""

    def forward(self, x):
        return torch.erf(x)


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


# ---- modules in words of the network language


_REASONS = {  # by the name of the class, so that old versions of torch need not have it
    "RReLU": "it is random",
    "Parametrized": "its weight comes from other parameters (weight_norm?), not the format's",
}
_COUPLES = (
    "it couples the examples of a batch, so contributions of single examples are not defined; freeze its "
    "statistics with .eval()"
)
_RANDOM = "draws random numbers that the format does not keep; use p=0, or .eval() it"


def _number(value):
    return repr(float(value))


def _pair(value):
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _words(word, *positional, **options):
    """A layer's words; an option that is None is left out, one that is True is a flag."""
    said = [word, *positional]
    for name, value in options.items():
        if value is not None and value is not False:
            said.append(name if value is True else f"{name}={value}")
    return " ".join(map(str, said))


def _by(pair, default=None):
    """Of images 3x3, of signals 3; None: all numbers are the default."""
    return None if all(n == default for n in pair) else "x".join(map(str, pair))


def _each(module, value):
    """One number for each dimension of images (2) or signals (1)."""
    count = 2 if type(module).__name__.endswith("2d") else 1
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count


# A rule turns a module into a list of layers: rule(module, x, options, no) with the module's input x, what else it
# was called with, and no(reason), the error to raise. A list stands for a rule that returns it.


def _leaky_relu(module, x, options, no):
    if not module.negative_slope > 0:
        raise no(f"negative_slope = {module.negative_slope}, the format needs a positive one")
    return [_words("leaky_relu", _number(module.negative_slope))]


def _softplus(module, x, options, no):
    if module.threshold < 20:
        raise no(f"threshold = {module.threshold} makes a jump that the format's softplus does not have")
    return ["softplus" if module.beta == 1 else _words("softplus", _number(module.beta))]


def _gelu(module, x, options, no):
    return ["gelu" if module.approximate == "none" else _words("gelu", module.approximate)]


def _elu(module, x, options, no):
    if not module.alpha > 0:
        raise no(f"alpha = {module.alpha}, the format needs a positive one")
    return ["elu" if module.alpha == 1 else _words("elu", _number(module.alpha))]


def _hard_sigmoid(module, x, options, no):
    with torch.enable_grad():
        at = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(nn.functional.hardsigmoid(at).sum(), at)
    if x is not None and x.dtype == torch.float64 and abs(slope.item() * 6 - 1) > 1e-12:
        raise no("this PyTorch has its slope, 1/6, in single precision only; train in float32, or with another layer")
    return ["hard_sigmoid"]


def _prelu(module, x, options, no):
    if x is not None and x.ndim < 2:
        raise no("the format needs examples with channels")
    return ["prelu" if module.num_parameters == 1 else _words("prelu", module.num_parameters)]


def _hard_tanh(module, x, options, no):
    if (module.min_val, module.max_val) != (-1, 1):
        raise no(f"from {module.min_val} to {module.max_val}; the format has -1 to 1 only")
    return ["hard_tanh"]


def _dropout(module, x, options, no):
    if module.p != 0 and module.training:
        raise no(f"dropout {_RANDOM}")
    return []


def _flatten(module, x, options, no):
    if module.start_dim != 1 or module.end_dim not in (-1, None if x is None else x.ndim - 1):
        raise no("the format can flatten whole examples only (start_dim=1, end_dim=-1)")
    return ["flatten"]


def _softmax(module, x, options, no):
    if module.dim != -1 and (x is None or module.dim != x.ndim - 1):
        raise no(f"dim = {module.dim}; the format has the last dimension only (dim=-1)")
    return [{nn.Softmax: "softmax", nn.Softmin: "softmin"}.get(type(module), "log_softmax")]


def _dense(module, x, options, no):
    return [_words("dense", module.out_features, nobias=module.bias is None)]


def _convolution(module, x, options, no):
    if module.padding_mode != "zeros":
        raise no(f"padding_mode = '{module.padding_mode}'; the format pads with zeros")
    transposed = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    if transposed and options.get("output_size") is not None:
        raise no("called with output_size; say output_padding instead")
    pad = 0 if module.padding == "valid" else module.padding
    if pad == "same":
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
        if any(total % 2 for total in both):
            raise no("padding='same' pads one side more than the other here, the format both alike")
        pad = tuple(total // 2 for total in both)
    return [
        _words(
            "conv_transpose" if transposed else "conv",
            module.out_channels,
            _by(module.kernel_size),
            stride=_by(_each(module, module.stride), 1),
            pad=_by(_each(module, pad), 0),
            output_pad=_by(_each(module, module.output_padding), 0) if transposed else None,
            dilation=_by(_each(module, module.dilation), 1),
            groups=None if module.groups == 1 else module.groups,
            nobias=module.bias is None,
        )
    ]


def _pool(module, x, options, no):
    largest, pad = isinstance(module, (nn.MaxPool1d, nn.MaxPool2d)), _each(module, module.padding)
    if largest and (any(d != 1 for d in _each(module, module.dilation)) or module.return_indices):
        raise no("dilation and return_indices are not in the format")
    if getattr(module, "divisor_override", None):
        raise no("divisor_override is not in the format")
    kernel = _each(module, module.kernel_size)
    stride = kernel if module.stride in (None, []) else _each(module, module.stride)
    word = "max_pool" if largest else "avg_pool"
    return [
        _words(
            word,
            _by(kernel),
            stride=None if stride == kernel else _by(stride),
            pad=_by(pad, 0),
            ceil_mode=module.ceil_mode,
            count_include_pad=None if largest or module.count_include_pad else 0,
        )
    ]


def _adaptive_pool(module, x, options, no):
    largest = "Max" in type(module).__name__
    sizes = _each(module, module.output_size)
    if largest and module.return_indices:
        raise no("return_indices is not in the format")
    if not largest and all(n == 1 for n in sizes):
        return ["global_avg_pool"]
    if None in sizes:
        if x is None:
            raise no("an output_size of None is not in the format")
        sizes = tuple(n or own for n, own in zip(sizes, x.shape[2:]))
    return [_words(f"adaptive_{'max' if largest else 'avg'}_pool", _by(sizes))]


def _upsample(module, x, options, no):
    if module.mode not in ("nearest", "bilinear", "linear"):
        raise no(f"mode = '{module.mode}'; the format has nearest, linear and bilinear")
    factors = module.scale_factor
    if factors is None and x is None:
        raise no("the format has a scale_factor, and no size")
    if factors is None:
        count = x.ndim - 2
        sizes = module.size if isinstance(module.size, (tuple, list)) else (module.size,) * count
        factors = tuple(size / own for size, own in zip(sizes, x.shape[2:]))
    factors = tuple(factors) if isinstance(factors, (tuple, list)) else (factors,)
    if any(f < 1 or f != int(f) for f in factors):
        raise no(f"a factor of {factors}; the format has whole numbers")
    return [
        _words(
            "upsample",
            _by([int(f) for f in factors]),
            *([] if module.mode == "nearest" else [module.mode]),
            align_corners=module.mode != "nearest" and bool(module.align_corners),
        )
    ]


def _batch_norm(module, x, options, no):
    if module.training or module.running_mean is None:
        raise no(_COUPLES if module.training else "without running statistics " + _COUPLES)
    statistics = torch.stack([module.running_mean, module.running_var])
    name = _Trace.now.constant("norm", statistics) if _Trace.now else "norm"
    return [_words("batch_norm", name, epsilon=_number(module.eps), noaffine=module.weight is None)]


def _with_factors(module, plain):
    """A norm of channels with its affine, whose summand may be missing."""
    weight, bias = getattr(module, "weight", None) is not None, getattr(module, "bias", None) is not None
    if weight and bias:
        return [plain]
    return [plain + " noaffine"] + ["affine nobias dims=0"] * weight


def _group_norm(module, x, options, no):
    return _with_factors(module, _words("group_norm", module.num_groups, epsilon=_number(module.eps)))


def _instance_norm(module, x, options, no):
    if module.training and module.track_running_stats:
        raise no(
            "its running statistics change while it trains, so in eval mode it would be another network than the "
            "recorded one; use track_running_stats=False, or .eval() it"
        )
    if module.running_mean is not None:
        return _batch_norm(module, x, options, no)
    return _with_factors(module, _words("instance_norm", epsilon=_number(module.eps)))


def _layer_norm(module, x, options, no):
    bias, dims = getattr(module, "bias", None) is not None, len(module.normalized_shape)
    root = type(module).__name__ == "RMSNorm"
    eps, dims = module.eps, None if dims == 1 else dims
    if root and eps is None:
        eps = torch.finfo(module.weight.dtype if x is None else x.dtype).eps
    alone = module.weight is not None and not bias and not root  # a factor without a summand
    plain = _words("rms_norm" if root else "layer_norm", epsilon=_number(eps), dims=dims)
    if alone or module.weight is None:
        plain += " noaffine"
    return [plain] + [_words("affine", "nobias", dims=dims or 1)] * alone


def _embedding(module, x, options, no):
    for setting in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, setting) is not None and getattr(module, setting) is not False:
            raise no(f"{setting} = {getattr(module, setting)} is not in the format")
    return [_words("embedding", module.num_embeddings, module.embedding_dim)]


def _is_causal(mask, x, no):
    if mask is None:
        return False
    mask = mask.bool() if mask.dtype == torch.uint8 else mask
    hidden = mask if mask.dtype == torch.bool else mask == -math.inf
    later = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    if mask.ndim != 2 or not (mask.dtype == torch.bool or bool((mask[~hidden] == 0).all())):
        raise no("its mask is neither none nor that of causal attention")
    if not torch.equal(hidden, later) and bool(hidden.any()):
        raise no("its mask is neither none nor that of causal attention")
    return bool(hidden.any())


def _attention(module, x, options, no):
    options = {k: v for k, v in options.items() if k not in ("need_weights", "average_attn_weights")}
    mask = options.pop("attn_mask", None)
    causal = options.pop("is_causal", False)
    if any(v is not None for v in options.values()) or (causal and mask is None):
        raise no(f"called with {', '.join(options) or 'is_causal alone'}; the format has causal masks only")
    if not module.batch_first:
        raise no("the format has batch_first=True only")
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        raise no("kdim, vdim, add_bias_kv and add_zero_attn are not in the format")
    if module.dropout and module.training:
        raise no(f"dropout {_RANDOM}")
    return [
        _words(
            "attention",
            module.num_heads,
            causal=_is_causal(mask, x, no),
            nobias=module.in_proj_bias is None,
        )
    ]


def _encoder_layer(module, x, options, no):
    """Of nn.TransformerEncoder: its parameters come in another order than its layers, see _parameters."""
    if options.get("src_key_padding_mask") is not None:
        raise no("src_key_padding_mask is not in the format")
    for dropout in (module.dropout, module.dropout1, module.dropout2):
        _dropout(dropout, x, {}, no)
    kind = getattr(module.activation, "__name__", type(module.activation).__name__).lower()
    if kind not in ("relu", "gelu"):
        raise no(f"activation {kind} is not supported here")
    attention = _attention(module.self_attn, x, {"attn_mask": options.get("src_mask")}, no)
    first, second = (_layer_norm(norm, x, {}, no) for norm in (module.norm1, module.norm2))
    dense = [*_dense(module.linear1, x, {}, no), kind, *_dense(module.linear2, x, {}, no)]
    if module.norm_first:
        return [_residual(first + attention), _residual(second + dense)]
    return [_residual(attention), *first, _residual(dense), *second]


def _parameters(module):
    """A module's parameters in the order of the language."""
    if hasattr(module, "pathkernel_parameters"):
        return list(module.pathkernel_parameters())
    if type(module) is nn.TransformerEncoderLayer:
        order = ["norm1", "self_attn", "norm2", "linear1", "linear2"]
        if not module.norm_first:
            order = ["self_attn", "norm1", "linear1", "linear2", "norm2"]
        return [p for name in order for p in getattr(module, name).parameters()]
    return list(module.parameters())


def _residual(body, shortcut=()):
    if not body:
        body, shortcut = shortcut, body
    return f"residual( {'; '.join(body) or 'identity'}{' | ' if shortcut else ''}{'; '.join(shortcut)} )"


_MODULES = {
    nn.Identity: [],
    nn.ReLU: ["relu"],
    nn.Tanh: ["tanh"],
    nn.Sigmoid: ["sigmoid"],
    nn.SiLU: ["silu"],
    Abs: ["abs"],
    Erf: ["erf"],
    nn.LeakyReLU: _leaky_relu,
    nn.Softplus: _softplus,
    nn.GELU: _gelu,
    nn.Hardtanh: _hard_tanh,
    nn.ELU: _elu,
    nn.SELU: ["selu"],
    nn.Mish: ["mish"],
    nn.ReLU6: ["relu6"],
    nn.Hardswish: ["hardswish"],
    nn.Hardsigmoid: _hard_sigmoid,
    nn.Softsign: ["softsign"],
    nn.LogSigmoid: ["log_sigmoid"],
    nn.PReLU: _prelu,
    nn.Softmax: _softmax,
    nn.Softmin: _softmax,
    nn.LogSoftmax: _softmax,
    nn.Dropout: _dropout,
    nn.Dropout1d: _dropout,
    nn.Dropout2d: _dropout,
    nn.Dropout3d: _dropout,
    nn.AlphaDropout: _dropout,
    nn.FeatureAlphaDropout: _dropout,
    nn.Flatten: _flatten,
    nn.Linear: _dense,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.ConvTranspose1d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.MaxPool1d: _pool,
    nn.MaxPool2d: _pool,
    nn.AvgPool1d: _pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool1d: _adaptive_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.AdaptiveMaxPool1d: _adaptive_pool,
    nn.AdaptiveMaxPool2d: _adaptive_pool,
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    nn.GroupNorm: _group_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
}
if hasattr(nn, "RMSNorm"):
    _MODULES[nn.RMSNorm] = _layer_norm
_OWN = {"weight", "bias", "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


def _layers(module, where, x=None, options=None):
    """The layers of one module in words."""
    kind = type(module)
    no = lambda reason: RecordError(f"{where}: {reason}")
    if hasattr(module, "pathkernel_line"):
        return [module.pathkernel_line()]
    if kind not in _MODULES:
        reason = next((r for n, r in _REASONS.items() if kind.__name__.startswith(n)), None)
        raise no(
            reason
            or "not supported (examples/pytorch/README.md lists what is); give it a method pathkernel_line that "
            "says what it does in the network language, or pass network="
        )
    rule = _MODULES[kind]
    layers = rule if isinstance(rule, list) else rule(module, x, options or {}, no)
    if kind is not nn.TransformerEncoderLayer and not _OWN.issuperset(
        n for n, _ in module.named_parameters()
    ):
        raise no("its weight comes from other parameters (weight_norm, pruning?), not the format's")
    return layers


def describe(*modules):
    """Layers in the network language, for a module's own pathkernel_line: of modules of torch.nn, Sequentials, and
    modules that have one themselves. A module's parameters are taken in the order in which it registered them; where
    that is not their order in its line, it has a method pathkernel_parameters that returns them in that order.
    """
    said = []
    for module in modules:
        if type(module) is nn.Sequential:
            said += [describe(*module)] if len(module) else []
        else:
            said += _layers(module, type(module).__name__)
    return "; ".join(word for word in said if word)


# ---- what a forward does


_FUNCTIONS = {  # functions and methods that are modules: their other arguments are the module's
    **{n: nn.ReLU for n in ("relu", "relu_")},
    **{n: nn.Tanh for n in ("tanh", "tanh_")},
    **{n: nn.Sigmoid for n in ("sigmoid", "sigmoid_")},
    "silu": nn.SiLU,
    "abs": Abs,
    "erf": Erf,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "hardtanh": nn.Hardtanh,
    "softmax": nn.Softmax,
    "log_softmax": nn.LogSoftmax,
    "dropout": nn.Dropout,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "softsign": nn.Softsign,
    "log_sigmoid": nn.LogSigmoid,
    "softmin": nn.Softmin,
    **{f"{n}_pool{d}d": getattr(nn, f"{m}Pool{d}d") for n, m in (("max", "Max"), ("avg", "Avg")) for d in (1, 2)},
    **{
        f"adaptive_{n}_pool{d}d": getattr(nn, f"Adaptive{m}Pool{d}d")
        for n, m in (("max", "Max"), ("avg", "Avg"))
        for d in (1, 2)
    },
    "interpolate": lambda *size, antialias=False, **options: nn.Upsample(*size, **options),
}
_LOOKS = {"item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "equal"}
_VIEWS = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "view_as"}
_SAME = {"contiguous", "clone", "to", "alias"}


def _axes(shape):
    """The axes of an example that say anything: all but the first, and without the ones."""
    return [n for n in shape[1:] if n != 1]


class _Value:
    """A value of a forward: `layers` lead to it from the value `before`, through which all of its paths go."""

    def __init__(self, trace, before, layers=(), parameters=(), refusal=None):
        # refusal: (number, error) of the first value on the ways to here that the format does not have, or None
        self.trace, self.before, self.refusal = trace, before, refusal
        self.layers, self.parameters = list(layers), list(parameters)
        self.number, trace.values = trace.values, trace.values + 1

    def since(self, start):
        """(layers, parameters) from start to here."""
        if self.refusal:
            raise self.refusal[1]
        layers, parameters, value = [], [], self
        while value is not start:
            layers[:0], parameters[:0], value = value.layers, value.parameters, value.before
        return layers, parameters


def _first_refusal(traced):
    """The earliest refusal of several traced tensors: what to name, since later ones may only follow from it."""
    return min((t.value.refusal for t in traced if t.value.refusal), key=lambda r: r[0], default=None)


def _common(a, b):
    """The last value through which all paths to both go."""
    while a is not b:
        if a.number > b.number:
            a = a.before
        else:
            b = b.before
    return a


class _Traced(torch.Tensor):
    """A tensor that remembers, as its `value`, where it comes from."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        found = []
        plain = _plain(arguments, found), _plain(options or {}, found)
        out = function(*plain[0], **plain[1])
        return found[0].value.trace.function(function.__name__, arguments, options or {}, plain, found, out)


def _plain(given, found):
    """given with ordinary tensors in place of traced ones, which are appended to found."""
    if isinstance(given, _Traced):
        found.append(given)
        return given.as_subclass(torch.Tensor)
    if isinstance(given, dict):
        return {key: _plain(value, found) for key, value in given.items()}
    if type(given) in (list, tuple):
        return type(given)(_plain(value, found) for value in given)
    return given


class _Trace:
    """The network line of a model: runs it on rows, and writes down the modules and functions on the way."""

    now = None

    def __init__(self, model, rows):
        self.model, self.values, self.constants, self.used = model, 0, {}, set()
        self.names = {id(m): name for name, m in model.named_modules()}
        self.order = {id(p): i for i, p in enumerate(model.parameters())}
        self.shape, self.input = tuple(rows.shape[1:]), _Value(self, None)
        call = nn.Module.__call__
        _Trace.now = self
        # _call_impl: not what module.compile() has put in the place of the forward.
        nn.Module.__call__ = lambda module, *arguments, **options: self.module(
            nn.Module._call_impl, module, arguments, options
        )
        try:
            with torch.no_grad():
                out = model(self.wrap(rows, self.input))
        except RecordError:
            raise
        except Exception as error:
            raise RecordError(
                f"the model cannot be followed on the first rows of inputs, {rows.dtype} {tuple(rows.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            nn.Module.__call__, _Trace.now = call, None
        if not isinstance(out, _Traced):
            if isinstance(out, (tuple, list, dict)) or hasattr(out, "__dataclass_fields__"):
                raise RecordError(f"the model returns a {type(out).__name__}; return only the tensor of its outputs")
            raise RecordError(f"the model returns a {type(out).__name__} that does not come from its input")
        layers, self.parameters = out.value.since(self.input)
        self.line = "; ".join(["input " + "x".join(map(str, self.shape or (1,))), *layers])
        seen = set()
        for p in self.parameters:
            name = next((n for n, q in model.named_parameters() if q is p), "?")
            if id(p) in seen:
                raise RecordError(f"parameter '{name}' would be a weight in two layers of '{self.line}'")
            seen.add(id(p))
        for name, p in model.named_parameters():
            if id(p) not in seen:
                raise RecordError(f"parameter '{name}' is in no layer on the way from input to output")

    def wrap(self, tensor, value):
        traced = tensor.as_subclass(_Traced)
        traced.value = value
        return traced

    def constant(self, stem, array):
        name = f"{stem}{len(self.constants)}"
        self.constants[name] = array.detach().cpu().numpy().copy()
        return name

    def module(self, call, module, arguments, options):
        """Instead of module(*arguments, **options): one layer, if it is one, or what its forward does."""
        found, kind = [], type(module)
        plain, plain_options = _plain(arguments, found), _plain(options, found)
        follow = kind in (nn.Sequential, nn.TransformerEncoder) or not kind.__module__.startswith("torch.nn.")
        if not found or (follow and kind not in _MODULES and not hasattr(module, "pathkernel_line")):
            return call(module, *arguments, **options)
        name, before = self.names.get(id(module), ""), found[0].value
        where = (
            f"layer {self.values - 1} ('{name}', {kind.__name__})" if name else f"the model ({kind.__name__})"
        )
        values = {
            nn.MultiheadAttention: ("query", "key", "value"),
            nn.TransformerEncoderLayer: ("src", "src_mask"),
        }
        values = values.get(kind, ("input",))
        rest = {**dict(zip(values, arguments)), **options}
        rest = {k: v for k, v in rest.items() if k not in ("query", "key", "value", "src", "input")}
        refusal, parameters = _first_refusal(found), _parameters(module)
        try:
            if any(t.value is not before for t in found) or (kind in _MODULES and len(arguments) > len(values)):
                raise RecordError(
                    f"{where}: called with more than one value; the format has one, and attention of tokens among "
                    "themselves"
                )
            if parameters and id(module) in self.used:
                raise RecordError(f"{where}: the same module twice; weights used twice cannot be recorded")
            self.used.add(id(module))
            layers = _layers(module, where, found[0], rest)
            try:
                out = call(module, *plain, **plain_options)
            except (RuntimeError, ValueError, IndexError) as error:
                raise RecordError(
                    f"{where} does not take {found[0].dtype} {tuple(found[0].shape)}: {error}"
                ) from error
        except RecordError as error:
            raise refusal[1] if refusal else error
        value = _Value(self, before, layers, parameters, refusal)
        return (self.wrap(out[0], value), *out[1:]) if isinstance(out, tuple) else self.wrap(out, value)

    def function(self, name, arguments, options, plain, found, out):
        """The result of a function of torch on traced values, with where it comes from."""
        refusal = _first_refusal(found)
        if name in _LOOKS:
            reason = f"the forward of the model looks at its numbers ({name}), so it is not one network"
            raise RecordError(f"{reason}; before that, {refusal[1]}" if refusal else reason)
        if not isinstance(out, (torch.Tensor, tuple, list)) or isinstance(out, torch.Size):
            return out
        x, before, layers, parameters = found[0], found[0].value, [], []
        where = f"layer {self.values - 1} (function {name})"
        try:
            if len(found) == 2 and name in ("add", "add_", "__add__", "__iadd__"):
                if options.get("alpha", 1) != 1 or found[0].shape != found[1].shape:
                    raise RecordError(f"{where}: the format adds values of the same shape only")
                branches = [t.value for t in found]
                start = _common(*branches)
                branches = [branch.since(start) for branch in branches]
                # The order of PyTorch's parameters, where it can be.
                branches.sort(key=lambda b: min((self.order.get(id(p), 0) for p in b[1]), default=math.inf))
                layers = [_residual(branches[0][0], branches[1][0])]
                before, parameters = start, branches[0][1] + branches[1][1]
            elif len(found) != 1:
                raise RecordError(f"{where}: of several values the format has the sum only")
            else:
                rest = [v for v in arguments if v is not x]
                layers, parameters = self.layer(name, where, x, rest, options, out)
        except RecordError as error:  # a value that does not matter may be what it is
            refusal = refusal or (self.values, error)
        wrap = lambda t: self.wrap(t, _Value(self, before, layers, parameters, refusal))
        return wrap(out) if isinstance(out, torch.Tensor) else type(out)(map(wrap, out))

    def layer(self, name, where, x, rest, options, out):
        """(layers, parameters) of a function of one traced value."""
        number = rest[0] if len(rest) == 1 and not options and isinstance(rest[0], (int, float)) else None
        if name in _FUNCTIONS:
            options = {k: v for k, v in options.items() if k[0] != "_" and not (k == "dtype" and v is None)}
            training = options.pop("training", True)
            module = _FUNCTIONS[name](*rest, **options).train(training)
            return _layers(module, where, x), []
        if name in _SAME and out.dtype == x.dtype:
            return [], []
        if name in _VIEWS:
            same = len(out) == len(x) and _axes(out.shape) == _axes(x.shape)
            if self.values == 1 and len(out) == len(x) and (same or x.ndim == 2):  # rows of numbers become images
                self.shape = tuple(out.shape[1:])
                return [], []
            if out.ndim == 2 and len(out) == len(x):
                return ["flatten"], []
            if same:
                return [], []
        if name == "mean":
            dims = rest[0] if rest else options.get("dim")
            dims = sorted(d % x.ndim for d in ([dims] if isinstance(dims, int) else dims or ()))
            if x.ndim == 4 and dims == [2, 3]:
                return ["global_avg_pool"], []
            if x.ndim == 3 and dims == [1]:
                return ["mean_tokens"], []
        if name in ("__getitem__", "select") and x.ndim == 3 and not options:
            key = list(rest[0]) if name == "__getitem__" and isinstance(rest[0], tuple) else rest
            if name == "select":
                key = [slice(None), rest[1]] if rest[0] == 1 else []
            if len(key) > 1 and isinstance(key[1], int) and all(k == slice(None) for k in key[:1] + key[2:]):
                return [f"token {key[1]}"], []
        if name in ("mul", "mul_", "__mul__", "__rmul__") and number is not None:
            return [f"scale {_number(number)}"], []
        if name in ("div", "div_", "__truediv__") and number:
            return [f"scale {_number(1 / number)}"], []
        if name == "neg":
            return ["scale -1"], []
        if name in ("sin", "sin_"):
            return ["sine"], []
        if name in ("add", "add_", "__add__", "__radd__") and len(rest) == 1 and torch.is_tensor(rest[0]):
            return self.summand(where, x, rest[0])
        raise RecordError(
            f"{where}: the format has no such layer here, from {tuple(x.shape)} to "
            f"{tuple(getattr(out, 'shape', ()))}; give the module around it a method pathkernel_line, or pass network="
        )

    def summand(self, where, x, tensor):
        """Tokens plus what does not depend on the input: a learned position, or fixed numbers."""
        if x.ndim != 3 or tensor.numel() != x[0].numel():
            raise RecordError(f"{where}: the format adds to tokens x width only, one number to each")
        same = [p for p in self.model.parameters() if p.numel() == tensor.numel()]
        same = [p for p in same if p.data_ptr() == tensor.data_ptr()] or [
            p for p in same if torch.equal(p.reshape(-1), tensor.reshape(-1))
        ]
        if same:
            return ["position"], same[:1]
        name = self.constant("constant", tensor.reshape(x.shape[1:]))
        return [_residual([f"constant {name}"])], []


# ---- the network language


def _take_affine(net, shape, bias=True):
    return net.take(*shape), net.take(*shape) if bias else None


def _w_dense(net, x, outputs, nobias=False, init=None, gain=None):
    y = x @ net.take(outputs, x.shape[-1]).T
    return y if nobias else y + net.take(outputs)


def _w_conv(
    net, x, channels, kernel, stride=1, pad=0, dilation=1, groups=1, nobias=False, init=None, gain=None
):
    weight = net.take(channels, x.shape[1] // groups, *_kernel(x, kernel))
    bias = None if nobias else net.take(channels)
    return _of(x, "conv")(x, weight, bias, stride, pad, dilation, groups)


def _of(x, name):
    """The function for images or, of values of two dimensions, for signals."""
    if x.ndim not in (3, 4):
        raise ValueError("it takes images of channels x height x width, or signals of channels x length")
    return getattr(nn.functional, f"{name}{x.ndim - 2}d")


def _kernel(x, kernel):
    return _pair(kernel) if x.ndim == 4 else (kernel,)


def _w_conv_transpose(
    net, x, channels, kernel, stride=1, pad=0, output_pad=0, dilation=1, groups=1, nobias=False
):
    weight = net.take(x.shape[1], channels // groups, *_kernel(x, kernel))
    bias = None if nobias else net.take(channels)
    return _of(x, "conv_transpose")(x, weight, bias, stride, pad, output_pad, groups, dilation)


def _w_upsample(net, x, factor, mode="nearest", align_corners=False):
    mode = "nearest" if mode == "nearest" else "linear" if x.ndim == 3 else "bilinear"
    corners = None if mode == "nearest" else align_corners
    return nn.functional.interpolate(x, scale_factor=factor, mode=mode, align_corners=corners)


def _w_group_norm(net, x, groups, epsilon=1e-5, noaffine=False):
    affine = (None, None) if noaffine else _take_affine(net, (x.shape[1],))
    return nn.functional.group_norm(x, groups, *affine, epsilon)


def _w_prelu(net, x, slopes=1):
    return nn.functional.prelu(x, net.take(slopes))


def _w_layer_norm(net, x, epsilon=1e-5, dims=1, noaffine=False):
    shape = x.shape[-dims:]
    affine = (None, None) if noaffine else _take_affine(net, shape)
    return nn.functional.layer_norm(x, shape, *affine, epsilon)


def _w_rms_norm(net, x, epsilon=2.220446049250313e-16, dims=1, noaffine=False):
    y = x * ((x * x).mean(tuple(range(-dims, 0)), keepdim=True) + epsilon).rsqrt()
    return y if noaffine else y * net.take(*x.shape[-dims:])


def _w_affine(net, x, nobias=False, dims=1, scalar=False, factor=1.0):
    shape = (1,) if scalar else x.shape[-dims:] if dims else (x.shape[1], *(1,) * (x.ndim - 2))
    factor, summand = _take_affine(net, shape, not nobias)
    return x * factor if nobias else x * factor + summand


def _w_batch_norm(net, x, name, epsilon=1e-5, noaffine=False):
    affine = (None, None) if noaffine else _take_affine(net, (x.shape[1],))
    mean, variance = net.constant(name)
    return nn.functional.batch_norm(x, mean, variance, *affine, False, 0, epsilon)


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


_WORDS = {  # of the language, on tensors; net gives weights and arrays
    "identity": lambda net, x: x,
    "relu": lambda net, x: torch.relu(x),
    "tanh": lambda net, x: torch.tanh(x),
    "sigmoid": lambda net, x: torch.sigmoid(x),
    "softplus": lambda net, x, beta=1.0: torch.logaddexp(beta * x, torch.zeros_like(x)) / beta,
    "leaky_relu": lambda net, x, slope=0.01: nn.functional.leaky_relu(x, slope),
    "gelu": lambda net, x, tanh=False: nn.functional.gelu(x, approximate="tanh" if tanh else "none"),
    "elu": lambda net, x, alpha=1.0: nn.functional.elu(x, alpha),
    "selu": lambda net, x: nn.functional.selu(x),
    "mish": lambda net, x: nn.functional.mish(x),
    "relu6": lambda net, x: nn.functional.relu6(x),
    "hardswish": lambda net, x: nn.functional.hardswish(x),
    "hard_sigmoid": lambda net, x: nn.functional.relu6(x + 3) / 6,
    "softsign": lambda net, x: nn.functional.softsign(x),
    "log_sigmoid": lambda net, x: nn.functional.logsigmoid(x),
    "softmin": lambda net, x: (-x).softmax(-1),
    "prelu": _w_prelu,
    "silu": lambda net, x: nn.functional.silu(x),
    "erf": lambda net, x: torch.erf(x),
    "sine": lambda net, x, beta=1.0: torch.sin(beta * x),
    "hard_tanh": lambda net, x: nn.functional.hardtanh(x),
    "abs": lambda net, x: torch.abs(x),
    "scale": lambda net, x, factor: factor * x,
    "softmax": lambda net, x: x.softmax(-1),
    "log_softmax": lambda net, x: x.log_softmax(-1),
    "dense": _w_dense,
    "conv": _w_conv,
    "conv_transpose": _w_conv_transpose,
    "max_pool": lambda net, x, kernel, stride=None, pad=0, ceil_mode=False: _of(x, "max_pool")(
        x, kernel, stride, pad, ceil_mode=ceil_mode
    ),
    "avg_pool": lambda net, x, kernel, stride=None, pad=0, ceil_mode=False, count_include_pad=1: _of(
        x, "avg_pool"
    )(x, kernel, stride, pad, ceil_mode, bool(count_include_pad)),
    "adaptive_max_pool": lambda net, x, sizes: _of(x, "adaptive_max_pool")(x, sizes),
    "adaptive_avg_pool": lambda net, x, sizes: _of(x, "adaptive_avg_pool")(x, sizes),
    "global_avg_pool": lambda net, x: x.flatten(2).mean(2),
    "upsample": _w_upsample,
    "group_norm": _w_group_norm,
    "instance_norm": lambda net, x, **options: _w_group_norm(net, x, x.shape[1], **options),
    "flatten": lambda net, x: x.flatten(1),
    "layer_norm": _w_layer_norm,
    "rms_norm": _w_rms_norm,
    "affine": _w_affine,
    "batch_norm": _w_batch_norm,
    "embedding": lambda net, x, tokens, width: net.take(tokens, width)[x.long()],
    "position": lambda net, x: x + net.take(*x.shape[1:]),
    "attention": _w_attention,
    "token": lambda net, x, index: x[:, index],
    "mean_tokens": lambda net, x: x.mean(1),
    "select": lambda net, x: x[torch.arange(len(x), device=x.device), net.data.reshape(-1).long()],
    "constant": lambda net, x, name: net.constant(name).expand(len(x), -1, -1),
    "propagate": _w_propagate,
}
_FLAGS = {"nobias", "noaffine", "causal", "shared", "ceil_mode", "align_corners", "scalar"}
_RANKS = {  # of the values that words take, where it matters
    **{word: 2 for word in ("position", "attention", "token", "mean_tokens", "select", "propagate")},
    "embedding": 1,
}


def _option(text):
    """A number, a pair such as 3x3, or a name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return tuple(map(int, text.split("x"))) if re.fullmatch(r"\d+x\d+", text) else text


class _Network:
    """A network line as a function of torch, written apart from the modules: what the recorder compares with."""

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
        self.sizes = []  # of the pieces that the layers take of the weights
        with torch.no_grad():
            self.outputs = self(None, torch.zeros(1, *self.shape, dtype=torch.float64)).shape[1:]
        self.count = sum(self.sizes)

    def _parse(self):
        """[(word, positional, options)] up to what ends a branch; a residual has two such lists."""
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
                layers.append(("residual", branches, {}))
            elif words and words[0] in _WORDS:
                values = [
                    w
                    for w in words[1:]
                    if "=" not in w and w not in _FLAGS and not (w == "tanh" and words[0] == "gelu")
                ]
                options = dict(
                    w.split("=", 1) if "=" in w else (w, True) for w in words[1:] if w not in values
                )
                options = {k: v if v is True else _option(v) for k, v in options.items()}
                layers.append((" ".join(words), [_option(v) for v in values], options))
            else:
                raise RecordError(f"network: '{' '.join(words)}' is not a layer that the recorder knows")
            if self.parts[:1] != [";"]:
                return layers
            self.parts.pop(0)

    def __call__(self, weights, x):
        """The outputs, with all weights in one vector: layers in order, branches in order. None: zeros."""
        # In one split: the gradient of a slice is as large as the whole vector.
        self.pieces = None if weights is None else iter(weights.split(self.sizes))
        self.data = x.reshape(len(x), *self.shape)
        return self._run(self.layers, self.data)

    def _run(self, layers, x):
        for text, values, options in layers:
            word = text.split()[0]
            try:
                if x.ndim != 1 + _RANKS.get(word, x.ndim - 1):
                    raise ValueError(f"it takes values in {_RANKS[word]} dimensions")
                if word == "residual":
                    branches = [self._run(branch, x) for branch in values]
                    branches.append(x)
                    if branches[0].shape != branches[1].shape:
                        raise ValueError(
                            f"its branches are {', '.join(str(tuple(b.shape[1:])) for b in branches)}"
                        )
                    x = branches[0] + branches[1]
                else:
                    x = _WORDS[word](self, x, *values, **options)
            except (RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
                if isinstance(error, RecordError):
                    raise
                raise RecordError(
                    f"network: '{text}' does not fit values of {tuple(x.shape[1:])}: {error}"
                ) from None
        return x

    def take(self, *shape):
        if self.pieces is None:
            self.sizes.append(math.prod(shape))
            return torch.zeros(shape, dtype=torch.float64)
        return next(self.pieces).reshape(shape)

    def constant(self, name):
        if name not in self.constants:
            raise RecordError(f"network: the array '{name}' is missing: constants={{'{name}': ...}}")
        return torch.as_tensor(np.asarray(self.constants[name], np.float64)).to(self.data)


# ---- the loss line


def _one_hot(y, f):
    if y.dtype == torch.int64 and f.shape[1] > 1:  # classes; with one output, numbers
        return nn.functional.one_hot(y, f.shape[1]).to(f)
    return y.to(f).reshape(f.shape)


def _hinge(f, y):
    if f.shape[1] == 1:
        return (1 - y * f).clamp(min=0).sum(1)
    margins = (1 - (f * y).sum(1, keepdim=True) + f).clamp(min=0) * (1 - y)
    return margins.sum(1) / f.shape[1]


def _huber(f, y, delta=None, beta=None):
    if delta is not None:
        return nn.functional.huber_loss(f, y, reduction="none", delta=float(delta)).mean(1)
    return nn.functional.smooth_l1_loss(f, y, reduction="none", beta=float(beta or 1)).mean(1)


def _logistic(f, y, pos_weight=None):
    weight = None if pos_weight is None else torch.as_tensor(np.array(pos_weight.split(","), np.float64)).to(f)
    return nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none", pos_weight=weight).mean(1)


def _kl_div(f, y, log_target=0):
    return nn.functional.kl_div(f, y, reduction="none", log_target=bool(int(log_target))).sum(1)


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
    "binary_cross_entropy": lambda f, y: nn.functional.binary_cross_entropy(f, y, reduction="none").mean(1),
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


def _loss_option(name, value):
    """name=value of a loss line; numbers of any precision to their last digit."""
    if torch.is_tensor(value):
        value = ",".join(_number(v) for v in value.detach().double().reshape(-1).tolist())
    elif not isinstance(value, str):
        value = str(int(value)) if name in ("ignore_index", "log_target") else _number(value)
    return f"{name}={value}"


def loss_line(loss, targets=None):
    """The format's line for a loss: such a line itself, or a module of torch.nn. Where targets are given, ignore_index is
    stated if they have it."""
    if isinstance(loss, str):
        word, *options = loss.split() or [loss]
        if word not in _LOSSES:
            raise RecordError(f"loss '{word}' is none of {', '.join(_LOSSES)}")
        for option in options:
            if option.split("=")[0] not in _LOSS_OPTIONS.get(word, ()) or "=" not in option:
                known = ", ".join(_LOSS_OPTIONS.get(word, ())) or "none"
                raise RecordError(f"loss {word}: '{option}' is not one of its options ({known})")
        return " ".join([word, *options])
    word, kind = _LOSS_MODULES.get(type(loss)), type(loss).__name__
    if word is None:
        raise RecordError(f"loss {kind} is not supported; the format has {', '.join(_LOSSES)}")
    has = _LOSS_OPTIONS.get(word, ())
    for setting, only in _LOSS_SETTINGS.items():
        value = getattr(loss, setting, only)
        if setting not in has and not (value is None if only is None else value == only):
            raise RecordError(f"loss {kind}: {setting} = {value}: the format has {only} only")
    if loss.reduction not in ("mean", "sum", "batchmean"):
        raise RecordError(
            f"loss {kind}: reduction='{loss.reduction}'; name the loss '{word}' instead of passing its module, and "
            "give each example's weight: record(indices, weights=...)"
        )
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


def _one_of(what, values):
    values = list(values)
    if any(v != values[0] for v in values):
        different = " | ".join(map(str, values))
        raise RecordError(
            f"optimizer: its parameter groups differ in their {what}: {different}; the format has one for all, "
            "so give all groups the same"
        )
    return values[0]


def optimizer_line(optimizer):
    """The optimizer line of an optimizer of torch.optim whose groups have the same rates and settings."""
    kind, o = type(optimizer), torch.optim
    if kind not in (o.SGD, o.Adam, o.AdamW, o.RMSprop, o.Adagrad, o.NAdam):
        raise RecordError(
            f"optimizer {kind.__name__} is not supported; SGD, Adam, AdamW, RMSprop, Adagrad and NAdam of torch.optim are"
        )
    _one_of("learning rates", [float(group["lr"]) for group in optimizer.param_groups])
    return _one_of("settings", [_group_line(kind, group) for group in optimizer.param_groups])


def _check_parameters(model, optimizer):
    """Every parameter of the model is trained by the optimizer, and nothing else is. Their order there is free:
    the rules work on each number by itself."""
    names = {id(p): n for n, p in model.named_parameters()}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for name, p in model.named_parameters():
        if not p.requires_grad:
            raise RecordError(
                f"parameter '{name}' is frozen (requires_grad=False); the format trains all parameters"
            )
        if not any(p is t for t in trained):
            raise RecordError(f"parameter '{name}' is not in the optimizer; the format trains all parameters")
    if any(id(p) not in names for p in trained):
        raise RecordError("the optimizer trains parameters that are not the model's")
    types = {p.dtype for p in trained}
    if types not in ({torch.float32}, {torch.float64}):
        named = ", ".join(sorted(map(str, types)))
        raise RecordError(
            f"parameters of type {named}; the format has float32 or float64: train in one of them, without "
            "model.bfloat16(), model.half() or autocast"
        )


def _check_fresh(optimizer):
    for state in optimizer.state.values():
        made = [state["step"]] if "step" in state else state.values()  # Adagrad's sum starts with a number
        if any(torch.as_tensor(v).numel() and torch.as_tensor(v).abs().max() > 0 for v in made if v is not None):
            raise RecordError(
                "the optimizer has made steps already; a recording starts with a fresh one, or goes on with the run "
                "that has these steps (resume=True)"
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
# In the order in which a step writes them. optimizer_samples.npy is the recorder's own: the optimizer's vectors at
# a few weights, by which it knows, when it resumes, the state that the recorded steps give.
_FILES = (*_NUMBERS, *_INTEGERS, "second_moments", "optimizer_samples", "weights")

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

    loss        a line of the format (docs/run-directory.md), or a module of torch.nn with reduction "mean" or "sum"
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
        self.rule = optimizer_line(optimizer)
        loss_line(loss)  # so that it is refused first
        _check_parameters(model, optimizer)
        self.inputs, self.targets = _array(inputs, "inputs"), _array(targets, "targets")
        self.loss = _Loss(loss_line(loss, self.targets), getattr(loss, "reduction", "batchmean"))
        self.watched = [_Watched(inputs, "inputs"), _Watched(targets, "targets")]
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise RecordError(f"{len(self.inputs)} inputs and {len(self.targets)} targets")
        self.constants = {name: _numbers(array).astype(np.float64) for name, array in (constants or {}).items()}
        self.resume = None if resume is False else resume
        if self.resume is None:
            _check_fresh(optimizer)
        self._watch_modes()
        embeds = any(isinstance(m, nn.Embedding) for m in model.modules())
        embeds = embeds or "embedding" in (network or "") or "select" in (network or "")
        wide = str(self.watched[0].values.dtype) in ("int64", "torch.int64")
        if self.inputs.dtype == np.int64 and not (wide or embeds):  # bytes or masks that the model takes as numbers
            self.inputs = self.inputs.astype(_numbers(self.parameters[0][:0]).dtype)
        if network is None:
            with self._other_weights():
                trace = _Trace(model, self._rows(slice(8)))
            self.network, self.parameters, self.constants = trace.line, trace.parameters, trace.constants
        elif self._mode_problem():
            raise RecordError(self._mode_problem())
        else:
            self.network = network
        self.net = _Network(self.network, self.constants)
        has = sum(p.numel() for p in self.parameters)
        if has != self.net.count:
            raise RecordError(
                f"the model has {has} parameters, '{self.network}' has {self.net.count}; is a weight in two layers?"
            )
        flat = self.inputs.ndim < 3 and math.prod(self.inputs.shape[1:]) == math.prod(self.net.shape)
        if not flat and _axes(self.inputs.shape) != _axes((1, *self.net.shape)):
            raise RecordError(
                f"inputs of shape {self.inputs.shape} do not fit '{self.network}': axes in another order?"
            )
        if len(self.net.outputs) != 1:
            raise RecordError(
                f"the outputs of '{self.network}' are {tuple(self.net.outputs)} numbers, the format has one vector"
            )
        self._check_targets(self.net.outputs[0])
        self.moments = second_moments
        self._check_outputs()
        epsilon = torch.finfo(self.parameters[0].dtype).eps
        self.check, self.steps, self.failed, self.update = check, 0, False, _Rule(self.rule, epsilon, optimizer)
        if second_moments and not self.update.moments:
            raise RecordError(
                "second_moments=True is for Adam, AdamW, NAdam, Adagrad and RMSprop without momentum that is not centered"
            )
        # Of every parameter a few numbers, at which each step is looked at.
        self.places = [_spread(p.numel(), 16) for p in self.parameters]
        self.starts = np.cumsum([0] + [len(places) for places in self.places])
        self.files, self.lock, self.pending, self.scale, self.settings, self.mean = None, None, [], None, None, ()
        self.watching = None
        self.clipped = False  # whether the gradient is the one that clip() has seen

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
                yield
            finally:
                for p, value in zip(self.parameters, saved):
                    p.copy_(value)

    def _watch_modes(self):
        """Modules that draw random numbers or couple the examples of a batch when they train, and their numbers."""
        self.random = [
            m for m in self.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p
        ]
        self.random += [m for m in self.model.modules() if isinstance(m, nn.MultiheadAttention) and m.dropout]
        self.norms = [m for m in self.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.fixed = [
            (b, b._version) for m in self.norms for b in (m.running_mean, m.running_var) if b is not None
        ]

    def _mode_problem(self):
        """What is wrong with the modes of modules, if anything."""
        if any(m.training for m in self.random):
            return f"a Dropout is in training mode: dropout {_RANDOM}"
        if any(m.training or m.running_mean is None for m in self.norms):
            return f"a BatchNorm is in training mode: {_COUPLES}"
        if any(b._version != version for b, version in self.fixed):
            return "the running statistics of a BatchNorm have changed since the recording began"
        return None

    def _check_targets(self, outputs):
        y = self.targets
        if y.dtype == np.int64 and y.ndim == 2 and y.shape[1] == outputs > 1:  # vectors of integers: one-hot, bits
            self.targets = y = y.astype(_numbers(self.parameters[0][:0]).dtype)
        if y.ndim > 1 and _axes(y.shape) == ([] if y.dtype == np.int64 or outputs == 1 else [outputs]):
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
        if self.inputs.dtype == np.int64 and "embedding" not in self.network and "select" not in self.network:
            raise RecordError(f"inputs are {self.inputs.dtype}, and '{self.network}' takes numbers")
        self._compare_outputs()
        with self._other_weights():
            self._compare_outputs()

    def _compare_outputs(self):
        order = {id(p): n for n, p in self.model.named_parameters()}
        first, rows = self.parameters[0], self._rows(slice(8))
        devices = [first.device] if first.is_cuda else []
        with torch.random.fork_rng(devices), torch.no_grad():
            given = nn.Module._call_impl(self.model, rows)  # not what module.compile() has made of it
            wanted = self.net(self._weights().double(), torch.as_tensor(np.array(self.inputs[:8])).double())
        if not torch.is_tensor(given):
            raise RecordError(f"the model returns a {type(given).__name__}; return only the tensor of its outputs")
        given = given.double().cpu()
        if wanted.shape[1] == 1 and given.ndim == 1:  # a model that ends with squeeze
            given = given[:, None]
        if given.shape != wanted.shape:
            raise RecordError(
                f"the model maps {tuple(rows.shape)} to {tuple(given.shape)}, not to "
                f"{tuple(wanted.shape)} as '{self.network}' does"
            )
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
        return {**arrays, "train_inputs": self.inputs, "train_targets": self.targets}

    def _text(self):
        return f"pathkernel-run 1\nnetwork   {self.network}\nloss      {self.loss.line}\noptimizer {self.rule}\n"

    def _start(self):
        """Writes what a run starts with, into a folder that has no run yet."""
        arrays = self._arrays()
        names = [f + ".npy" for f in (*_FILES, *arrays)] + ["run.txt"]
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
        shapes = {"second_moments": weights.shape, "weights": weights.shape}
        shapes["optimizer_samples"] = (len(self.update.vectors), int(self.starts[-1]))
        for name in _FILES:
            if (name != "second_moments" or self.moments) and (name != "optimizer_samples" or self.update.vectors):
                kind = "<i8" if name in _INTEGERS else "<f8"
                kind = weights.dtype if name in ("second_moments", "weights") else kind
                self.files[name] = _Growing(self._path(name + ".npy"), kind, shapes.get(name, ()), resume)

    def _continue(self):
        """Goes on with the run in the folder, if it is this one, and the model and the optimizer stand where it does."""

        def no(reason):
            return RecordError(f"{self.directory} cannot be resumed: {reason}")

        with os.fdopen(_open(self._path("run.txt"), os.O_RDONLY), "rb") as file:
            said = [line.split("#")[0].split() for line in file.read(2**24).decode("latin-1").splitlines()]
        for was, now in itertools.zip_longest(filter(None, said), map(str.split, self._text().splitlines())):
            if was != now:
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
        while counts["batch_offsets"] > 0 and offsets.row(counts["batch_offsets"]) > min(
            files["batch_items"].rows, files["batch_weights"].rows
        ):
            counts["batch_offsets"] -= 1
        complete = min(count for name, count in counts.items() if name not in ("batch_items", "batch_weights"))
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
        state = [_double(self._sample(vector)) for vector in self._state(no, steps)] if steps else []
        recorded = files["optimizer_samples"].row(steps - 1) if state else []
        tolerance = 1e-3 if self.update.epsilon > 1e-10 else 1e-9
        for name, there, here in zip(self.update.vectors, recorded, state):
            if not np.linalg.norm(here - there) <= tolerance * np.linalg.norm(there):
                raise no(
                    f"the optimizer's {name} is not the one that the recorded steps give: restore its state_dict as it was "
                    f"after step {steps}"
                )
        if not steps:
            _check_fresh(self.optimizer)
        self.update.resume(recorded, steps)
        weights.cut(steps + 1)  # first, since it says how many steps there are
        end = int(offsets.row(steps))
        for name, file in files.items():
            file.cut({"batch_items": end, "batch_weights": end}.get(name, steps + (name in ("weights", "batch_offsets"))))
        self.steps = steps

    def _state(self, no, steps):
        """The optimizer's vectors, each one tensor for each parameter."""
        states = [self.optimizer.state.get(p, {}) for p in self.parameters]
        for state in states:
            lacks = [name for name in self.update.vectors if not torch.is_tensor(state.get(name))]
            if lacks:
                raise no(f"the optimizer has no {lacks[0]}: restore its state_dict as it was after step {steps}")
            if "step" in state and self.update.kind != "sgd" and int(state["step"]) != steps:
                raise no(f"the optimizer has made {int(state['step'])} steps, not {steps}: restore its state_dict")
            product = state.get("mu_product")
            if self.update.options.float32_product and torch.is_tensor(product) and product.dtype == torch.float64:
                raise no(
                    "load_state_dict has made NAdam's mu_product float64, it was float32: for state in "
                    "optimizer.state.values(): state['mu_product'] = state['mu_product'].float()"
                )
        return [[state[name] for state in states] for name in self.update.vectors]

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
        self.at, self.seen = _double(self._sample(self.parameters)), [None] * len(self.parameters)

        def arrived(i, gradient):
            values, self.clipped = self._take(gradient, i), False
            self.seen[i] = values if self.seen[i] is None else self.seen[i] + values

        self.hooks = [p.register_hook(functools.partial(arrived, i)) for i, p in enumerate(self.parameters)]

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

    def _stepped(self, settings):
        """The optimizer has made a step: takes what record() needs, before others change it."""
        gradients = [p.grad for p in self.parameters]
        if any(g is None for g in gradients):
            raise self._refusal("a parameter has no gradient, the optimizer leaves it out")
        taken, seen, self.seen = self._sample(gradients), self.seen, [None] * len(gradients)
        seen = None if any(values is None for values in seen) else torch.cat(seen)
        step = types.SimpleNamespace(settings=settings, taken=taken, seen=seen, whole=None, scale=self.scale)
        step.altered, self.clipped = self._altered(step), False
        if self._due() or step.altered:
            step.whole = [g.detach().clone() for g in gradients]
        self.pending.append(step)

    def _due(self):
        """Whether the gradient of this step is looked at in any case."""
        step = self.steps + len(self.pending)
        return bool(self.check) and step >= self.next_check

    def _altered(self, step):
        """Whether the optimizer was given something else than what autograd computed, times the scale: something that
        was clipped, accumulated, noisy. It may be right (a backward pass for another purpose before zero_grad, say)."""
        seen, scale = step.seen, 1.0 if step.scale is None else step.scale
        if seen is None:
            return True
        if scale == 1 and torch.equal(seen, step.taken):
            return False
        seen, taken = _double(seen), _double(step.taken)
        most = np.maximum.reduceat(np.abs(seen), self.starts[:-1]).repeat(np.diff(self.starts))
        return bool((np.abs(taken - scale * seen) > 100 * self.update.epsilon * abs(scale) * most).any())

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
        if len(self.pending) != 1:
            count, self.pending = len(self.pending), []
            raise self._refusal(
                f"{count} optimizer steps since the last record(); one each (where a GradScaler skips a step, do not "
                "record it)"
            )
        step = self.pending.pop()
        self.scale = None
        if gradient_scale is not None:
            step.scale = float(gradient_scale)
            step.altered = self._altered(step)
        scale = 1.0 if step.scale is None else step.scale
        if not math.isfinite(scale):
            raise self._refusal(f"the gradient was multiplied by {scale}")
        items = _numbers(indices)
        if items.dtype == bool and items.shape == (len(self.inputs),):
            items = np.flatnonzero(items)
        if items.ndim != 1 or not len(items) or items.dtype.kind not in "iu":
            raise self._refusal(f"indices are row numbers in one dimension, not {items.dtype} {items.shape}")
        items = items.astype(np.int64, copy=False)
        # A negative number is the largest without its sign. (argmax, because max takes 30 us.)
        if not 0 <= items[items.view(np.uint64).argmax()] < len(self.inputs):
            raise self._refusal(
                f"indices {items.min()} to {items.max()}, but there are {len(self.inputs)} rows"
            )
        if weights is None:
            if self.loss.weight is not None or self.loss.ignored is not None:
                self.mean = self.loss.weights(self.targets[items], self.net.outputs[0])
            elif len(self.mean) != len(items):
                self.mean = self.loss.weights(items, self.net.outputs[0])
            weights = self.mean
        else:
            weights = _numbers(weights).astype(np.float64)
            if weights.shape != items.shape or not np.isfinite(weights).all():
                raise self._refusal(
                    f"weights have shape {weights.shape} for {len(items)} indices, or are not finite"
                )
        rate = _one_of("learning rates", [float(group.pop("lr")) for group in step.settings])
        if step.settings != self.settings:  # else they are those of the step before
            rule = _one_of("settings", [_group_line(type(self.optimizer), group) for group in step.settings])
            if rule != self.rule:
                raise self._refusal(
                    f"the optimizer is now '{rule}', it was '{self.rule}'; the format has one for the whole "
                    "run (CyclicLR and OneCycleLR: cycle_momentum=False)"
                )
            self.settings = step.settings
        if self._mode_problem():
            raise self._refusal(self._mode_problem())
        row = [_numbers(p) for p in self.parameters]  # no copies on the CPU
        finite = all(math.isfinite(np.vdot(a, a)) or np.isfinite(a).all() for a in row)  # the latter is slow
        if not finite or not math.isfinite(rate):
            raise self._refusal("a weight or the learning rate is not finite")
        changed = [w.what for w, a in zip(self.watched, (self.inputs, self.targets)) if w.differs(a, items)]
        if self._due() or changed or step.altered:
            self._check_gradient(step, items, weights, scale, changed)
            done = self.steps - self.first
            self.next_check = self.first + (done + 1 if done + 1 < self.check else max(done + 1, done * 3 // 2))
        at = np.concatenate([a.take(places) for a, places in zip(row, self.places)]).astype(np.float64)
        self._check_update(at, _double(step.taken), rate)
        rows = {
            "learning_rates": [rate],
            "batch_offsets": [self.files["batch_items"].rows + len(items)],
            "batch_items": [items],
            "batch_weights": [weights],
            "gradient_scales": [scale],
            "optimizer_samples": self.update.state,
            "weights": row,
        }
        if self.moments:
            rows["second_moments"] = [
                _numbers(self.optimizer.state[p][self.update.moments]) for p in self.parameters
            ]
        self.failed = True
        for name in self.files:  # weights last: they commit the step
            self.files[name].append(*rows[name])
        self.failed = False
        self.steps, self.at = self.steps + 1, at

    def _name(self, number):
        """Of the parameter that a sampled number belongs to."""
        parameter = self.parameters[int(np.searchsorted(self.starts, number, side="right")) - 1]
        return next(name for name, p in self.model.named_parameters() if p is parameter)

    def _check_update(self, at, gradient, rate):
        """Each step: the weights moved as the optimizer line says, by the gradient that the optimizer was given."""
        update, allowed = self.update.step(self.at, gradient, rate)
        error = np.abs(at - self.at - update)
        if not (error <= allowed).all():
            worst = int((error - allowed).argmax())
            raise self._refusal(
                f"the weights did not move by '{self.rule}' with the gradient that the optimizer was given: a weight of "
                f"'{self._name(worst)}' by {at[worst] - self.at[worst]:.9g}, not {update[worst]:.9g}. Were weights, "
                "settings or the optimizer's state changed otherwise (averaging, clamping, a hook)?"
            )

    def _gradient(self, w, items, weights, noise=0.0):
        """Of the declared loss on these rows, in float64; with rounding of the weights and inputs, if asked for."""
        generator = torch.Generator().manual_seed(self.steps)
        rows = lambda array: torch.as_tensor(np.asarray(array[items])).to(w.device)
        blur = lambda v: v + noise * v * torch.randn(v.shape, generator=generator).to(v) if noise else v
        x = rows(self.inputs)
        x = blur(x.double()) if x.is_floating_point() else x.double()
        w = blur(w).detach().requires_grad_()
        with torch.enable_grad():
            f = self.net(w, x)
            losses = self.loss.each(f, rows(self.targets)) * torch.as_tensor(weights).to(w.device)
            return torch.autograd.grad(losses.sum(), w)[0]

    def _check_gradient(self, step, items, weights, scale, changed):
        """The gradient that the optimizer was given is that of the declared loss on the declared rows, as recorded."""
        if step.whole is None:  # it looked right when the optimizer stepped
            step.whole = [p.grad.detach() for p in self.parameters if p.grad is not None]
            if len(step.whole) < len(self.parameters) or not torch.equal(self._sample(step.whole), step.taken):
                raise self._refusal(f"{' and '.join(changed)} changed in place since the recording began")
        device, dtype = step.whole[0].device, step.whole[0].dtype
        device, epsilon = "cpu" if device.type == "mps" else device, torch.finfo(dtype).eps
        given = torch.cat([g.reshape(-1) for g in step.whole]).to(device).double()
        w = torch.as_tensor(self.files["weights"].row(self.steps).copy()).to(device).double()
        wanted = scale * self._gradient(w, items, weights)
        half = self._half_precision(step.seen)
        sizes = [p.numel() for p in self.parameters]
        norms = lambda vector: torch.stack([part.norm() for part in vector.split(sizes)])
        difference, tolerance = norms(given - wanted), 1e-5 if half else 1e-2 if dtype == torch.float32 else 1e-8
        allowed = tolerance * norms(wanted) + 100 * epsilon * (1 + wanted.norm())
        if not (difference <= allowed).all():  # how much rounding changes it: where much cancels, a lot
            allowed = allowed + 100 * norms(scale * self._gradient(w, items, weights, epsilon) - wanted)
        if (difference <= allowed).all():
            return
        size, factor = wanted.norm(), float(given @ wanted / (wanted @ wanted))
        reason = (
            f"the gradient that the optimizer was given is not that of loss '{self.loss.line}' on these rows: it "
            f"differs by {float((given - wanted).norm() / size):.2g} of its size. "
        )
        if changed:
            reason += f"{' and '.join(changed).capitalize()} changed in place since the recording began. "
        if half:
            reason += (
                f"It was computed in {half}, under autocast (with or without a GradScaler): train in float32 or float64. "
            )
        elif (given - factor * wanted).norm() < 1e-3 * given.norm():
            reason += f"It is that times {factor:.6g}: clipped without record.clip, or scaled (a GradScaler)? "
        raise self._refusal(
            reason + "Are indices the rows of this batch? Are inputs what the model is given? Is it another loss or "
            "reduction? Were gradients accumulated (zero_grad?), or clipped without record.clip?"
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
