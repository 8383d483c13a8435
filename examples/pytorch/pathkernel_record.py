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
object. What the format cannot say is refused with a RecordError that names it, before anything is written. Two
checks catch what else would only show later, as a large "unattributed" part: before the first step, the model's
outputs must be those of the derived network with the weights that parameters_to_vector gives, so layout and
order agree; at the first `check` steps, the gradient must be that of the declared loss on the declared rows.

With a DataLoader, wrap the dataset in Indexed: each batch then starts with the row numbers.

Every step appends one row to each .npy file, weights.npy last; a kill at any moment loses at most the step in
flight.
"""

import functools
import math
import os
import types

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

__all__ = ["Recorder", "RecordError", "Indexed", "Abs", "Erf"]


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


class Indexed(torch.utils.data.Dataset):
    """A dataset whose samples start with their index: for indices, x, y in DataLoader(Indexed(data))."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        sample = self.dataset[index]
        return (index, *sample) if isinstance(sample, (tuple, list)) else (index, sample)


# ---- the network line: words, a function for each, and the modules that they come from


def _softplus(x, beta=1.0):
    return torch.logaddexp(beta * x, torch.zeros_like(x)) / beta


_FUNCTIONS = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": _softplus,
    "leaky_relu": lambda x, slope=0.01: nn.functional.leaky_relu(x, slope),
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "erf": torch.erf,
    "hard_tanh": nn.functional.hardtanh,
    "abs": torch.abs,
}
_PLAIN = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    Abs: "abs",
    Erf: "erf",
}
_REASONS = {  # by the name of the class, so that old versions of torch need not have it
    "BatchNorm": "it couples the examples of a batch",
    "InstanceNorm": "the format has no such layer",
    "PReLU": "its slope is trained, the format has a fixed one (LeakyReLU)",
    "RReLU": "it is random",
    "ReLU6": "the format has no such layer",
    "LogSoftmax": "the format has no such layer; use CrossEntropyLoss on what comes before it",
}


def _number(value):
    return repr(float(value))


def _leaves(module, name=""):
    """(name, module) of the layers of nested Sequentials, in order."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    if len({id(child) for child in module}) != len(module):  # named_children leaves out the second
        raise RecordError(
            f"{name or 'the model'} holds the same module twice; weights used twice cannot be recorded"
        )
    for child, inner in module.named_children():
        yield from _leaves(inner, f"{name}.{child}" if name else child)


def _layer(where, module):
    """The words of one module."""
    kind = type(module)
    no = lambda reason: RecordError(f"{where}: {reason}")
    if kind is nn.Linear:
        if [n for n, _ in module.named_parameters()] not in (["weight"], ["weight", "bias"]):
            raise no("its weight comes from other parameters (weight_norm, pruning?), not the format's")
        return f"dense {module.out_features}" + (" nobias" if module.bias is None else "")
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind is nn.LeakyReLU:
        if not module.negative_slope > 0:
            raise no(f"negative_slope = {module.negative_slope}, the format needs a positive one")
        return "leaky_relu " + _number(module.negative_slope)
    if kind is nn.Softplus:
        if module.threshold < 20:
            raise no(f"threshold = {module.threshold} makes a jump that the format's softplus does not have")
        return "softplus" if module.beta == 1 else "softplus " + _number(module.beta)
    if kind is nn.GELU:
        if getattr(module, "approximate", "none") != "none":
            raise no(f"approximate='{module.approximate}'; the format has the erf form only")
        return "gelu"
    if kind is nn.Hardtanh:
        if (module.min_val, module.max_val) != (-1, 1):
            raise no(f"from {module.min_val} to {module.max_val}; the format has -1 to 1 only")
        return "hard_tanh"
    if kind is nn.Flatten:
        if (module.start_dim, module.end_dim) != (1, -1):
            raise no("the format can flatten whole examples only (start_dim=1, end_dim=-1)")
        return "identity"  # so that the layers keep the numbers they have in the Sequential
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if module.p != 0 and module.training:
            raise no("dropout draws random numbers that the format does not keep; use p=0, or .eval() it")
        return "identity"
    reason = next((r for n, r in _REASONS.items() if kind.__name__.startswith(n)), None)
    raise no(
        reason
        or "not supported. Supported are nested Sequentials of Linear, ReLU, LeakyReLU, Tanh, Sigmoid, "
        "Softplus, GELU, SiLU, Hardtanh, Identity, Flatten, Dropout(p=0), and Abs and Erf of this file. A module "
        "with its own forward that only chains these: say so by network='input 64; dense 32; relu; dense 10'"
    )


def network_line(model):
    """The network line of nested Sequentials of supported layers."""
    lines, width = [], None
    for number, (name, module) in enumerate(_leaves(model)):
        kind = type(module).__name__
        where = f"layer {number} ('{name}', {kind})" if name else f"the model ({kind})"
        lines.append(_layer(where, module))
        if isinstance(module, nn.Linear):
            if width is None:
                lines.insert(0, f"input {module.in_features}")
            elif module.in_features != width:
                raise RecordError(
                    f"{where}: takes {module.in_features} inputs, the layers before it give {width}"
                )
            width = module.out_features
    if width is None:
        raise RecordError("the model has no Linear layer, so nothing to train")
    return "; ".join(lines)


def _parse_network(line):
    """[(word, numbers)], parameters, input width, output width."""
    layers, count, first = [], 0, None
    for text in line.split(";"):
        words = text.split()
        if first is None:
            if len(words) != 2 or words[0] != "input":
                raise RecordError(f"network: it starts with 'input' and its shape, not with '{text.strip()}'")
            first = width = math.prod(int(n) for n in words[1].split("x"))
        elif words[:1] == ["dense"] and len(words) > 1 and words[2:] in ([], ["nobias"]):
            bias = len(words) == 2
            layers.append(("dense", (width, int(words[1]), bias)))
            width = int(words[1])
            count += (layers[-1][1][0] + bias) * width
        elif words and words[0] in _FUNCTIONS:
            layers.append((words[0], [float(w) for w in words[1:]]))
        else:
            raise RecordError(f"network: '{text.strip()}' is not a layer of the format")
    return layers, count, first, width


def _evaluate(layers, weights, x):
    """The network with its weights in one vector: each layer's weight (out, in), then its bias."""
    at, x = 0, x.reshape(len(x), -1)
    for word, numbers in layers:
        if word != "dense":
            x = _FUNCTIONS[word](x, *numbers)
            continue
        width, out, bias = numbers
        x = x @ weights[at : at + out * width].reshape(out, width).T
        at += out * width
        if bias:
            x = x + weights[at : at + out]
            at += out
    return x


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


_LOSSES = {  # per example, of outputs and target vectors
    "squared": lambda f, y: ((f - y) ** 2).sum(1) / 2,
    "mean_squared": lambda f, y: ((f - y) ** 2).mean(1),
    "softmax_cross_entropy": lambda f, y: -(y * torch.log_softmax(f, 1)).sum(1),
    "logistic": lambda f, y: nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none").mean(1),
    "nll": lambda f, y: -(y * f).sum(1),
    "huber": lambda f, y: nn.functional.smooth_l1_loss(f, y, reduction="none").mean(1),
    "hinge": _hinge,
}
_LOSS_MODULES = {
    nn.CrossEntropyLoss: "softmax_cross_entropy",
    nn.MSELoss: "mean_squared",
    nn.NLLLoss: "nll",
    nn.BCEWithLogitsLoss: "logistic",
    nn.SmoothL1Loss: "huber",
    nn.HuberLoss: "huber",
    nn.MultiMarginLoss: "hinge",
}
_LOSS_SETTINGS = {
    "weight": None,
    "pos_weight": None,
    "label_smoothing": 0.0,
    "beta": 1.0,
    "delta": 1.0,
    "p": 1,
    "margin": 1.0,
    "reduction": "mean",
}


def loss_line(loss):
    """The format's word for a loss: a word itself, or a module of torch.nn."""
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise RecordError(f"loss '{loss}' is none of {', '.join(_LOSSES)}")
        return loss
    word, kind = _LOSS_MODULES.get(type(loss)), type(loss).__name__
    if word is None:
        raise RecordError(f"loss {kind} is not supported; the format has {', '.join(_LOSSES)}")
    for setting, only in _LOSS_SETTINGS.items():
        value = getattr(loss, setting, only)
        if setting == "reduction" and value != only:
            raise RecordError(
                f"loss {kind}: reduction='{value}'; name the loss '{word}' instead of passing its module, and "
                "give each example's weight: record(indices, weights=...)"
            )
        if not (value is None if only is None else value == only):
            raise RecordError(f"loss {kind}: {setting} = {value}; the format has {only} only")
    if getattr(loss, "ignore_index", -1) >= 0:
        raise RecordError(
            f"loss {kind}: ignore_index = {loss.ignore_index}: leave such rows out of the batches"
        )
    return word


# ---- the optimizer line


def _group_line(kind, group):
    def no(setting, reason):
        return RecordError(f"optimizer {kind.__name__}: {setting} = {group[setting]}: {reason}")

    for setting in ("maximize", "amsgrad"):
        if group.get(setting):
            raise no(setting, "the format has no such rule")
    if kind is torch.optim.SGD:
        keys = [k for k in ("momentum", "dampening", "weight_decay") if group[k] != 0]
        return " ".join(
            ["sgd", *(f"{k}={_number(group[k])}" for k in keys), *["nesterov=1"] * bool(group["nesterov"])]
        )
    name = "adamw" if group.get("decoupled_weight_decay", kind is torch.optim.AdamW) else "adam"
    values = {"beta1": group["betas"][0], "beta2": group["betas"][1], "epsilon": group["eps"]}
    values["weight_decay"] = group["weight_decay"]
    return " ".join([name, *(f"{k}={_number(v)}" for k, v in values.items())])


def _one_of(what, values):
    values = list(values)
    if any(v != values[0] for v in values):
        different = " | ".join(map(str, values))
        raise RecordError(
            f"optimizer: its parameter groups differ in their {what}: {different}; the format has one for all"
        )
    return values[0]


def optimizer_line(optimizer):
    """The optimizer line of a torch.optim.SGD, Adam or AdamW whose groups have the same settings."""
    kind = type(optimizer)
    if kind not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        raise RecordError(f"optimizer {kind.__name__} is not supported; torch.optim.SGD, Adam and AdamW are")
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
        raise RecordError(f"parameters of type {named}; the format has float32 or float64")
    for state in optimizer.state.values():
        if any(torch.is_tensor(v) and v.abs().max() > 0 for v in state.values()):
            raise RecordError("the optimizer has made steps already; a recording starts with a fresh one")


# ---- files


class _Growing:
    """A .npy file that grows by whole rows. Its header is brought up to date after the data, so that np.load
    can always read it; pathkernel-decompose goes by the size of the file and sees every row."""

    def __init__(self, path, dtype, row_shape=()):
        self.dtype, self.row_shape = np.dtype(dtype).newbyteorder("<"), tuple(row_shape)
        self.row_bytes = self.dtype.itemsize * math.prod(self.row_shape)
        self.rows = self.appends = 0
        self.room = -(-len(self._header(10**19, 0)) // 64) * 64
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.write(self.file, self._header(0, self.room))

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

    def update(self):
        os.pwrite(self.file, self._header(self.rows, self.room), 0)

    def close(self):
        try:
            self.update()
        finally:
            os.close(self.file)


_INTEGERS, _NUMBERS = ("batch_offsets", "batch_items"), ("learning_rates", "batch_weights", "gradient_scales")
_FILES = (*_NUMBERS, *_INTEGERS, "second_moments", "weights")  # in the order in which a step writes them


def _numbers(values):
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)


def _array(values, what):
    values = _numbers(values)
    if values.dtype.kind in "biu" and what == "targets":
        return values.astype(np.int64)
    if values.dtype not in (np.float32, np.float64):
        raise RecordError(f"{what} are {values.dtype}, not float32 or float64; pass what the model is given")
    if not np.isfinite(values).all():
        raise RecordError(f"{what} hold a NaN or an infinity")
    return values


class Recorder:
    """Records the steps of a training loop; see the top of the file.

    loss        a word of the format (docs/run-directory.md), or a module of torch.nn with reduction="mean"
    inputs      (N, ...) and targets: all training data, tensors or arrays, in the order that indices refer to
    network     the network line, for a module with its own forward; derived where it is None
    second_moments  True: also record Adam's second moments; otherwise they are recomputed
    check       at how many first steps the gradient is checked
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
        second_moments=False,
        check=1,
    ):
        self.directory, self.model, self.optimizer = os.fspath(directory), model, optimizer
        self.loss, self.rule = loss_line(loss), optimizer_line(optimizer)
        self.network = network or network_line(model)
        _check_parameters(model, optimizer)
        self.layers, count, width, outputs = _parse_network(self.network)
        self.parameters = list(model.parameters())
        if sum(p.numel() for p in self.parameters) != count:
            has = sum(p.numel() for p in self.parameters)
            raise RecordError(
                f"the model has {has} parameters, '{self.network}' has {count}; is a weight in two layers?"
            )
        self.inputs, self.targets = _array(inputs, "inputs"), _array(targets, "targets")
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise RecordError(f"{len(self.inputs)} inputs and {len(self.targets)} targets")
        if math.prod(self.inputs.shape[1:]) != width:
            raise RecordError(f"inputs of shape {self.inputs.shape} do not fit '{self.network}'")
        self._check_targets(outputs)
        self.moments = second_moments
        if second_moments and self.rule.startswith("sgd"):
            raise RecordError("second_moments=True is for Adam and AdamW")
        self.dropouts = [
            m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p != 0
        ]
        self._check_outputs()
        self.check, self.steps, self.failed = check, 0, False
        self.files, self.pending, self.scale, self.settings, self.mean = None, [], None, None, ()

    def _check_targets(self, outputs):
        y = self.targets
        if y.dtype == np.int64:
            if y.ndim != 1 or (outputs > 1 and not (0 <= y.min() and y.max() < outputs)):
                raise RecordError(
                    f"integer targets are classes, shape (N,), from 0 to {outputs - 1}; these have shape "
                    f"{y.shape}, from {y.min()} to {y.max()}"
                )
        elif y.shape != (len(y), outputs) and (outputs != 1 or y.ndim != 1):
            raise RecordError(f"targets have shape {y.shape}, the network has {outputs} outputs")

    def _check_outputs(self):
        """The model is the network of the line, with weights in the order of parameters_to_vector: compared at
        its own weights and at random ones, which tell every parameter from every other."""
        first = self.parameters[0]
        rows = torch.as_tensor(self.inputs[:8])
        saved = [p.detach().clone() for p in self.parameters]
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng([first.device] if first.is_cuda else []), torch.no_grad():
            try:
                for attempt in range(2):
                    if attempt:
                        for p in self.parameters:
                            p.copy_(torch.randn(p.shape, generator=generator) / max(p.shape[-1], 1) ** 0.5)
                    given = self.model(rows.to(first)).double().cpu()
                    wanted = _evaluate(self.layers, self._weights().double(), rows.double())
                    if given.shape != wanted.shape:
                        raise RecordError(
                            f"the model maps {tuple(rows.shape)} to {tuple(given.shape)}, not to "
                            f"{tuple(wanted.shape)} as '{self.network}' does"
                        )
                    error = (given - wanted).abs().max() / (1 + wanted.abs().max())
                    if not error < (1e-4 if first.dtype == torch.float32 else 1e-7):
                        raise RecordError(
                            f"the model is not '{self.network}' with the weights in the order of "
                            f"parameters_to_vector(model.parameters()): outputs differ by {error:.2g}"
                        )
            finally:
                for p, value in zip(self.parameters, saved):
                    p.copy_(value)

    def _weights(self):
        return torch.cat([p.detach().reshape(-1).cpu() for p in self.parameters])

    # ---- start and end

    def __enter__(self):
        os.makedirs(self.directory, exist_ok=True)
        for name in [f + ".npy" for f in _FILES] + ["train_inputs.npy", "train_targets.npy", "run.txt"]:
            if os.path.lexists(os.path.join(self.directory, name)):
                raise RecordError(f"{os.path.join(self.directory, name)} exists already: record elsewhere")
        weights = self._weights().numpy()
        np.save(os.path.join(self.directory, "train_inputs.npy"), np.ascontiguousarray(self.inputs))
        np.save(os.path.join(self.directory, "train_targets.npy"), np.ascontiguousarray(self.targets))
        self.files = {}
        for name in _FILES:
            vector = name in ("second_moments", "weights")
            if name != "second_moments" or self.moments:
                self.files[name] = _Growing(
                    os.path.join(self.directory, name + ".npy"),
                    weights.dtype if vector else "<i8" if name in _INTEGERS else "<f8",
                    weights.shape if vector else (),
                )
        self.files["batch_offsets"].append(0)
        self.files["weights"].append(weights)
        text = f"pathkernel-run 1\nnetwork   {self.network}\nloss      {self.loss}\noptimizer {self.rule}\n"
        with open(os.path.join(self.directory, "run.txt.tmp"), "w", encoding="ascii", newline="\n") as file:
            file.write(text)
        # With its manifest the directory is a run: the last thing to appear.
        os.replace(os.path.join(self.directory, "run.txt.tmp"), os.path.join(self.directory, "run.txt"))
        self._watch()
        return self

    def __exit__(self, *error):
        if self.optimizer.step is self.watching:  # a scheduler may have put its own in front of it
            del self.optimizer.step
            if self.before is not None:
                self.optimizer.step = self.before
        files, self.files, self.pending = self.files, None, []
        for file in files.values():
            file.close()

    def _watch(self):
        """Looks at settings and gradients when the optimizer steps: a scheduler changes the rate right after
        that, and zero_grad the gradients. (torch.optim has hooks for this since 2.0 only.)"""
        self.old = self._weights() if self.check else None
        self.before = self.optimizer.__dict__.get("step")
        step = self.optimizer.step

        @functools.wraps(step)
        def watched(optimizer, *arguments, **options):
            if self.files is not None:
                gradients, closure = [p.grad for p in self.parameters], bool(arguments or options)
                if not closure and any(g is None for g in gradients):
                    raise self._refusal("a parameter has no gradient, the optimizer would leave it out")
                gradient = None
                if self.steps + len(self.pending) < self.check and not closure:
                    gradient = torch.cat([g.detach().reshape(-1).cpu() for g in gradients])
                self.pending.append(
                    (gradient, [dict(group, params=None) for group in optimizer.param_groups])
                )
            return step(*arguments, **options)

        # A method, as schedulers want it.
        self.watching = self.optimizer.step = types.MethodType(watched, self.optimizer)

    # ---- steps

    def _refusal(self, reason):
        return RecordError(f"step {self.steps}: {reason}")

    def clip(self, max_norm, norm_type=2.0):
        """clip_grad_norm_ on the model's parameters, remembered for this step. Returns the norm before."""
        norm = clip_grad_norm_(self.parameters, max_norm, norm_type)
        # The same expression in the same precision as clip_grad_norm_'s: the factor to the last bit.
        self.scale = float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def __call__(self, indices, weights=None, gradient_scale=None):
        """Records the optimizer step that was just made.

        indices         rows of inputs and targets in its batch; may repeat
        weights         of each example's loss in the objective; default 1/len(indices), a mean
        gradient_scale  what the gradient was multiplied by, if clipped otherwise than by clip()
        """
        if self.files is None or self.failed:
            raise RecordError("record() outside of `with Recorder(...) as record`, or after a full disk")
        if len(self.pending) != 1:
            count, self.pending = len(self.pending), []
            raise self._refusal(f"{count} optimizer steps since the last record(); one each")
        gradient, groups = self.pending.pop()
        scale, self.scale = self.scale if gradient_scale is None else float(gradient_scale), None
        scale = 1.0 if scale is None else scale
        if not math.isfinite(scale):
            raise self._refusal(f"the gradient was multiplied by {scale}")
        items = _numbers(indices)
        if items.ndim != 1 or not len(items) or items.dtype.kind not in "iu":
            raise self._refusal(f"indices are row numbers in one dimension, not {items.dtype} {items.shape}")
        items = items.astype(np.int64, copy=False)
        # A negative number is the largest without its sign. (argmax, because max takes 30 us.)
        if not 0 <= items[items.view(np.uint64).argmax()] < len(self.inputs):
            raise self._refusal(
                f"indices {items.min()} to {items.max()}, but there are {len(self.inputs)} rows"
            )
        if weights is None:
            if len(self.mean) != len(items):
                self.mean = np.full(len(items), 1 / len(items))
            weights = self.mean
        else:
            weights = _numbers(weights).astype(np.float64)
            if weights.shape != items.shape or not np.isfinite(weights).all():
                raise self._refusal(
                    f"weights have shape {weights.shape} for {len(items)} indices, or are not finite"
                )
        rate = _one_of("learning rates", [float(group.pop("lr")) for group in groups])
        if groups != self.settings:  # else they are those of the step before
            rule = _one_of("settings", [_group_line(type(self.optimizer), group) for group in groups])
            if rule != self.rule:
                raise self._refusal(
                    f"the optimizer is now '{rule}', it was '{self.rule}'; the format has one for the whole "
                    "run (CyclicLR and OneCycleLR: cycle_momentum=False)"
                )
            self.settings = groups
        if any(m.training for m in self.dropouts):
            raise self._refusal("a Dropout was switched to training")
        row = [_numbers(p) for p in self.parameters]  # no copies on the CPU
        finite = all(math.isfinite(np.vdot(a, a)) or np.isfinite(a).all() for a in row)  # the latter is slow
        if not finite or not math.isfinite(rate):
            raise self._refusal("a weight or the learning rate is not finite")
        if gradient is not None:
            self._check_gradient(gradient, items, weights, scale)
        self.old = self._weights() if self.steps + 1 < self.check else None
        rows = {
            "learning_rates": [rate],
            "batch_offsets": [self.files["batch_items"].rows + len(items)],
            "batch_items": [items],
            "batch_weights": [weights],
            "gradient_scales": [scale],
            "weights": row,
        }
        if self.moments:
            rows["second_moments"] = [
                _numbers(self.optimizer.state[p]["exp_avg_sq"]) for p in self.parameters
            ]
        self.failed = True
        for name in self.files:  # weights last: they commit the step
            self.files[name].append(*rows[name])
        self.failed = False
        self.steps += 1

    def _check_gradient(self, gradient, items, weights, scale):
        w = self.old.double().requires_grad_()
        items = torch.as_tensor(items.astype(np.int64))
        with torch.enable_grad():
            f = _evaluate(self.layers, w, torch.as_tensor(self.inputs)[items].double())
            y = _one_hot(torch.as_tensor(self.targets)[items], f)
            losses = _LOSSES[self.loss](f, y) * torch.as_tensor(weights)
            wanted = scale * torch.autograd.grad(losses.sum(), w)[0]
        epsilon = torch.finfo(gradient.dtype).eps
        error = (gradient.double() - wanted).norm() / (wanted.norm() + 1e4 * epsilon)
        if not error < (1e-2 if gradient.dtype == torch.float32 else 1e-6):
            raise self._refusal(
                f"the gradient that the optimizer was given is not that of loss '{self.loss}' on these rows: it "
                f"differs by {error:.2g} of its size. Are indices the rows of this batch? Is it another loss or "
                "reduction? Were gradients accumulated, or clipped without record.clip?"
            )
