"""Reads any PyTorch model as a line of the network language, from its own graph of operations (ATen).

    network = read_network(model, inputs)        # a batch of inputs, as the model takes it
    network.line          "input 8; dense 32; gelu; ..."
    network.parameters    the model's parameters in the order in which they stand in w
    network.constants     {name: array} that the line names: masks, running statistics

torch.fx traces the model once (make_fx over functional_call), so that only what is computed counts, not how it is written:
attention by hand, einsum, gates, tied weights. A trace does not say which axis is the batch. It is found by its size, a
prime number that no other axis has, and the model is traced again with another one: both must give the same line.
What has no counterpart is refused by name (Unsupported). Control flow that depends on the data cannot be seen in a trace.
"""

import math

import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx

try:
    from torch.func import functional_call
except ImportError:  # PyTorch 1.13
    from torch.nn.utils.stateless import functional_call

INDEX = -1  # the id of inputs of another type made whole numbers: good for an embedding alone
HIDDEN = -1e30  # in the place of -inf in a mask: exp of it is 0, and it is a number


class Unsupported(ValueError):
    """The model computes something that the network language does not have."""


class Network:
    """A line, the parameters in the order of w, and the arrays that the line names."""

    def __init__(self, line, parameters, constants):
        self.line, self.parameters, self.constants = line, parameters, constants


class Value:
    """A tensor of the trace as a value of the language.

    row: the tensor's shape without the batch; have: the shape that the language's value has now, of the same numbers in the
    same order: a view costs nothing until an operation looks at the axes.
    batch: the axis of the tensor that holds the batch, None for one without (parameters, what is made of them).
    group: how many axes of the row are one axis with the batch, those in front of it and those behind it: (T B, D) has the
    row (T, D), batch 0, group (1, 0).
    """

    def __init__(self, id, row, batch=None, group=(0, 0), have=None, parameter=None, transposed=False):
        self.id, self.row, self.batch, self.group = id, tuple(row), batch, group
        self.have = self.row or (1,) if have is None else have
        self.parameter, self.transposed = parameter, transposed  # a parameter that is no value yet

    def axis(self, axis, rank):
        """The axis of the row that an axis of the tensor is."""
        axis %= rank
        if self.batch is None or axis < self.batch:
            return axis
        if axis == self.batch:
            raise Unsupported("an operation along the batch")
        return axis - 1 + sum(self.group)

    def like(self, id, row, have=None):
        return Value(id, row, self.batch, self.group, have)


def own(weight, bias=None):
    """The tensors of a layer, which must be parameters themselves, not what is made of them."""
    if any(value is not None and value.parameter is None for value in (weight, bias)):
        raise Unsupported("a layer whose weight or bias is no parameter")
    return [(value and value.parameter, tensor) for value, tensor in ((weight, "weight"), (bias, "bias"))]


def alone(x):
    """A value for a layer that sees channels and places: the batch is the first axis, and that axis is nothing else."""
    if x.batch != 0 or sum(x.group):
        raise Unsupported("a layer of channels over tensors whose first axis is not the batch alone")
    return x


def prod(numbers):
    return int(math.prod(numbers))


class Reader:
    def __init__(self, size, whole=False):
        self.size = size  # of the batch
        self.whole = whole  # the inputs are whole numbers
        self.steps = []  # (id of the result, id of its first operand, words; an operand in them is ("value", id))
        self.constants, self.order, self.tied, self.count = {}, [], 0, 0
        self.held = {}  # of a parameter: the name of the layer that holds it, once it has one, and its words
        self.tensors = {}  # of a parameter: its value, where it is one

    # ---- writing

    def emit(self, first, words):
        if words[0] in ("reshape", "parameter") and words[1].count("x") > 3:
            raise Unsupported("a tensor of more than four axes besides the batch")
        self.count += 1
        self.steps.append((self.count, first, words))
        return self.count

    def follow(self, x, *words):
        """A layer behind x that keeps its shape."""
        x = self.real(x)
        return x.like(self.emit(x.id, list(words)), x.row, x.have)

    def shaped(self, x, have=None):
        """The value with its axes, or others, as the language sees them."""
        x = self.real(x)
        have = (x.row if have is None else tuple(have)) or (1,)
        return x if x.have == have else x.like(self.emit(x.id, ["reshape", "x".join(map(str, have))]), x.row, have)

    def layer(self, words, tensors):
        """The words of a layer with what says that its tensors, (parameter, "weight" or "bias"), are an earlier layer's."""
        tensors = [(parameter, tensor) for parameter, tensor in tensors if parameter is not None]
        known = [(parameter, tensor) for parameter, tensor in tensors if parameter in self.held]
        names = []
        for parameter, tensor in known:
            name, earlier, kind = self.held[parameter]
            if kind != tensor:
                raise Unsupported("a tensor that is the weight of one layer and the bias of another")
            if name[0] is None:
                self.tied += 1
                name[0] = f"w{self.tied}"
                earlier.append("name=" + name[0])
            names.append(name[0])
        if len(set(names)) > 1:
            raise Unsupported("a layer whose tensors are those of two other layers")
        if known:
            words = words + [f"tied={names[0]}" + ("" if len(known) == len(tensors) > 1 else "." + known[0][1])]
        shared = [None]
        for parameter, tensor in tensors:
            if parameter not in self.held:
                self.held[parameter] = (shared, words, tensor)
                self.order.append(parameter)
        return words

    def real(self, value):
        """The value as one of the language: a parameter becomes a layer."""
        if value.parameter is None:
            return value
        shape = tuple(reversed(value.row)) if value.transposed else value.row
        if value.parameter not in self.tensors:
            have = shape if len(shape) <= 4 else tuple(size for size in shape if size != 1)
            words = self.layer(["parameter", "x".join(map(str, have)) or "1"], [(value.parameter, "weight")])
            self.tensors[value.parameter] = Value(self.emit(0, words), shape, have=have or (1,))
        whole = Value(self.tensors[value.parameter].id, shape, have=self.tensors[value.parameter].have)
        return self.permute(whole, [1, 0]) if value.transposed else whole

    def constant(self, array):
        """A tensor of numbers as a value."""
        array, batch = np.asarray(array, dtype=np.float64), None
        for axis, size in enumerate(array.shape):
            if size == self.size and (array == array.take([0], axis)).all():  # the same for every row
                array, batch = array.take(0, axis), axis
                break
        array = np.where(np.isneginf(array), HIDDEN, array)
        if not np.isfinite(array).all():
            raise Unsupported("a constant that is not finite")
        table = array.reshape(-1, array.shape[-1] if array.ndim else 1)
        return Value(self.emit(0, ["constant", self.constant_name(table)]), array.shape, batch, have=table.shape)

    def constant_name(self, table):
        """The name of an array (rows, columns) in the line."""
        for name, other in self.constants.items():
            if other.shape == table.shape and (other == table).all():
                return name
        name = f"c{len(self.constants) + 1}"
        self.constants[name] = table
        return name

    def constant_or(self, x):
        return self.constant(x.detach().double().numpy()) if isinstance(x, torch.Tensor) else x

    # ---- shapes

    def shape(self, x):
        """The tensor's shape."""
        if x.batch is None:
            return x.row
        a, b = x.batch, x.batch + sum(x.group)
        return x.row[:a] + (self.size * prod(x.row[a:b]),) + x.row[b:]

    def view(self, x, shape):
        shape = list(shape)
        if -1 in shape:
            shape[shape.index(-1)] = prod(self.shape(x)) // -prod(shape)
        wide = [[size for size in row if size != 1] for row in (shape, x.row)]
        if x.parameter is not None and not x.transposed and wide[0] == wide[1]:
            return Value(None, shape, parameter=x.parameter)
        x = self.real(x)
        if x.batch is None:
            return x.like(x.id, shape, x.have)
        before = prod(x.row[: x.batch + x.group[0]])  # numbers of a row in front of which the batch stands
        for j, size in enumerate(shape):
            first, left = divmod(before, prod(shape[:j]))
            if size % self.size == 0 and not left and first and size // self.size % first == 0:
                second = size // self.size // first
                row = shape[:j] + [n for n in (first, second) if n > 1] + shape[j + 1 :]
                return Value(x.id, row, j, (int(first > 1), int(second > 1)), x.have)
        raise Unsupported(f"a view of {self.shape(x)} as {tuple(shape)} that mixes the batch with other axes")

    def permute(self, x, axes):
        rank = len(self.shape(x))
        axes = [axis % rank for axis in axes]
        if x.parameter is not None and not x.transposed and axes == [1, 0]:
            return Value(x.id, tuple(reversed(x.row)), parameter=x.parameter, transposed=True)
        x = self.real(x)
        batch, order = None if x.batch is None else axes.index(x.batch), []
        for axis in axes:  # what is one axis with the batch goes with it
            order += range(axis, axis + sum(x.group)) if axis == x.batch else [x.axis(axis, rank)]
        row = [x.row[axis] for axis in order]
        wide = [axis for axis in order if x.row[axis] != 1]
        if wide == sorted(wide):
            return Value(x.id, row, batch, x.group, x.have)
        x = self.shaped(x, [size for size in x.row if size != 1])
        words = [str(sorted(wide).index(axis)) for axis in wide]
        return Value(self.emit(x.id, ["permute", *words]), row, batch, x.group, tuple(size for size in row if size != 1))

    def slice(self, x, axis, first, count):
        x = self.real(x)
        axis = x.axis(axis, len(self.shape(x)))
        if first == 0 and count == x.row[axis]:
            return x
        row = x.row[:axis] + (count,) + x.row[axis + 1 :]
        have, ahead = [size for size in x.row if size != 1], sum(size != 1 for size in x.row[:axis])
        x = self.shaped(x, have)
        have[ahead] = count
        return x.like(self.emit(x.id, ["slice", str(ahead), str(first), str(count)]), row, tuple(have))

    def squeeze(self, x, axis):
        x, rank = self.real(x), len(self.shape(x))
        at = x.axis(axis, rank)
        batch = x.batch if x.batch is None else x.batch - (axis % rank < x.batch)
        return Value(x.id, x.row[:at] + x.row[at + 1 :], batch, x.group, x.have)

    def unsqueeze(self, x, axis):
        x, rank = self.real(x), len(self.shape(x)) + 1
        axis %= rank
        at, batch = axis, x.batch
        if batch is not None and axis <= batch:
            batch += 1
        elif batch is not None:
            at = axis - 1 + sum(x.group)
        return Value(x.id, x.row[:at] + (1,) + x.row[at:], batch, x.group, x.have)

    # ---- arithmetic

    def pair(self, word, x, y):
        """x word y, two values, broadcast."""
        x, y = self.real(x), self.real(y)
        rank = max(len(self.shape(x)), len(self.shape(y)))
        places = {
            (value.batch + rank - len(self.shape(value)), value.group) for value in (x, y) if value.batch is not None
        }
        if len(places) > 1:
            raise Unsupported("two tensors whose batches are different axes")
        batch, group = places.pop() if places else (None, (0, 0))
        if batch is not None:
            x, y = (self.beside(value, rank - 1 - batch, sum(group)) for value in (x, y))
        full = rank - (batch is not None) + sum(group)
        rows = [(1,) * (full - len(value.row)) + value.row for value in (x, y)]
        row = tuple(max(a, b) for a, b in zip(*rows))
        if any(a != b and a != 1 and b != 1 for a, b in zip(*rows)):
            raise Unsupported(f"tensors of {self.shape(x)} and {self.shape(y)} together")
        keep = [j for j in range(full) if row[j] != 1]  # the language sees axes of more than one number
        have = tuple(row[j] for j in keep) or (1,)
        x, y = (self.shaped(value, self.front(own[j] for j in keep)) for value, own in zip((x, y), rows))
        return Value(self.emit(x.id, [word, ("value", y.id)]), row, batch, group, have)

    @staticmethod
    def front(row):
        """A shape without the ones in front, which broadcasting adds."""
        row = list(row)
        while len(row) > 1 and row[0] == 1:
            row = row[1:]
        return row

    def beside(self, value, behind, group):
        """A value without a batch as one that meets a batch axis with so many axes behind it."""
        if value.batch is not None or len(value.row) <= behind:
            return value
        at = len(value.row) - behind - 1
        if value.row[at] != 1:
            raise Unsupported("a tensor with a number for each row of the batch")
        return value.like(value.id, value.row[:at] + (1,) * group + value.row[at + 1 :], value.have)

    def scale(self, x, factor):
        return x if factor == 1 else self.follow(x, "scale", repr(float(factor)))

    def shift(self, x, number):
        return x if number == 0 else self.pair("add", x, self.constant(np.full((1,), float(number))))

    def dense(self, x, weight, bias):
        """x W^T + bias for a value (..., in) and W (out, in)."""
        x, outputs = self.shaped(x, self.front(self.real(x).row)[-4:]), weight.row[1]
        if prod(x.have) != prod(x.row):
            raise Unsupported("a matrix on values of more than four axes")
        words = ["dense", str(outputs)] + ([] if bias is not None else ["nobias"])
        words = self.layer(words, own(weight, bias))
        return x.like(self.emit(x.id, words), x.row[:-1] + (outputs,), x.have[:-1] + (outputs,))

    def matmul(self, x, y):
        """Products of the matrices in the last two axes; of both, the axes in front of these are the same."""
        rank = len(self.shape(x))
        if rank != len(self.shape(y)):
            raise Unsupported(f"a product of {self.shape(x)} and {self.shape(y)}")
        if y.parameter is not None and y.transposed and x.batch is not None and x.batch + 1 < rank:
            return self.dense(x, y, None)
        x, y = self.real(x), self.real(y)
        if y.batch is None and x.batch == rank - 2:
            lead, inner, batch, group = x.row[: rank - 2], x.row[rank - 2 : -1], x.batch, x.group
            a, b = lead + (prod(inner), x.row[-1]), y.row
            row, have = lead + inner + (y.row[-1],), lead + (prod(inner), y.row[-1])
        elif x.batch is None and y.batch == rank - 1:
            inner, batch, group = y.row[rank - 1 :], y.batch, y.group
            a, b = x.row, y.row[: rank - 1] + (prod(inner),)
            row, have = x.row[:-1] + inner, x.row[:-1] + (prod(inner),)
        elif x.batch == y.batch and x.group == y.group and (x.batch is None or x.batch < rank - 2):
            batch, group, a, b = x.batch, x.group, x.row, y.row
            row = have = x.row[:-1] + (y.row[-1],)
        else:
            raise Unsupported(f"a product of {self.shape(x)} and {self.shape(y)}")
        count = [n for n in have[:-2] if n != 1]
        a, b, have = (tuple(count) + tuple(shape[-2:]) for shape in (a, b, have))
        x, y = self.shaped(x, a), self.shaped(y, b)
        return Value(self.emit(x.id, ["matmul", ("value", y.id)]), row, batch, group, have)

    # ---- the end

    def line(self, shape, last):
        """The chain of words: values are named only where they are not the one in hand."""
        needed, order = {last}, []
        for id, first, words in reversed(self.steps):
            if id in needed or any(str(word).startswith("name=") for word in words):
                needed |= {first} | {word[1] for word in words if isinstance(word, tuple)}
                order.append((id, first, words))
        if INDEX in needed:
            raise Unsupported("numbers made whole")
        order.reverse()
        named, hand = set(), 0
        for id, first, words in order:
            named |= {word[1] for word in words if isinstance(word, tuple)}
            if first != hand and words[0] not in ("constant", "parameter"):
                named.add(first)
            hand = id
        parts, hand = ["input " + "x".join(map(str, shape))], 0
        name = {0: "input"}
        for id, first, words in order:
            if first != hand and words[0] not in ("constant", "parameter"):
                parts.append("from " + name[first])
            parts.append(" ".join(name[word[1]] if isinstance(word, tuple) else word for word in words))
            if id in named:
                name[id] = f"v{len(name)}"
                parts.append("as " + name[id])
            hand = id
        return "; ".join(parts)


RULES = {}


def rule(*names):
    def add(function):
        for name in names:
            RULES[name] = function
        return function

    return add


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _(r, x, shape, *strides):
    return r.view(x, shape)


@rule("permute")
def _(r, x, axes):
    return r.permute(x, axes)


@rule("transpose")
def _(r, x, a, b):
    axes = list(range(len(r.shape(x))))
    axes[a], axes[b] = axes[b], axes[a]
    return r.permute(x, axes)


@rule("t")
def _(r, x):
    return r.permute(x, [1, 0])


@rule("clone", "contiguous", "detach", "alias", "lift_fresh_copy")
def _(r, x, *rest, **more):
    return x


@rule("nan_to_num")  # the mark of Gradients
def _(r, x, *rest):
    raise Unsupported("a value that no gradient goes through, or nan_to_num")


@rule("_to_copy")
def _(r, x, dtype=None, **more):
    if dtype is None or dtype in (torch.float32, torch.float64):
        return x
    if dtype.is_floating_point or x.parameter is not None or x.id not in (0, INDEX):
        raise Unsupported(f"numbers made {dtype}")
    return x if r.whole and dtype != torch.bool else x.like(INDEX, x.row, x.have)


@rule("expand")
def _(r, x, shape, **more):
    own = [1] * (len(shape) - len(r.shape(x))) + list(r.shape(x))
    shape = [old if new == -1 else new for old, new in zip(own, shape)]
    for _ in range(len(own) - len(r.shape(x))):
        x = r.unsqueeze(x, 0)
    wider = [j for j, (old, new) in enumerate(zip(own, shape)) if old != new]
    if x.batch is None and any(shape[j] == r.size for j in wider):  # the same for every row
        at = next(j for j in wider if shape[j] == r.size)
        x = r.real(x)
        x = Value(x.id, x.row[:at] + x.row[at + 1 :], at, (0, 0), x.have)
        wider.remove(at)
    if not wider:
        return x
    return r.pair("add", x, r.constant(np.zeros([new if j in wider else 1 for j, new in enumerate(shape)])))


@rule("unsqueeze")
def _(r, x, axis):
    return r.unsqueeze(x, axis)


@rule("squeeze")
def _(r, x, axis=None):
    axes = [j for j, size in enumerate(r.shape(x)) if size == 1] if axis is None else [axis]
    for axis in reversed(axes):
        if r.shape(x)[axis] == 1:
            x = r.squeeze(x, axis)
    return x


@rule("slice")
def _(r, x, axis=0, first=None, end=None, step=1):
    size = r.shape(x)[axis]
    first, end, _ = slice(first, end).indices(size)
    if (first, end) == (0, size) and step == 1:
        return x
    if step != 1:
        raise Unsupported("a slice with a step")
    return r.slice(x, axis, first, end - first)


@rule("select")
def _(r, x, axis, index):
    size = r.shape(x)[axis]
    return r.squeeze(r.slice(x, axis, index % size, 1), axis)


@rule("split", "unsafe_split", "split_with_sizes", "chunk")
def _(r, x, sizes, axis=0):
    size = r.shape(x)[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, size - at) for at in range(0, size, sizes)]
    starts = np.cumsum([0, *sizes])
    return [r.slice(x, axis, int(at), int(count)) for at, count in zip(starts, sizes)]


@rule("cat")
def _(r, parts, axis=0):
    parts = [r.real(r.constant_or(x)) for x in parts]
    first = next((x for x in parts if x.batch is not None), parts[0])
    if any((x.batch, x.group) != (first.batch, first.group) for x in parts):
        raise Unsupported("a concatenation of what is the same for every row")
    at = first.axis(axis, len(r.shape(first)))
    keep = [j for j, size in enumerate(first.row) if size != 1 or j == at]
    parts = [r.shaped(x, [x.row[j] for j in keep]) for x in parts]
    row = list(first.row)
    row[at] = sum(x.row[at] for x in parts)
    words = ["concat", str(keep.index(at)), *(("value", x.id) for x in parts[1:])]
    id = r.emit(parts[0].id, words) if len(parts) > 1 else parts[0].id
    return first.like(id, row, tuple(row[j] for j in keep))


@rule("stack")
def _(r, parts, axis=0):
    return RULES["cat"](r, [r.unsqueeze(x, axis) for x in parts], axis)


@rule("addmm")
def _(r, bias, x, weight, beta=1, alpha=1):
    whole = weight.parameter is not None and weight.transposed and bias.parameter is not None
    if beta == alpha == 1 and whole and not bias.transposed and prod(bias.row) == weight.row[1]:
        return r.dense(x, weight, bias)
    return r.pair("add", r.scale(r.matmul(x, weight), alpha), r.scale(bias, beta))


@rule("mm", "bmm", "matmul")
def _(r, x, y):
    return r.matmul(x, y)


@rule("baddbmm")
def _(r, x, y, z, beta=1, alpha=1):
    product = r.scale(r.matmul(y, z), alpha)
    return product if beta == 0 else r.pair("add", product, r.scale(x, beta))


def number(x):
    return isinstance(x, (int, float, bool))


@rule("add")
def _(r, x, y, alpha=1):
    if number(x):
        x, y = y, x
    return r.shift(x, y * alpha) if number(y) else r.pair("add", x, r.scale(y, alpha))


@rule("sub")
def _(r, x, y, alpha=1):
    if number(x):
        return r.shift(r.scale(y, -alpha), x)
    return r.shift(x, -y * alpha) if number(y) else r.pair("subtract", x, r.scale(y, alpha))


@rule("rsub")
def _(r, x, y, alpha=1):
    return RULES["sub"](r, y, x, alpha)


@rule("mul")
def _(r, x, y):
    if number(x):
        x, y = y, x
    return r.scale(x, y) if number(y) else r.pair("multiply", x, y)


@rule("div")
def _(r, x, y, rounding_mode=None):
    if rounding_mode is not None:
        raise Unsupported("a rounded quotient")
    if number(y):
        return r.scale(x, 1 / y)
    inverse = r.follow(y, "power", "-1")
    return r.scale(inverse, x) if number(x) else r.pair("multiply", x, inverse)


@rule("neg")
def _(r, x):
    return r.scale(x, -1)


@rule("pow")
def _(r, x, power):
    if not number(power):
        raise Unsupported("a power that is a value")
    x = y = r.real(x)
    if power not in (1, 2, 3, 4):
        return r.follow(x, "power", repr(float(power)))
    for _ in range(int(power) - 1):
        y = r.pair("multiply", y, x)
    return y


def along(r, x, axes, keep, word):
    rank = len(r.shape(x))
    axes = [axes] if isinstance(axes, int) else axes or range(rank)
    for axis in sorted((axis % rank for axis in axes), reverse=True):
        x = r.real(x)
        at = x.axis(axis, len(r.shape(x)))
        if x.row[at] != 1:
            have = [size for size in x.row if size != 1]
            ahead = sum(size != 1 for size in x.row[:at])
            x = r.shaped(x, have)
            del have[ahead]
            x = x.like(r.emit(x.id, [word, str(ahead)]), x.row[:at] + (1,) + x.row[at + 1 :], tuple(have) or (1,))
        x = x if keep else r.squeeze(x, axis)
    return x


@rule("mean")
def _(r, x, axes=None, keep=False, **more):
    return along(r, x, axes, keep, "mean")


@rule("sum")
def _(r, x, axes=None, keep=False, **more):
    return along(r, x, axes, keep, "sum")


@rule("var")
def _(r, x, axes=None, correction=1, keepdim=False, unbiased=None, **more):
    if isinstance(axes, bool):  # var(x, unbiased)
        axes, correction = None, axes
    axes = [axes] if isinstance(axes, int) else list(axes or range(len(r.shape(x))))
    count = prod(r.shape(x)[axis] for axis in axes)
    correction = int(correction) if unbiased is None else int(unbiased)
    away = r.pair("subtract", x, along(r, x, axes, True, "mean"))
    return r.scale(along(r, r.pair("multiply", away, away), axes, keepdim, "sum"), 1 / (count - correction))


def deviation(r, *rest, **more):
    return r.follow(RULES["var"](r, *rest, **more), "power", "0.5")


RULES["std"] = deviation


@rule("var_mean")
def _(r, x, axes=None, correction=1, keepdim=False, **more):
    return [RULES["var"](r, x, axes, correction, keepdim, **more), along(r, x, axes, keepdim, "mean")]


@rule("linalg_vector_norm", "norm")
def _(r, x, order=2, axes=None, keep=False, **more):
    if order != 2 or not axes:
        raise Unsupported("this kind of norm")
    square = r.pair("multiply", x, x)
    return r.follow(along(r, square, axes, keep, "sum"), "power", "0.5")


def softmax(name):
    def apply(r, x, axis, *rest):
        rank = len(r.shape(x))
        order = [j for j in range(rank) if j != axis % rank] + [axis % rank]
        x = r.permute(x, order)
        if x.batch == rank - 1:
            raise Unsupported("a softmax along the batch")
        x = r.shaped(x, [size for size in x.row[:-1] if size != 1] + [x.row[-1]])
        return r.permute(r.follow(x, name), [order.index(j) for j in range(rank)])

    return apply


RULES["_softmax"] = RULES["softmax"] = softmax("softmax")
RULES["_log_softmax"] = RULES["log_softmax"] = softmax("log_softmax")


def activation(name):
    return lambda r, x, *rest, **more: r.follow(x, name)


for torch_name, word in {
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "abs": "abs",
    "erf": "erf",
    "sin": "sine",
    "mish": "mish",
    "hardswish": "hardswish",
    "hardsigmoid": "hard_sigmoid",
    "relu6": "relu6",
    "exp": "exp",
    "log": "log",
    "softsign": "softsign",
}.items():
    RULES[torch_name] = activation(word)


@rule("gelu")
def _(r, x, approximate="none"):
    return r.follow(x, "gelu", *(["tanh"] if approximate == "tanh" else []))


@rule("elu")
def _(r, x, alpha=1.0, scale=1.0, input_scale=1.0):
    if input_scale != 1:
        raise Unsupported("an ELU of scaled inputs")
    if scale == 1:
        return r.follow(x, "elu", repr(float(alpha)))
    if (alpha, scale) == (1.6732632423543772, 1.0507009873554805):
        return r.follow(x, "selu")
    return r.scale(r.follow(x, "elu", repr(float(alpha))), scale)


@rule("log_sigmoid_forward")
def _(r, x):
    return [r.follow(x, "log_sigmoid")]


@rule("_prelu_kernel", "prelu")
def _(r, x, weight):
    if weight.parameter is None:
        raise Unsupported("a PReLU whose slope is no parameter")
    count = prod(weight.row)
    x = r.shaped(alone(x) if count > 1 else x)
    words = r.layer(["prelu"] + ([str(count)] if count > 1 else []), [(weight.parameter, "weight")])
    return x.like(r.emit(x.id, words), x.row, x.have)


@rule("leaky_relu")
def _(r, x, slope=0.01):
    return r.follow(x, "leaky_relu", repr(float(slope)))


@rule("softplus")
def _(r, x, beta=1, threshold=20):
    if threshold != 20:
        raise Unsupported("a softplus with another threshold")
    return r.follow(x, "softplus", repr(float(beta)))


@rule("hardtanh")
def _(r, x, low=-1, high=1):
    if (low, high) == (0, 6):
        return r.follow(x, "relu6")
    if (low, high) != (-1, 1):
        raise Unsupported(f"hardtanh from {low} to {high}")
    return r.follow(x, "hard_tanh")


@rule("clamp", "clamp_min")
def _(r, x, low=None, high=None):
    if high is None and low is not None:
        return r.shift(r.follow(r.shift(x, -low), "relu"), low)
    if low is None or low >= high:
        raise Unsupported(f"clamp from {low} to {high}")
    x = r.scale(r.shift(x, -(low + high) / 2), 2 / (high - low))
    return r.shift(r.scale(r.follow(x, "hard_tanh"), (high - low) / 2), (low + high) / 2)


@rule("sqrt")
def _(r, x):
    return r.follow(x, "power", "0.5")


@rule("rsqrt")
def _(r, x):
    return r.follow(x, "power", "-0.5")


@rule("reciprocal")
def _(r, x):
    return r.follow(x, "power", "-1")


@rule("cos")
def _(r, x):
    return r.follow(r.shift(x, math.pi / 2), "sine")


@rule("native_layer_norm")
def _(r, x, shape, weight, bias, epsilon):
    dims = len(shape)
    x = r.shaped(x, r.front(x.row[:-dims]) + list(x.row[-dims:]) if len(x.row) > dims else x.row)
    y = r.follow(x, "normalize", f"epsilon={epsilon!r}", f"dims={dims}")
    if weight is not None:
        words = ["affine", f"dims={dims}"] + ([] if bias is not None else ["nobias"])
        words = r.layer(words, own(weight, bias))
        y = y.like(r.emit(y.id, words), y.row, y.have)
    return [y]


@rule("embedding")
def _(r, weight, index, padding=-1, *rest):
    if isinstance(index, torch.Tensor):  # the same entries for every row
        entries = index.flatten().tolist()
        if entries != list(range(entries[0], entries[0] + len(entries))):
            raise Unsupported("an embedding of constants that do not follow one another")
        y = r.slice(weight, 0, entries[0], len(entries))
        return r.view(y, list(index.shape) + [weight.row[-1]])
    if weight.parameter is None or index.id not in (0, INDEX):
        raise Unsupported("an embedding of what is not the data")
    if padding >= 0 or any(rest):
        raise Unsupported("an embedding with padding_idx or scale_grad_by_freq")
    words = ["embedding", *map(str, weight.row)]
    if weight.transposed:
        r.real(Value(weight.id, tuple(reversed(weight.row)), parameter=weight.parameter))
        words = r.layer(words, [(weight.parameter, "weight")]) + ["transposed"]
    else:
        words = r.layer(words, [(weight.parameter, "weight")])
    have = (prod(index.row), weight.row[1])
    return index.like(r.emit(0, words), index.row + weight.row[1:], have)


@rule("index")
def _(r, x, index):
    at = [j for j, one in enumerate(index) if one is not None]
    if len(at) == 1 and isinstance(index[at[0]], Value) and x.parameter is not None and len(x.row) == 2:
        if at[0] == 0:
            return RULES["embedding"](r, x, index[0])
        y = RULES["embedding"](r, r.permute(x, [1, 0]), index[1])  # (B, T, D) -> (D, B, T)
        rank = len(r.shape(y))
        return r.permute(y, [rank - 1, *range(rank - 1)])
    raise Unsupported("this kind of index")


@rule("masked_fill")
def _(r, x, mask, value):
    if not isinstance(mask, torch.Tensor):
        raise Unsupported("a mask that depends on the data")
    mask = mask.double()
    value = float(value)
    if value > -1e20:
        x = r.pair("multiply", x, r.constant(1 - mask.numpy()))
    return r.pair("add", x, r.constant((mask * max(value, HIDDEN)).numpy()))


@rule("where")
def _(r, mask, x, y):
    if not isinstance(mask, torch.Tensor):
        raise Unsupported("a choice that depends on the data")
    if isinstance(y, torch.Tensor) and y.numel() == 1:
        return RULES["masked_fill"](r, x, ~mask, float(y))
    raise Unsupported("a choice between two values")


@rule("tril")
def _(r, x, diagonal=0):
    return r.pair("multiply", x, r.constant(torch.ones(r.shape(x)[-2:]).tril(diagonal).numpy()))


@rule("convolution")
def _(r, x, weight, bias, stride, pad, dilation, transposed, output_pad, groups):
    x = r.shaped(alone(x))
    if len(weight.row) not in (3, 4) or weight.parameter is None:
        raise Unsupported("this kind of convolution")
    kernel = weight.row[2:]
    channels = weight.row[1] * groups if transposed else weight.row[0]
    pair = lambda numbers: "x".join(map(str, numbers))
    words = ["conv_transpose" if transposed else "conv", str(channels), pair(kernel)]
    words += ["stride=" + pair(stride), "pad=" + pair(pad)]
    words += ["output_pad=" + pair(output_pad)] if transposed else []
    words += ["dilation=" + pair(dilation), f"groups={groups}"] + ([] if bias is not None else ["nobias"])
    words = r.layer(words, own(weight, bias))
    sides = zip(x.row[1:], pad, dilation, kernel, stride, output_pad)
    if transposed:
        size = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, p, d, k, s, o in sides]
    else:
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s, o in sides]
    return x.like(r.emit(x.id, words), (channels, *size))


@rule("native_group_norm")
def _(r, x, weight, bias, count, channels, size, groups, epsilon):
    x = r.shaped(alone(x))
    words = ["group_norm", str(groups), f"epsilon={epsilon!r}"] + ([] if weight is not None else ["noaffine"])
    words = r.layer(words, own(weight, bias))
    return [x.like(r.emit(x.id, words), x.row)]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _(r, x, weight, bias, mean, variance, *rest):
    epsilon, training = rest[-1], len(rest) == 3 and rest[0]
    if training or mean is None:
        raise Unsupported("batch norm by the batch's own statistics")
    x = r.shaped(alone(x))
    name = r.constant_name(np.stack([mean.double().numpy(), variance.double().numpy()]))
    words = ["batch_norm", name, f"epsilon={epsilon!r}"] + ([] if weight is not None else ["noaffine"])
    words = r.layer(words, own(weight, bias))
    return [x.like(r.emit(x.id, words), x.row)]


def resized(r, x, size, mode):
    x = r.shaped(alone(x))
    factors = [int(new) // old for old, new in zip(x.row[1:], size)]
    if any(factor * old != int(new) for factor, old, new in zip(factors, x.row[1:], size)):
        raise Unsupported("an upsampling that is not by whole numbers")
    words = ["upsample", "x".join(map(str, factors)), *mode]
    return x.like(r.emit(x.id, words), (x.row[0], *map(int, size)))


def new_size(x, size, scales):
    for scale in scales:
        for one in scale if isinstance(scale, (list, tuple)) else [scale]:
            if one is not None and one != int(one):
                raise Unsupported("an upsampling that is not by whole numbers")
    if size is not None:
        return size
    scales = [scale for scale in scales if scale is not None]
    scales = scales[0] if scales and isinstance(scales[0], (list, tuple)) else scales
    return [round(old * scale) for old, scale in zip(x.row[1:], scales)]


@rule("upsample_nearest1d", "upsample_nearest2d")
def _(r, x, size=None, *scales):
    return resized(r, x, new_size(x, size, scales), ["nearest"])


@rule("upsample_bilinear2d", "upsample_linear1d")
def _(r, x, size=None, corners=False, *scales):
    return resized(r, x, new_size(x, size, scales), ["bilinear"] + (["align_corners"] if corners else []))


@rule("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d")
def _(r, x, size):
    x = r.shaped(alone(x))
    words = ["adaptive_avg_pool", "x".join(map(str, size))]
    return x.like(r.emit(x.id, words), (x.row[0], *size))


@rule("adaptive_max_pool2d", "adaptive_max_pool1d")
def _(r, x, size):
    x = r.shaped(alone(x))
    words = ["adaptive_max_pool", "x".join(map(str, size))]
    return [x.like(r.emit(x.id, words), (x.row[0], *size))]


@rule("unbind")
def _(r, x, axis=0):
    return [RULES["select"](r, x, axis, i) for i in range(r.shape(x)[axis])]


def pooled(x, kernel, stride, pad):
    stride = stride or kernel
    two = lambda numbers: list(numbers) * 2 if len(numbers) == 1 else list(numbers)
    kernel, stride, pad = two(kernel), two(stride), two(pad)
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.row[1:], pad, kernel, stride)]
    pair = lambda numbers: "x".join(map(str, numbers))
    return (x.row[0], *size), [pair(kernel), "stride=" + pair(stride), "pad=" + pair(pad)]


@rule("max_pool2d_with_indices", "max_pool2d")
def _(r, x, kernel, stride=(), pad=(0, 0), dilation=(1, 1), ceil=False):
    x = r.shaped(alone(x))
    if ceil or tuple(dilation) not in ((1, 1), (1,)):
        raise Unsupported("max pooling with ceil_mode or dilation")
    row, words = pooled(x, kernel, stride, pad)
    return [x.like(r.emit(x.id, ["max_pool", *words]), row)]


@rule("avg_pool2d")
def _(r, x, kernel, stride=(), pad=(0, 0), ceil=False, include=True, divisor=None):
    x = r.shaped(alone(x))
    if ceil or divisor or (not include and any(pad)):
        raise Unsupported("average pooling with ceil_mode, another divisor or without its padding")
    row, words = pooled(x, kernel, stride, pad)
    return x.like(r.emit(x.id, ["avg_pool", *words]), row)


def attention(r, q, k, v, dropout=0.0, causal=False, mask=None, scale=None, **more):
    if dropout:
        raise Unsupported("dropout")
    q, k, v = r.real(q), r.real(k), r.real(v)
    rank = len(r.shape(k))
    if r.shape(q)[:-2] != r.shape(k)[:-2] or more.get("enable_gqa"):
        raise Unsupported("attention of groups of queries")
    back = r.permute(k, [*range(rank - 2), rank - 1, rank - 2])
    scores = r.scale(r.matmul(q, back), scale if scale is not None else 1 / math.sqrt(q.row[-1]))
    if causal:
        hidden = np.triu(np.full((q.row[-2], k.row[-2]), HIDDEN), 1)
        scores = r.pair("add", scores, r.constant(hidden))
    if mask is not None:
        scores = r.pair("add", scores, r.constant_or(mask))
    return r.matmul(softmax("softmax")(r, scores, -1), v)


@rule("scaled_dot_product_attention")
def _(r, q, k, v, mask=None, dropout=0.0, causal=False, scale=None, **more):
    return attention(r, q, k, v, dropout, causal, mask, scale)


@rule("_scaled_dot_product_flash_attention_for_cpu")
def _(r, q, k, v, dropout=0.0, causal=False, attn_mask=None, scale=None):
    return [attention(r, q, k, v, dropout, causal, attn_mask, scale)]


@rule("_scaled_dot_product_attention_math")
def _(r, q, k, v, mask=None, dropout=0.0, causal=False, dropout_mask=None, scale=None, **more):
    return [attention(r, q, k, v, dropout, causal, mask, scale)]


# These take tensors of constants as they are.
PLAIN = {
    "embedding": (1,),
    "masked_fill": (1, 2),
    "where": (0, 2),
    "native_batch_norm": (3, 4),
    "_native_batch_norm_legit_no_training": (3, 4),
}


class Gradients(torch.overrides.TorchFunctionMode):
    """Marks what is cut off from gradients: by detach, .data, no_grad. A trace does not say it."""

    def __torch_function__(self, function, types, args=(), keywords=None):
        result = function(*args, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and not result.requires_grad:
            if any(isinstance(x, torch.Tensor) and x.requires_grad for x in (*args, *(keywords or {}).values())):
                return torch.nan_to_num(result)
        return result


def trace(model, inputs):
    parameters, buffers, alias = {}, {}, {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = prefix + ("." if prefix else "") + name
                known = next((key for key, other in parameters.items() if other is parameter), full)
                parameters.setdefault(known, parameter)
                alias[full] = known
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def run(parameters, x):
        values = {name: parameters[known] for name, known in alias.items()}
        return functional_call(model, {**values, **buffers}, (x,))

    # With gradients: without them PyTorch fuses whole layers into one operation of its own.
    with Gradients():
        graph = make_fx(run)({k: v.detach().requires_grad_() for k, v in parameters.items()}, inputs)
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    if changed:
        raise Unsupported(f"a forward that changes buffers (batch norm in training mode does): {', '.join(changed)}")
    in_place(graph.graph)
    return graph, parameters


def aliased(node):
    """How the node's result is the memory of its first operand: None, "view" or "write"."""
    if getattr(node.target, "__name__", "") == "getitem":
        return aliased(node.args[0])
    schema = getattr(node.target, "_schema", None)
    info = schema.arguments[0].alias_info if schema and schema.arguments else None
    return None if info is None else "write" if info.is_write else "view"


def in_place(graph):
    """Refuses operations in place on memory that is read later under another name."""
    root, at = {}, {}
    for node in graph.nodes:
        at[node] = len(at)
        shares = node.op == "call_function" and aliased(node) and isinstance(node.args[0], torch.fx.Node)
        root[node] = root[node.args[0]] if shares else node
        if shares and aliased(node) == "write" and getattr(node.target, "__name__", "") != "getitem":
            node.meta["write"] = True
    for node in graph.nodes:
        if node.meta.get("write"):
            for other in graph.nodes:
                if root[other] is root[node] and at[other] < at[node] and any(at[user] > at[node] for user in other.users):
                    raise Unsupported(f"{node.target}: what is changed in place is used under another name, too")


def living(graph):
    """The nodes that the first output depends on, and what is done in place."""
    last = next(node for node in graph.nodes if node.op == "output")
    first = last.args[0][0] if isinstance(last.args[0], (list, tuple)) else last.args[0]
    live = {last, first} if isinstance(first, torch.fx.Node) else {last}
    for node in reversed(graph.nodes):
        if (node in live and node is not last) or node.meta.get("write"):
            live |= {node, *node.all_input_nodes}
    return live


def read_once(model, inputs):
    graph, parameters = trace(model, inputs)
    names = list(parameters)
    reader, live = Reader(len(inputs), not inputs.dtype.is_floating_point), living(graph.graph)
    known, places = {}, 0
    row = tuple(inputs.shape[1:]) or (1,)
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if places < len(names):
                value = parameters[names[places]]
                known[node] = Value(None, tuple(value.shape), parameter=names[places])
            else:
                known[node] = Value(0, inputs.shape[1:], 0)
            places += 1
        elif node.op == "get_attr":
            known[node] = getattr(graph, node.target)
            if isinstance(known[node], torch.Tensor) and known[node].requires_grad:
                raise Unsupported("a tensor that is trained and is no parameter of the model")
        elif node.op == "output":
            last = node.args[0]
            last = known[last[0] if isinstance(last, (list, tuple)) else last]
        elif node not in live:
            known[node] = None
        elif getattr(node.target, "__name__", "") == "getitem":
            parts, at = known[node.args[0]], node.args[1]
            known[node] = parts[at] if at < len(parts) else None  # a by-product that nobody reads, or the end refuses
        else:
            known[node] = call(reader, node, known)
    if last.batch != 0 or sum(last.group):
        raise Unsupported("outputs whose first axis is not the batch")
    last, outputs = reader.shaped(last, (prod(last.row),)), last.row
    if any(name not in reader.order for name in names):
        missing = [name for name in names if name not in reader.order]
        raise Unsupported(f"parameters that are never used: {', '.join(missing)}")
    return Network(reader.line(row, last.id), [parameters[n] for n in reader.order], reader.constants), outputs


def call(reader, node, known):
    name = str(node.target).replace("aten.", "", 1).split(".")[0]
    name = name[:-1] if name.endswith("_") and name[:-1] in RULES else name
    known_of = lambda x: torch.fx.node.map_arg(x, lambda n: known[n])
    args, keywords = known_of(node.args), known_of(node.kwargs)
    values = []
    torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values.append(known[n]))
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    if any(value is None for value in flat):
        return None  # made of a by-product
    if not any(isinstance(value, Value) for value in flat):
        return node.target(*args, **keywords)  # constants stay constants
    if name not in RULES:
        raise Unsupported(f"the operation {node.target}")
    extra = ("layout", "device", "pin_memory", "memory_format") + (() if name == "_to_copy" else ("dtype",))
    keywords = {k: v for k, v in keywords.items() if k not in extra}
    plain = PLAIN.get(name, ())
    args = [
        reader.constant_or(x) if isinstance(x, torch.Tensor) and i not in plain else x for i, x in enumerate(args)
    ]
    try:
        return RULES[name](reader, *args, **keywords)
    except Unsupported as error:
        raise Unsupported(f"{node.target}: {error}") from None


def read_network(model, inputs):
    """See the top of this file. inputs: a batch; only its first row is used."""
    sizes = set(inputs.shape[1:]) | {size for p in model.parameters() for size in p.shape}
    primes = [p for p in (101, 103, 107, 109, 113) if not any(size % p == 0 for size in sizes)]
    networks = []
    for size in primes[:2]:
        rows = inputs[:1].expand(size, *inputs.shape[1:]).clone()
        networks.append(read_once(model, rows)[0])
    one, two = (network.constants for network in networks)
    if networks[0].line != networks[1].line or any(not np.array_equal(one[name], two[name]) for name in one):
        raise Unsupported("a network that depends on the size of the batch, or on chance")
    return networks[0]
