"""Reads any PyTorch model as a line of the network language, from its own graph of operations (ATen).

    network = read_network(model, inputs)        # a batch of inputs, as the model takes it
    network.line          "input 8; dense 32; gelu; ..."
    network.parameters    the model's parameters in the order in which they stand in w, without those that are never used
    network.constants     {name: array} that the line names: masks, running statistics

torch.fx traces the model once (make_fx over functional_call), so that only what is computed counts, not how it is written:
attention by hand, einsum, gates, tied weights. A trace does not say which axis is the batch. It is found by its size, a
prime number that no other axis has, and the model is traced again with another one and with other rows: both must give the
same line. Some rows are then computed in batches of several sizes, which must not change their outputs.
What has no counterpart is refused by name (Unsupported). Control flow that depends on the data is refused where the
framework sees it (`if x.sum() > 0`); a choice made outside of it shows only if the two traces' rows differ in it.

How an operation is read:
- Views cost nothing until an operation looks at the axes (Value.have).
- What only moves the numbers of a row is applied to their places and written as `gather` (Reader.move).
- What is linear in one value, and rare, is applied to each unit vector and written as a product with a constant (linear).
- Comparisons of data, which no weights go into, are masks of 0 and 1 (`above`).
- Layers whose weights are made of parameters, as by weight_norm, become products of values.
"""

import contextlib
import functools
import inspect
import math
import random

import numpy as np
import torch
from torch.fx.experimental.proxy_tensor import make_fx

try:
    from torch.func import functional_call, functionalize
except ImportError:  # PyTorch 1.13
    from functorch import functionalize
    from torch.nn.utils.stateless import functional_call

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


def alone(x):
    """A value for a layer that sees channels and places: the batch is the first axis, and that axis is nothing else."""
    if x.batch != 0 or sum(x.group):
        raise Unsupported("a layer of channels over tensors whose first axis is not the batch alone")
    return x


def prod(numbers):
    return int(math.prod(numbers))


class Shared(Unsupported):
    """A tensor that the language cannot give to this layer, since another one has it otherwise."""

    def __init__(self, message, parameters):
        super().__init__(message)
        self.parameters = parameters


class Words(list):
    """The words of a layer with weights."""


class Reader:
    def __init__(self, size, whole=False, row=(), parameters=None):
        self.size, self.inputs = size, row  # of the batch, and the shape of a row
        self.whole = whole  # the inputs are whole numbers
        self.steps = []  # (id of the result, id of its first operand, words; an operand in them is ("value", id))
        self.constants, self.order, self.tied, self.count = {}, [], 0, 0
        self.held = {}  # of a parameter: the name of the layer that holds it, once it has one, and its words
        self.tensors = {}  # of a parameter: its value, where it is one
        self.parameters = parameters or {}
        self.varying = set()  # the values that depend on parameters
        self.masks = set()  # those that are 0 or 1
        self.numbers = {}  # those that are constant
        self.plain = set()  # parameters that are always values
        self.reshaped = {}  # the shapes that a value has been given already
        self.uses, self.padded = {}, {}  # of a parameter: how many layers use it; as tables with a padding token
        # Of a value that consists of the data: the number of each in a row of the inputs, and a whole number added to it.
        self.source = {0: (np.arange(prod(row)), np.zeros(prod(row)))}

    # ---- writing

    def emit(self, first, words):
        if words[0] in ("reshape", "parameter") and words[1].count("x") > 3:
            raise Unsupported("a tensor of more than four axes besides the batch")
        self.count += 1
        self.steps.append((self.count, first, words))
        operands = [first] * (words[0] != "constant") + [word[1] for word in words if isinstance(word, tuple)]
        if isinstance(words, Words) or any(id in self.varying for id in operands):
            self.varying.add(self.count)
        if words[0] in ("reshape", "permute", "slice", "gather", "concat") and all(id in self.masks for id in operands):
            self.masks.add(self.count)
        return self.count

    def sourced(self, id, x, function):
        """Notes where the numbers of id are from: function moves an array of the shape x.have, as the operation did."""
        if x.id in self.source:
            self.source[id] = tuple(
                np.ascontiguousarray(function(part.reshape(x.have))).ravel() for part in self.source[x.id]
            )
        return id

    def follow(self, x, *words):
        """A layer behind x that keeps its shape."""
        x = self.real(x)
        return x.like(self.emit(x.id, list(words)), x.row, x.have)

    def shaped(self, x, have=None):
        """The value with its axes, or others, as the language sees them."""
        x = self.real(x)
        have = (x.row if have is None else tuple(have)) or (1,)
        if x.have == have:
            return x
        if (x.id, have) not in self.reshaped:
            id = self.emit(x.id, ["reshape", "x".join(map(str, have))])
            self.reshaped[x.id, have] = self.sourced(id, x, lambda a: a)
        return x.like(self.reshaped[x.id, have], x.row, have)

    def flat(self, x):
        return self.shaped(x, (prod(x.row),))

    def layer(self, words, tensors):
        """The words of a layer with what says that its tensors, (parameter, "weight" or "bias"), are an earlier layer's."""
        tensors = [(parameter, tensor) for parameter, tensor in tensors if parameter is not None]
        known = [(parameter, tensor) for parameter, tensor in tensors if parameter in self.held]
        names = []
        for parameter, tensor in known:
            name, earlier, kind = self.held[parameter]
            if kind != tensor:
                raise Shared("a tensor that is the weight of one layer and the bias of another", [parameter])
            if name[0] is None:
                self.tied += 1
                name[0] = f"w{self.tied}"
                earlier.append("name=" + name[0])
            names.append(name[0])
        if len(set(names)) > 1:
            raise Shared("a layer whose tensors are those of two other layers", [parameter for parameter, _ in known])
        if known:
            words = words + [f"tied={names[0]}" + ("" if len(known) == len(tensors) > 1 else "." + known[0][1])]
        shared, words = [None], Words(words)
        for parameter, tensor in tensors:
            self.uses[parameter] = self.uses.get(parameter, 0) + 1
            if parameter not in self.held:
                self.held[parameter] = (shared, words, tensor)
                self.order.append(parameter)
        return words

    def own(self, weight, bias=None):
        """The tensors of a layer, which must be parameters themselves, not what is made of them."""
        tensors = [value.parameter for value in (weight, bias) if value is not None]
        if any(name is None or name in self.plain for name in tensors):
            raise Unsupported("a layer whose weight or bias is no parameter")
        return [(value and value.parameter, tensor) for value, tensor in ((weight, "weight"), (bias, "bias"))]

    def real(self, value):
        """The value as one of the language: a parameter becomes a layer."""
        if value.parameter is None:
            return value
        shape = tuple(reversed(value.row)) if value.transposed else value.row
        if value.parameter not in self.tensors:
            have = shape if len(shape) <= 4 else tuple(size for size in shape if size != 1)
            have = have if len(have) <= 4 else (prod(have[:-3]), *have[-3:])
            words = self.layer(["parameter", "x".join(map(str, have)) or "1"], [(value.parameter, "weight")])
            self.tensors[value.parameter] = Value(self.emit(0, words), shape, have=have or (1,))
        whole = Value(self.tensors[value.parameter].id, shape, have=self.tensors[value.parameter].have)
        return self.permute(whole, [1, 0]) if value.transposed else whole

    def constant(self, array):
        """A tensor of numbers as a value."""
        array = np.asarray(array, dtype=np.float64)
        batch, group, shape = None, (0, 0), array.shape
        for row, at, parts, one in self.batches(array):
            if at is not None and (self.rows_of(array, at, parts, row) == one).all():  # the same for every row
                array, batch, group, shape = one.reshape(row), at, parts, row
                break
        array = np.where(np.isneginf(array), HIDDEN, array)
        if not np.isfinite(array).all():
            raise Unsupported("a constant that is not finite")
        table = array.reshape(-1, array.shape[-1] if array.ndim else 1)
        words = ["constant", self.constant_name(table)]
        known = next((id for id, _, other in self.steps if other == words), None)
        value = Value(self.emit(0, words) if known is None else known, shape, batch, group, table.shape)
        self.numbers[value.id] = array
        if np.isin(array, (0, 1)).all():
            self.masks.add(value.id)
        return value

    def constant_name(self, table):
        """The name of an array (rows, columns) in the line."""
        for name, other in self.constants.items():
            if other.shape == table.shape and (other == table).all():
                return name
        name = f"c{len(self.constants) + 1}"
        self.constants[name] = np.ascontiguousarray(table)
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
        if len(wide) > 4:
            return self.move(lambda t: t.permute(axes), x)
        x = self.shaped(x, [size for size in x.row if size != 1])
        words = [sorted(wide).index(axis) for axis in wide]
        id = self.sourced(self.emit(x.id, ["permute", *map(str, words)]), x, lambda a: a.transpose(words))
        return Value(id, row, batch, x.group, tuple(size for size in row if size != 1))

    def slice(self, x, axis, first, count):
        x = self.real(x)
        axis = x.axis(axis, len(self.shape(x)))
        if first == 0 and count == x.row[axis]:
            return x
        row = x.row[:axis] + (count,) + x.row[axis + 1 :]
        if count < 1:
            raise Unsupported("a part of a tensor without numbers")
        # Axes behind one another that the slice leaves alone are one axis to it.
        ahead, behind = prod(x.row[:axis]), prod(x.row[axis + 1 :])
        have = [size for j, size in enumerate(x.row) if size != 1 or j == axis]
        at = sum(size != 1 for size in x.row[:axis])
        if len(have) > 4:
            have, at = [ahead, x.row[axis], behind], 1
        x = self.shaped(x, have)
        have[at] = count
        id = self.emit(x.id, ["slice", str(at), str(first), str(count)])
        self.sourced(id, x, lambda a: a.take(range(first, first + count), at))
        return x.like(id, row, tuple(have))

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

    def move(self, function, *values):
        """The numbers of values in other places: function moves tensors, and fills with zeros."""
        zeros = [isinstance(x, torch.Tensor) and not x.any() for x in values]
        values = [x if zero else self.real(self.constant_or(x)) for x, zero in zip(values, zeros)]
        total, before, places = sum(prod(x.row) for x, zero in zip(values, zeros) if not zero), 0, []
        batched = np.zeros(total + 1, dtype=bool)
        for x, zero in zip(values, zeros):
            if zero:
                places.append(x.double())
                continue
            count = prod(x.row)
            at = torch.arange(before + 1, before + count + 1, dtype=torch.float64).reshape(x.row)
            if x.batch is not None:
                batched[before + 1 : before + count + 1] = True
                at = at.unsqueeze(x.batch + x.group[0])
                rows = torch.arange(self.size, dtype=torch.float64) * total
                at = (at + rows.reshape([-1] + [1] * (at.dim() - 1 - x.batch - x.group[0]))).reshape(self.shape(x))
            places.append(at)
            before += count
        values = [x for x, zero in zip(values, zeros) if not zero]
        out = function(*places).numpy()
        for row, batch, group, one in self.batches(out):
            others = one + (
                np.arange(self.size)[:, None] * total * batched[np.minimum(one, total).astype(int)]
                if batch is not None
                else 0
            )
            if (
                one.max(initial=0) <= total
                and one.size
                and (batch is None or (others == self.rows_of(out, batch, group, row)).all())
            ):
                break
        else:
            raise Unsupported("an operation that mixes the rows of a batch, or leaves nothing of them")
        if batch is None and any(x.batch is not None for x in values) and batched[one.astype(int)].any():
            raise Unsupported("an operation along the batch")
        have = (prod(row[:-1]), row[-1]) if row else (1, 1)
        if len(values) == 1 and np.array_equal(one, np.arange(1, total + 1)):
            return Value(values[0].id, row, batch, group, values[0].have)
        whole = self.flat(values[0])
        if len(values) > 1:
            whole = Value(self.concat(0, [self.flat(x).id for x in values]), (total,))
        name = self.constant_name((one - 1).reshape(have))
        id = self.emit(whole.id, ["gather", name])
        if len(values) == 1 and (one > 0).all():
            self.sourced(id, whole, lambda a: a[(one - 1).astype(int)])
        return Value(id, row, batch, group, have)

    def rows_of(self, out, batch, group, row):
        """out with the batch in front, and the rest flat."""
        full = row[: batch + group[0]] + (self.size,) + row[batch + group[0] :]
        return np.moveaxis(out.reshape(full), batch + group[0], 0).reshape(self.size, -1)

    def batches(self, out):
        """Every way in which the batch may be an axis of an array, or a part of one: row, batch, group and the first row."""
        for plain in (True, False):
            for axis, size in enumerate(out.shape):
                if size % self.size or not size:
                    continue
                for first in range(1, size // self.size + 1):
                    second, left = divmod(size // self.size, first)
                    if left or plain != (first == second == 1):
                        continue
                    row = out.shape[:axis] + tuple(n for n in (first, second) if n > 1) + out.shape[axis + 1 :]
                    group = (int(first > 1), int(second > 1))
                    yield row, axis, group, self.rows_of(out, axis, group, row)[0]
        yield out.shape, None, (0, 0), out.ravel()

    def concat(self, axis, ids):
        """The values one behind the other; a layer of the language has 16 words."""
        id = ids[0]
        for first in range(1, len(ids), 12):
            id = self.emit(id, ["concat", str(axis), *(("value", other) for other in ids[first : first + 12])])
        return id

    def compare(self, x, number):
        """The mask of x > number, of data."""
        x = self.real(x)
        if x.id in self.varying:
            raise Unsupported("a comparison of values that depend on the weights: what jumps has no path integral")
        return self.mask(self.follow(x, "above", repr(float(number))))

    def mask(self, x):
        self.masks.add(x.id)
        return x

    def invert(self, mask):
        return self.mask(self.shift(self.scale(mask, -1), 1))

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
        # The language sees axes of more than one number, and those as one that are repeated, or not, alike.
        source = None
        for one, other, shape, others in ((x, y, *rows), (y, x, *reversed(rows))):
            if word == "add" and one.id in self.source and other.id in self.numbers:
                added = np.broadcast_to(self.numbers[other.id].reshape(others), row)
                if (added == np.floor(added)).all():
                    places, offsets = (np.broadcast_to(part.reshape(shape), row) for part in self.source[one.id])
                    source = places.ravel(), (offsets + added).ravel()
        # The language sees axes of more than one number.
        sizes = [[a, b] for a, b in zip(*rows) if max(a, b) > 1]
        if len(sizes) > 4:  # axes behind one another that are repeated, or not, alike, are one
            joined = sizes[:1]
            for (a, b), (c, d) in zip(sizes, sizes[1:]):
                if (a == 1, b == 1) == (c == 1, d == 1):
                    joined[-1] = [joined[-1][0] * c, joined[-1][1] * d]
                else:
                    joined.append([c, d])
            sizes = joined
        have = tuple(max(a, b) for a, b in sizes) or (1,)
        if len(sizes) > 4:
            have = (prod(row),)
            x, y = (
                self.flat(self.move(lambda t: t.expand(row), Value(value.id, own, have=value.have)))
                for value, own in zip((x, y), rows)
            )
        elif x.row == y.row and x.have == y.have:
            have = x.have
        elif prod(rows[1]) == 1:
            have, y = x.have, self.shaped(y, (1,))
        elif prod(rows[0]) == 1:
            have, x = y.have, self.shaped(x, (1,))
        else:
            x, y = (self.shaped(value, self.front(size[j] for size in sizes)) for j, value in enumerate((x, y)))
        id = self.emit(x.id, [word, ("value", y.id)])
        if source is not None:
            self.source[id] = source
        return Value(id, row, batch, group, have)

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
        if number == 0:
            return x
        return self.pair("add", x, self.constant(np.full((1,), float(number))))

    def dense(self, x, weight, bias):
        """x W^T + bias for a value (..., in) and W (out, in)."""
        x, outputs = self.shaped(x, self.front(self.real(x).row)[-4:]), weight.row[1]
        if prod(x.have) != prod(x.row):
            raise Unsupported("a matrix on values of more than four axes")
        words = ["dense", str(outputs)] + ([] if bias is not None else ["nobias"])
        words = self.layer(words, self.own(weight, bias))
        return x.like(self.emit(x.id, words), x.row[:-1] + (outputs,), x.have[:-1] + (outputs,))

    def matmul(self, x, y):
        """x @ y, of any shapes that PyTorch takes; axes in front of the matrices are repeated."""
        ranks = len(self.shape(x)), len(self.shape(y))
        if min(ranks) == 0:
            raise Unsupported("a product of matrices with a number")
        if ranks[0] == 1:
            return self.squeeze(self.matmul(self.unsqueeze(x, 0), y), -2 if ranks[1] > 1 else 0)
        if ranks[1] == 1:
            return self.squeeze(self.matmul(x, self.unsqueeze(y, 1)), -1)
        rank = max(ranks)
        if y.parameter is not None and y.transposed and x.batch is not None and x.batch + 1 < ranks[0]:
            try:
                return self.dense(x, y, None)
            except Shared:
                raise
            except Unsupported:
                pass  # a product of values
        for _ in range(rank - ranks[0]):
            x = self.unsqueeze(x, 0)
        for _ in range(rank - ranks[1]):
            y = self.unsqueeze(y, 0)
        x, y = self.real(x), self.real(y)
        shapes = f"a product of {self.shape(x)} and {self.shape(y)}"
        if y.batch is None and x.batch == rank - 2:
            lead, inner, batch, group = x.row[: rank - 2], x.row[rank - 2 : -1], x.batch, x.group
            a, b = lead + (prod(inner), x.row[-1]), y.row
            row, have = lead + inner + (y.row[-1],), lead + (prod(inner), y.row[-1])
        elif x.batch is None and y.batch == rank - 1:
            inner, batch, group = y.row[rank - 1 :], y.batch, y.group
            a, b = x.row, y.row[: rank - 1] + (prod(inner),)
            row, have = x.row[:-1] + inner, x.row[:-1] + (prod(inner),)
        elif (x.batch is None or x.batch < rank - 2) and (y.batch is None or y.batch < rank - 2):
            batches = {(value.batch, value.group) for value in (x, y) if value.batch is not None}
            if len(batches) > 1:
                raise Unsupported(shapes)
            batch, group = batches.pop() if batches else (None, (0, 0))
            if batch is not None:  # the other one has one number there, or as many as the batch's axis has without it
                x, y = (self.beside(value, rank - 1 - batch, sum(group)) for value in (x, y))
            a, b = x.row, y.row
            row = have = tuple(max(n, m) for n, m in zip(a[:-2], b[:-2])) + (a[-2], b[-1])
        else:
            raise Unsupported(shapes)
        if a[-1] != b[-2] or any(n != m and 1 not in (n, m) for n, m in zip(a[:-2], b[:-2])):
            raise Unsupported(shapes)
        lead = tuple(max(n, m) for n, m in zip(a[:-2], b[:-2]))
        have = lead + tuple(have[-2:])
        x, y = self.repeat(x, a, lead), self.repeat(y, b, lead)
        count = tuple(n for n in lead if n != 1)
        count = count if len(count) < 3 else (prod(count),)
        a, b, have = (count + tuple(shape[-2:]) for shape in (a, b, have))
        x, y = self.shaped(x, a), self.shaped(y, b)
        return Value(self.emit(x.id, ["matmul", ("value", y.id)]), row, batch, group, have)

    def repeat(self, x, shape, lead):
        """A value of matrices of this shape, repeated along the axes in front of them."""
        if tuple(shape[:-2]) == tuple(lead):
            return x
        one = Value(x.id, shape, have=x.have)
        return self.move(lambda t: t.expand(*lead, *shape[-2:]), one)

    # ---- the end

    def line(self, shape, last):
        """The chain of words: values are named only where they are not the one in hand."""
        needed, order = {last}, []
        for id, first, words in reversed(self.steps):
            if id in needed or any(str(word).startswith("name=") for word in words):
                needed |= {first} | {word[1] for word in words if isinstance(word, tuple)}
                order.append((id, first, words))
        if any(words[0] == "whole" for _, _, words in order):
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


@rule("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh", "positive", "view_as_real_copy")
def _(r, x, *rest, **more):
    return x


@rule("nan_to_num")  # the mark of Gradients
def _(r, x, *rest):
    raise Unsupported("a value that no gradient goes through, or nan_to_num")


@rule("_to_copy")
def _(r, x, dtype=None, **more):
    if dtype is None or dtype in (torch.float32, torch.float64) or x.id in r.masks:
        return x
    if dtype.is_floating_point or dtype.is_complex or x.parameter is not None or x.id in r.varying:
        raise Unsupported(f"numbers made {dtype}")
    if dtype == torch.bool:
        return RULES["ne"](r, x, 0)
    if r.whole:
        return x
    id = r.emit(x.id, ["whole"])  # good for an embedding alone, which reads the inputs
    return x.like(r.sourced(id, x, lambda a: a), x.row, x.have)


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
    return r.move(lambda t: t.expand(shape), x)


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
        return r.move(lambda t: t.transpose(0, axis)[first:end:step].transpose(0, axis), x)
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
    parts = [r.real(r.constant_or(x)) for x in parts if not isinstance(x, torch.Tensor) or x.numel()]
    first = next((x for x in parts if x.batch is not None), parts[0])
    if any((x.batch, x.group) != (first.batch, first.group) for x in parts) or len(first.row) > 4:
        return r.move(lambda *t: torch.cat(t, axis), *parts)
    at = first.axis(axis, len(r.shape(first)))
    keep = [j for j, size in enumerate(first.row) if size != 1 or j == at]
    parts = [r.shaped(x, [x.row[j] for j in keep]) for x in parts]
    row = list(first.row)
    row[at] = sum(x.row[at] for x in parts)
    id = r.concat(keep.index(at), [x.id for x in parts])
    return first.like(id, row, tuple(row[j] for j in keep))


@rule("stack")
def _(r, parts, axis=0):
    return RULES["cat"](r, [r.unsqueeze(x, axis) for x in parts], axis)


@rule("addmm")
def _(r, bias, x, weight, beta=1, alpha=1):
    whole = weight.parameter is not None and weight.transposed and bias.parameter is not None
    if beta == alpha == 1 and whole and not bias.transposed and prod(bias.row) == weight.row[1]:
        try:
            return r.dense(x, weight, bias)
        except Shared:
            raise
        except Unsupported:
            pass  # a product of values
    return r.pair("add", r.scale(r.matmul(x, weight), alpha), r.scale(bias, beta))


@rule("mm", "bmm", "matmul", "mv", "dot", "vdot", "inner")
def _(r, x, y):
    return r.matmul(x, y)


@rule("outer", "ger")
def _(r, x, y):
    return r.pair("multiply", r.unsqueeze(x, 1), r.unsqueeze(y, 0))


@rule("addmv", "addbmm", "addr")
def _(r, x, y, z, beta=1, alpha=1):
    if len(r.shape(y)) == 1:
        product = RULES["outer"](r, y, z)
    else:
        product = r.matmul(y, z)
        product = along(r, product, 0, False, "sum") if len(r.shape(product)) == 3 else product
    product = r.scale(product, alpha)
    return product if beta == 0 else r.pair("add", product, r.scale(x, beta))


@rule("_trilinear")  # of nn.Bilinear
def _(r, x, y, z, *axes):
    for j, own in enumerate(axes[:3]):
        for axis in sorted(own):
            x, y, z = (r.unsqueeze(t, axis) if i == j else t for i, t in enumerate((x, y, z)))
    return along(r, r.pair("multiply", r.pair("multiply", x, y), z), list(axes[3]), False, "sum")


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


@rule("div", "true_divide", "divide")
def _(r, x, y, rounding_mode=None):
    if rounding_mode is not None:
        raise Unsupported("a rounded quotient")
    if number(y):
        return r.scale(x, 1 / y)
    return r.scale(r.follow(y, "power", "-1"), x) if number(x) else r.pair("divide", x, y)


@rule("neg")
def _(r, x):
    return r.scale(x, -1)


@rule("pow")
def _(r, x, power):
    if number(x):  # of a value: x^y = e^(y log x)
        if x <= 0:
            raise Unsupported(f"powers of {x}")
        return r.follow(r.scale(power, math.log(x)), "exp")
    if not number(power):
        return r.follow(r.pair("multiply", power, r.follow(x, "log")), "exp")
    x = y = r.real(x)
    if power == 0:
        raise Unsupported("a power of 0")
    if power not in (1, 2, 3, 4):
        return r.follow(x, "power", repr(float(power)))
    for _ in range(int(power) - 1):
        y = r.pair("multiply", y, x)
    return y


@rule("square")
def _(r, x):
    return RULES["pow"](r, x, 2)


@rule("lerp")
def _(r, x, y, weight):
    return RULES["add"](r, x, RULES["mul"](r, r.pair("subtract", y, x), weight))


@rule("addcmul")
def _(r, x, y, z, value=1):
    return r.pair("add", x, r.scale(r.pair("multiply", y, z), value))


@rule("addcdiv")
def _(r, x, y, z, value=1):
    return r.pair("add", x, r.scale(r.pair("divide", y, z), value))


def along(r, x, axes, keep, word):
    rank = len(r.shape(x))
    axes = [axes] if isinstance(axes, int) else axes or range(rank)
    for axis in sorted((axis % rank for axis in axes), reverse=True):
        x = r.real(x)
        at = x.axis(axis, len(r.shape(x)))
        if x.row[at] != 1:
            have = [size for size in x.row if size != 1]
            ahead = sum(size != 1 for size in x.row[:at])
            if len(have) > 4:
                have, ahead = [prod(x.row[:at]), x.row[at], prod(x.row[at + 1 :])], 1
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
    order = 2 if order is None else order
    if order == 2:
        square = r.pair("multiply", x, x)
        return r.follow(along(r, square, axes, keep, "sum"), "power", "0.5")
    if order in (1, math.inf):
        return along(r, r.follow(x, "abs"), axes, keep, "sum" if order == 1 else "max")
    raise Unsupported(f"a norm of order {order}")


@rule("amax")
def _(r, x, axes=None, keep=False):
    return along(r, x, axes, keep, "max")


@rule("amin")
def _(r, x, axes=None, keep=False):
    return along(r, x, axes, keep, "min")


def extreme(word):
    def apply(r, x, axis=None, keep=False):
        if isinstance(axis, (Value, torch.Tensor)):
            return RULES[word + "imum"](r, x, axis)
        return [along(r, x, axis, keep, word), None] if axis is not None else along(r, x, None, False, word)

    return apply


RULES["max"], RULES["min"] = extreme("max"), extreme("min")
RULES["any"] = lambda r, x, axis=None, keep=False: along(r, RULES["ne"](r, x, 0), axis, keep, "max")
RULES["all"] = lambda r, x, axis=None, keep=False: along(r, RULES["ne"](r, x, 0), axis, keep, "min")


@rule("maximum", "fmax")
def _(r, x, y):
    return r.pair("add", x, r.follow(r.pair("subtract", y, x), "relu"))


@rule("minimum", "fmin")
def _(r, x, y):
    return r.pair("subtract", x, r.follow(r.pair("subtract", x, y), "relu"))


@rule("logaddexp")
def _(r, x, y):
    return r.pair("add", x, r.follow(r.pair("subtract", y, x), "softplus"))


@rule("logsumexp")
def _(r, x, axes, keep=False):
    """x_0 - log_softmax(x)_0."""
    axes = [axes] if number(axes) else list(axes)
    if len(axes) > 1:
        raise Unsupported("logsumexp over several axes")
    parts = [r.slice(y, axes[0], 0, 1) for y in (x, RULES["log_softmax"](r, x, axes[0]))]
    y = r.pair("subtract", *parts)
    return y if keep else r.squeeze(y, axes[0])


@rule("_cdist_forward", "_euclidean_dist")
def _(r, x, y, order=2.0, mode=None):
    away = r.pair("subtract", r.unsqueeze(x, -2), r.unsqueeze(y, -3))
    return RULES["norm"](r, away, order, [-1])


def running(word):
    """Along an axis, one by one: cumprod and prod."""

    def apply(r, x, axis=None, *rest, **more):
        if axis is None:
            x, axis = r.view(x, (-1,)), 0
        count = r.shape(x)[axis]
        if count > 64:
            raise Unsupported(f"a product of {count} numbers")
        parts = [r.slice(x, axis, i, 1) for i in range(count)]
        for i in range(1, count):
            parts[i] = r.pair("multiply", parts[i - 1], parts[i])
        keep = word == "cumprod" or (rest and rest[0])
        return RULES["cat"](r, parts, axis) if word == "cumprod" else parts[-1] if keep else r.squeeze(parts[-1], axis)

    return apply


RULES["cumprod"], RULES["prod"] = running("cumprod"), running("prod")


def linear(r, x, function):
    """A function that is linear in each row of x, and axes of its own: as a product with a constant matrix."""
    x = alone(r.real(x))
    count = prod(x.row)
    out = function(torch.eye(count, dtype=torch.float64).reshape(count, *x.row))
    matrix = out.reshape(count, -1)
    if matrix.numel() > 1 << 24:
        raise Unsupported(f"a matrix of {matrix.shape[0]} x {matrix.shape[1]} numbers")
    x = r.shaped(x, (1, count))
    y = r.emit(x.id, ["matmul", ("value", r.constant(matrix.numpy()).id)])
    return x.like(y, out.shape[1:], (1, matrix.shape[1]))


def softmax(name):
    def apply(r, x, axis, *rest):
        rank = len(r.shape(x))
        order = [j for j in range(rank) if j != axis % rank] + [axis % rank]
        x = r.permute(x, order)
        if x.batch == rank - 1:
            raise Unsupported("a softmax along the batch")
        have = [size for size in x.row[:-1] if size != 1] + [x.row[-1]]
        x = r.shaped(x, have if len(have) < 5 else [prod(have[:-1]), have[-1]])
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
    "log_sigmoid": "log_sigmoid",
}.items():
    RULES[torch_name] = activation(word)


@rule("gelu")
def _(r, x, approximate="none"):
    return r.follow(x, "gelu", *(["tanh"] if approximate == "tanh" else []))


@rule("elu")
def _(r, x, alpha=1.0, scale=1.0, input_scale=1.0):
    if (alpha, scale, input_scale) == (1.6732632423543772, 1.0507009873554805, 1):
        return r.follow(x, "selu")
    y = r.follow(r.scale(x, input_scale), "elu", repr(float(alpha * input_scale)))
    return r.scale(y, scale / input_scale)


@rule("celu")
def _(r, x, alpha=1.0):
    return RULES["elu"](r, x, alpha, 1.0, 1 / alpha)


@rule("selu")
def _(r, x):
    return r.follow(x, "selu")


@rule("glu")
def _(r, x, axis=-1):
    a, b = RULES["split"](r, x, r.shape(x)[axis] // 2, axis)
    return r.pair("multiply", a, r.follow(b, "sigmoid"))


@rule("threshold")
def _(r, x, threshold, value):
    if threshold != value:
        raise Unsupported("a threshold that jumps: there is no path integral over it")
    return RULES["clamp"](r, x, threshold)


@rule("softshrink")
def _(r, x, lambd=0.5):
    return r.pair("subtract", x, RULES["clamp"](r, x, -lambd, lambd))


@rule("rrelu_with_noise", "rrelu", "rrelu_with_noise_functional")
def _(r, x, *rest, **more):
    low, high, training = [v for v in rest if number(v)][:3] if len(rest) > 2 else (1 / 8, 1 / 3, False)
    if training is True:
        raise Unsupported("rrelu in training mode draws its slopes")
    return r.follow(x, "leaky_relu", repr((low + high) / 2))


@rule("log1p")
def _(r, x):
    return r.follow(r.shift(x, 1), "log")


@rule("expm1")
def _(r, x):
    return r.shift(r.follow(x, "exp"), -1)


@rule("log2")
def _(r, x):
    return r.scale(r.follow(x, "log"), 1 / math.log(2))


@rule("log10")
def _(r, x):
    return r.scale(r.follow(x, "log"), 1 / math.log(10))


@rule("exp2")
def _(r, x):
    return r.follow(r.scale(x, math.log(2)), "exp")


@rule("tan")
def _(r, x):
    return r.pair("divide", r.follow(x, "sine"), RULES["cos"](r, x))


@rule("sinh")
def _(r, x):
    return r.scale(r.pair("subtract", r.follow(x, "exp"), r.follow(r.scale(x, -1), "exp")), 0.5)


@rule("cosh")
def _(r, x):
    return r.scale(r.pair("add", r.follow(x, "exp"), r.follow(r.scale(x, -1), "exp")), 0.5)


@rule("logit")
def _(r, x, epsilon=None):
    if epsilon is not None:
        x = RULES["clamp"](r, x, epsilon, 1 - epsilon)
    return r.pair("subtract", r.follow(x, "log"), r.follow(r.shift(r.scale(x, -1), 1), "log"))


@rule("erfc")
def _(r, x):
    return r.shift(r.scale(r.follow(x, "erf"), -1), 1)


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _(r, x, p=0.5, training=True, **more):
    if training and p:
        raise Unsupported("dropout draws a random network at each step: train with p = 0, or in eval mode")
    return x


@rule("native_dropout")
def _(r, x, p=0.5, training=True):
    return [RULES["dropout"](r, x, p, training), None]


@rule("log_sigmoid_forward")
def _(r, x):
    return [r.follow(x, "log_sigmoid")]


@rule("_prelu_kernel", "prelu")
def _(r, x, weight):
    count = prod(weight.row)
    if weight.parameter is None or weight.parameter in r.plain:  # relu(x) - slope relu(-x)
        shape = (count,) + (1,) * (len(r.shape(x)) - 2) if count > 1 else (1,)
        below = r.pair("multiply", r.follow(r.scale(x, -1), "relu"), r.view(weight, shape))
        return r.pair("subtract", r.follow(x, "relu"), below)
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
        return RULES["clamp"](r, x, low, high)
    return r.follow(x, "hard_tanh")


@rule("clamp_max")
def _(r, x, high):
    return RULES["clamp"](r, x, None, high)


@rule("clamp", "clamp_min", "clip")
def _(r, x, low=None, high=None):
    if any(limit is not None and not number(limit) for limit in (low, high)):
        x = (
            x
            if low is None
            else RULES["maximum"](r, x, r.constant_or(low) if not number(low) else r.constant(np.float64(low)))
        )
        return (
            x
            if high is None
            else RULES["minimum"](r, x, r.constant_or(high) if not number(high) else r.constant(np.float64(high)))
        )
    if high is None and low is not None:
        return r.shift(r.follow(r.shift(x, -low), "relu"), low)
    if low is None and high is not None:
        return r.shift(r.scale(r.follow(r.shift(r.scale(x, -1), high), "relu"), -1), high)
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


def scaled(r, x, weight, bias, channels, words):
    """x times a weight, plus a bias, of the last axes or of channels: the layer of these words, or products of values."""
    if weight is None:
        return x
    try:
        words = r.layer([*words] + ([] if bias is not None else ["nobias"]), r.own(weight, bias))
        return x.like(r.emit(x.id, words), x.row, x.have)
    except Shared:
        raise
    except Unsupported:
        for word, value in (("multiply", weight), ("add", bias)):
            if value is not None:
                shape = (*r.shape(value), *[1] * (len(x.row) - 1)) if channels else r.shape(value)
                x = r.pair(word, x, r.view(value, shape))
        return x


def by_channel(r, x, weight, bias):
    """x (batch, channels, ...) times a weight for each channel, plus a bias."""
    if x.batch == 0 and not sum(x.group):
        return scaled(r, x, weight, bias, True, ["affine", "dims=0"])
    for word, value in (("multiply", weight), ("add", bias)):
        if value is not None:
            x = r.pair(word, x, r.view(value, (-1, *[1] * (len(r.shape(x)) - 2))))
    return x


@rule("native_layer_norm")
def _(r, x, shape, weight, bias, epsilon):
    dims = len(shape)
    x = r.real(x)
    lead = r.front(x.row[:-dims]) if len(x.row) > dims else []
    lead = lead if len(lead) + dims <= 4 else [prod(lead)]
    x = r.shaped(x, lead + list(x.row[-dims:]))
    y = r.follow(x, "normalize", f"epsilon={epsilon!r}", f"dims={dims}")
    return [scaled(r, y, weight, bias, False, ["affine", f"dims={dims}"])]


@rule("layer_norm")
def _(r, x, shape, weight=None, bias=None, epsilon=1e-5, *rest):
    return RULES["native_layer_norm"](r, x, shape, weight, bias, epsilon)[0]


@rule("_fused_rms_norm", "rms_norm")
def _(r, x, shape, weight=None, epsilon=None):
    dims, x = len(shape), r.real(x)
    x = r.shaped(x, r.front(x.row[:-dims]) + list(x.row[-dims:]) if len(x.row) > dims else x.row)
    y = r.follow(
        x,
        "rms_normalize",
        f"epsilon={torch.finfo(torch.float32).eps if epsilon is None else epsilon!r}",
        f"dims={dims}",
    )
    return [scaled(r, y, weight, None, False, ["affine", f"dims={dims}"]), None]


@rule("embedding")
def _(r, weight, index, padding=-1, *rest):
    if isinstance(index, torch.Tensor):  # the same entries for every row
        return r.move(lambda w: w[index], weight)
    if index.id not in r.source:
        raise Unsupported("an embedding of what is not the data")
    if any(rest):
        raise Unsupported("an embedding with scale_grad_by_freq or sparse gradients")
    if weight.parameter is None or weight.parameter in r.plain:
        raise Unsupported("an embedding whose table is no parameter, or the bias of a layer")
    name, vocabulary = weight.parameter, weight.row[0]
    if padding >= 0:
        if weight.transposed or r.parameters[name].detach()[padding].any():
            raise Unsupported("an embedding with padding_idx whose row is not zero")
        r.padded.setdefault(name, []).append(padding)
    places, offsets = r.source[index.id]
    if not len(places):
        raise Unsupported("an embedding of nothing")
    parts, first = [], 0
    for i in range(1, len(places) + 1):  # runs of numbers that follow one another, with one offset
        if i < len(places) and places[i] == places[i - 1] + 1 and offsets[i] == offsets[first]:
            continue
        whole = first == 0 and i == len(places) == prod(r.inputs) and not offsets[0]
        options = [] if whole else [f"first={int(places[first])}", f"count={i - first}"]
        options += [f"offset={int(offsets[first])}"] if offsets[first] else []
        options += [f"padding={padding}"] if padding >= 0 else []
        if offsets[first] < 0:
            raise Unsupported("an embedding of the data less a number")
        if weight.transposed:
            r.real(Value(weight.id, tuple(reversed(weight.row)), parameter=name))
        words = ["embedding", str(vocabulary), str(weight.row[1]), *options] + ["transposed"] * weight.transposed
        parts.append(r.emit(0, r.layer(words, [(name, "weight")])))
        first = i
    id = r.concat(0, parts)
    return Value(id, index.row + weight.row[1:], index.batch, index.group, (prod(index.row), weight.row[1]))


@rule("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def _(r, weight, index, offsets, by_frequency=False, mode=0, sparse=False, weights=None, last=False, padding=-1):
    count = r.shape(index)[0] // r.size
    if not isinstance(offsets, torch.Tensor) or offsets.tolist()[: r.size] != list(range(0, count * r.size, count)):
        raise Unsupported("bags of several sizes")
    if weights is not None or padding >= 0:
        raise Unsupported("bags with weights or padding")
    y = r.view(RULES["embedding"](r, weight, index), (r.size, count, -1))
    return [along(r, y, [1], False, ("sum", "mean", "max")[mode]), None, None, None]


@rule("_weight_norm_interface")
def _(r, v, g, axis=0):
    axes = [j for j in range(len(r.shape(v))) if j != axis % len(r.shape(v))]
    norm = RULES["norm"](r, v, 2, axes, True)
    return [r.pair("multiply", v, r.pair("divide", g, norm)), norm]


@rule("_weight_norm")
def _(r, v, g, axis=0):
    return RULES["_weight_norm_interface"](r, v, g, axis)[0]


@rule("index")
def _(r, x, index):
    values = [one for one in index if isinstance(one, Value)]
    if not values:
        if isinstance(x, torch.Tensor):
            return x[tuple(slice(None) if one is None else one for one in index)]
        return r.move(lambda t: torch.ops.aten.index.Tensor(t, index), x)
    at = [j for j, one in enumerate(index) if one is not None]
    if len(at) == 1 and not isinstance(x, torch.Tensor) and x.parameter is not None and len(x.row) == 2:
        if at[0] == 0:
            return RULES["embedding"](r, x, index[0])
        y = RULES["embedding"](r, r.permute(x, [1, 0]), index[1])  # (B, T, D) -> (D, B, T)
        rank = len(r.shape(y))
        return r.permute(y, [rank - 1, *range(rank - 1)])
    if at == [0] and x.parameter is not None:  # a table of matrices
        table = r.view(x, (x.row[0], prod(x.row[1:])))
        y = RULES["embedding"](r, table, index[0])
        return r.view(y, [*r.shape(index[0]), *x.row[1:]])
    if at == [0, 1] and isinstance(index[0], torch.Tensor) and index[0].tolist() == list(range(r.size)):
        return RULES["chosen"](r, x, index[1])
    raise Unsupported("an index that depends on the data")


@rule("chosen")
def _(r, x, index):
    """x[arange(batch), index]: the sum over the axis, of which one is multiplied by 1, and the others by 0."""
    count = r.shape(x)[1]
    if index.id in r.varying or r.shape(index) != (r.size,):
        raise Unsupported("an index that depends on the weights")
    index = r.pair("add", index, r.scale(RULES["lt"](r, index, 0), count))
    mask = RULES["eq"](r, r.constant(np.arange(count, dtype=float)[None]), r.unsqueeze(index, 1))
    for _ in range(len(r.shape(x)) - 2):
        mask = r.unsqueeze(mask, -1)
    return along(r, r.pair("multiply", x, mask), [1], False, "sum")


# ---- masks


def comparison(lower, strict):
    """x > y, x >= y, x < y or x <= y as masks."""

    def apply(r, x, y):
        x, y = ((r.constant(np.float64(v)) if number(v) else r.constant_or(v)) for v in (x, y))
        x, y = (y, x) if lower else (x, y)
        away = r.pair("subtract", *((x, y) if strict else (y, x)))
        return r.compare(away, 0) if strict else r.invert(r.compare(away, 0))

    return apply


for torch_name, kind in {"gt": (False, True), "ge": (False, False), "lt": (True, True), "le": (True, False)}.items():
    RULES[torch_name] = comparison(*kind)


@rule("ne")
def _(r, x, y):
    if number(y) and not number(x) and r.constant_or(x).id in r.masks and y == 0:
        return x
    return r.mask(r.pair("add", RULES["gt"](r, x, y), RULES["lt"](r, x, y)))


@rule("eq")
def _(r, x, y):
    return r.invert(RULES["ne"](r, x, y))


def truth(r, x):
    x = r.constant_or(x)
    return x if x.id in r.masks else RULES["ne"](r, x, 0)


@rule("logical_not", "bitwise_not")
def _(r, x):
    if r.constant_or(x).id not in r.masks and not isinstance(x, Value):
        raise Unsupported("an operation on bits")
    return r.invert(truth(r, x))


@rule("logical_and", "bitwise_and", "__and__")
def _(r, x, y):
    return r.mask(r.pair("multiply", truth(r, x), truth(r, y)))


@rule("logical_or", "bitwise_or", "__or__")
def _(r, x, y):
    return r.invert(r.pair("multiply", r.invert(truth(r, x)), r.invert(truth(r, y))))


@rule("sign", "sgn")
def _(r, x):
    return r.pair("subtract", RULES["gt"](r, x, 0), RULES["lt"](r, x, 0))


def is_hidden(value):
    """-inf, and what stands for it in masks."""
    return number(value) and value <= -1e20


@rule("masked_fill")
def _(r, x, mask, value):
    if isinstance(value, Value):
        return RULES["where"](r, mask, value, x)
    return RULES["where"](r, mask, float(value), x)


@rule("where")
def _(r, mask, x=None, y=None):
    """mask x + (1 - mask) y; what is hidden is added to, so that softmax does not see it."""
    if x is None:
        raise Unsupported("places that depend on the data")
    x, y = (float(v) if isinstance(v, torch.Tensor) and v.numel() == 1 and v.dim() == 0 else v for v in (x, y))
    mask = mask.double().numpy() if isinstance(mask, torch.Tensor) else r.real(mask)
    if isinstance(mask, Value) and mask.id not in r.masks:
        raise Unsupported("a choice by values that are no mask")
    parts = []
    for value, own in ((x, mask), (y, r.invert(mask) if isinstance(mask, Value) else 1 - mask)):
        own = own if isinstance(own, Value) else r.constant(own)
        if is_hidden(value) or (isinstance(value, torch.Tensor) and (value.double() <= -1e20).all()):
            hidden = max(value if number(value) else float(value.double().max()), HIDDEN)
            parts.append((None, r.scale(own, hidden)))
        elif number(value):
            parts.append((own, r.scale(own, value) if value else None))
        else:
            value = r.constant_or(value)
            parts.append((own, value))
    seen = [value for own, value in parts if own is not None and value is not None]
    if any(own is None for own, _ in parts):  # one is hidden: the other one stays as it is
        hidden = next(value for own, value in parts if own is None)
        other = y if parts[0][0] is None else x
        if number(other):
            return hidden if other == 0 else r.shift(hidden, other)
        return r.pair("add", r.constant_or(other), hidden)
    done = []
    for (own, value), given in zip(parts, (x, y)):
        if value is not None:
            done.append(value if number(given) else r.pair("multiply", value, own))
    if not seen:
        return r.scale(parts[0][0], 0)
    return done[0] if len(done) == 1 else r.pair("add", *done)


def like(value):
    def apply(r, x, *rest, **more):
        return torch.full(r.shape(x), float(rest[0]) if value is None else value, dtype=torch.float64)

    return apply


for torch_name, number_of in {"empty_like": 0.0, "zeros_like": 0.0, "ones_like": 1.0, "full_like": None}.items():
    RULES[torch_name] = like(number_of)


def new(value):
    def apply(r, x, shape, *rest, **more):
        return torch.full(tuple(shape), float(rest[0]) if value is None else value, dtype=torch.float64)

    return apply


for torch_name, number_of in {"new_empty": 0.0, "new_zeros": 0.0, "new_ones": 1.0, "new_full": None}.items():
    RULES[torch_name] = new(number_of)


# ---- operations that move numbers


def mover(name):
    """The operation itself, on places."""

    def apply(r, x, *rest, **more):
        operation = getattr(torch.ops.aten, name)
        return r.move(lambda t: operation(t, *rest, **more), x)

    return apply


for torch_name in (
    "flip roll rot90 index_select gather unfold im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d repeat diagonal diag_embed tril triu take_along_dim as_strided take"
).split():
    RULES[torch_name] = mover(torch_name)


@rule("repeat_interleave")
def _(r, x, count, axis=None, **more):
    return r.move(lambda t: t.repeat_interleave(count, axis), x)


@rule("constant_pad_nd", "pad")
def _(r, x, sides, value=0):
    y = r.move(lambda t: torch.nn.functional.pad(t, list(sides)), x)
    if not value:
        return y
    inside = torch.nn.functional.pad(torch.ones(r.shape(x), dtype=torch.float64), list(sides))
    return r.pair("add", y, r.constant(((1 - inside) * value).numpy()))


@rule("slice_scatter")
def _(r, x, source, axis=0, first=None, end=None, step=1):
    return r.move(lambda t, u: torch.ops.aten.slice_scatter(t, u, axis, first, end, step), x, source)


@rule("select_scatter")
def _(r, x, source, axis, index):
    return r.move(lambda t, u: torch.ops.aten.select_scatter(t, u, axis, index), x, source)


@rule("copy")
def _(r, x, source, *rest):
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else r.shape(x)
    return RULES["expand"](r, r.constant_or(source), shape)


@rule("index_put")
def _(r, x, index, source, accumulate=False):
    if any(isinstance(one, Value) for one in index) or accumulate:
        raise Unsupported("numbers put at places that depend on the data, or added there")
    return r.move(
        lambda t, u: t.clone().index_put_(tuple(slice(None) if i is None else i for i in index), u), x, source
    )


@rule("fill")
def _(r, x, value):
    return torch.full(r.shape(x), float(value), dtype=torch.float64)


@rule("cumsum")
def _(r, x, axis, **more):
    rank, axis = len(r.shape(x)), axis % len(r.shape(x))
    order = [j for j in range(rank) if j != axis] + [axis]
    count = r.shape(x)[axis]
    y = r.matmul(r.permute(x, order), r.constant(np.triu(np.ones((count, count)))))
    return r.permute(y, [order.index(j) for j in range(rank)])


# ---- complex numbers: a last axis of two


class Complex:
    def __init__(self, value):
        self.value = value


@rule("view_as_complex", "view_as_complex_copy")
def _(r, x):
    return Complex(x)


@rule("view_as_real", "view_as_real_copy")
def _(r, x):
    return x.value


def complex_product(r, x, y):
    if isinstance(y, Complex):
        y = y.value
        sides = [RULES["select"](r, y, -1, i) for i in range(2)]
    else:
        sides = [r.constant(part.double().numpy()) for part in (y.real, y.imag)]
    a, b = (RULES["select"](r, x.value, -1, i) for i in range(2))
    real = r.pair("subtract", r.pair("multiply", a, sides[0]), r.pair("multiply", b, sides[1]))
    imaginary = r.pair("add", r.pair("multiply", a, sides[1]), r.pair("multiply", b, sides[0]))
    return Complex(RULES["stack"](r, [real, imaginary], -1))


# ---- layers of channels


def channels(r, x):
    """x as (channels, space), axes that are one with the batch counting as channels, and how to give results their axes."""
    x = r.real(x)
    if x.batch != 0 or x.group[0]:
        return r.shaped(alone(x)), lambda id, row: x.like(id, row)
    count = x.group[1]
    inner = x.row[: count + 1]
    shaped = Value(r.shaped(x, (prod(inner), *x.row[count + 1 :])).id, (prod(inner), *x.row[count + 1 :]), 0)
    return shaped, lambda id, row: Value(id, (*inner, *row[1:]), 0, x.group, tuple(row))


def unfolded(r, x, kernel, stride, pad, dilation):
    """(channels, positions, taps) of a value of channels and space, and the size of the space behind it."""
    x, space = r.shaped(alone(r.real(x)), (prod(x.row),)), x.row[1:]
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in zip(space, pad, dilation, kernel, stride)]

    def patches(t):
        t = torch.nn.functional.pad(t.reshape(-1, *x_row), [side for p in reversed(pad) for side in (p, p)])
        for axis, (n, k, s, d) in enumerate(zip(size, kernel, stride, dilation)):
            at = torch.arange(n)[:, None] * s + torch.arange(k)[None] * d
            t = t.index_select(2 + axis, at.reshape(-1)).unflatten(2 + axis, (n, k)).movedim(3 + axis, -1)
        return t.reshape(t.shape[0], x_row[0], prod(size), prod(kernel))

    x_row = (x.row[0] // prod(space), *space) if len(x.row) == 1 else x.row
    return r.move(patches, x), size


def convolved(r, x, weight, bias, stride, pad, dilation, groups):
    """A convolution as a product of matrices: of any number of axes, and with any weight."""
    kernel, channels = r.shape(weight)[2:], r.shape(weight)[0]
    patches, size = unfolded(r, x, kernel, stride, pad, dilation)
    inputs, positions, taps = patches.row
    patches = r.view(patches, (r.size, groups, inputs // groups, positions, taps))
    patches = r.view(r.permute(patches, (0, 1, 2, 4, 3)), (r.size, groups, inputs // groups * taps, positions))
    matrix = r.view(r.real(weight), (1, groups, channels // groups, inputs // groups * taps))
    y = r.view(r.matmul(matrix, patches), (r.size, channels, *size))
    if bias is not None:
        y = r.pair("add", y, r.view(bias, (channels, *[1] * len(size))))
    return y


def merged(r, x, weight, bias, stride, pad, dilation):
    """A convolution where the batch's axis holds others, too: a dense layer of the patches."""
    count, inputs, *space = x.row
    kernel, outputs = r.shape(weight)[2:], r.shape(weight)[0]
    three = lambda numbers: list(numbers) * len(space) if len(numbers) == 1 else list(numbers)
    whole = Value(x.id, (count * inputs, *space), 0, have=x.have)
    patches, size = unfolded(r, whole, kernel, three(stride), three(pad), three(dilation))
    positions, taps = prod(size), prod(kernel)
    patches = r.view(patches, (r.size, count, inputs, positions, taps))
    patches = r.view(r.permute(patches, (0, 1, 3, 2, 4)), (r.size, count * positions, inputs * taps))
    y = RULES["linear"](r, patches, r.view(weight, (outputs, inputs * taps)), bias)
    y = r.permute(r.view(y, (r.size, count, positions, outputs)), (0, 1, 3, 2))
    return r.view(y, (r.size * count, outputs, *size))


@rule("linear")
def _(r, x, weight, bias=None):
    y = r.matmul(x, r.permute(weight, (1, 0)))
    return y if bias is None else r.pair("add", y, bias)


@rule("convolution", "_convolution", "convolution_overrideable")
def _(r, x, weight, bias, stride, pad, dilation, transposed, output_pad, groups, *rest):
    x = r.real(x)
    if x.batch == 0 and x.group == (0, 1) and not transposed and groups == 1:
        return merged(r, x, weight, bias, stride, pad, dilation)
    x = r.shaped(alone(x))
    space = len(x.row) - 1
    stride, pad, dilation, output_pad = (
        list(v) * space if len(v) == 1 else list(v) for v in (stride, pad, dilation, output_pad)
    )
    pair = lambda numbers: "x".join(map(str, numbers))
    sides = lambda: zip(x.row[1:], pad, dilation, kernel, stride, output_pad)
    try:
        tensors = r.own(weight, bias)
        if len(weight.row) not in (3, 4) or weight.transposed:
            raise Unsupported("a convolution of more axes")
        kernel = weight.row[2:]
        channels = weight.row[1] * groups if transposed else weight.row[0]
        words = ["conv_transpose" if transposed else "conv", str(channels), pair(kernel)]
        words += ["stride=" + pair(stride), "pad=" + pair(pad)]
        words += ["output_pad=" + pair(output_pad)] if transposed else []
        words += ["dilation=" + pair(dilation), f"groups={groups}"] + ([] if bias is not None else ["nobias"])
        words = r.layer(words, tensors)
    except Shared:
        raise
    except Unsupported:
        if transposed:
            raise
        return convolved(r, x, weight, bias, stride, pad, dilation, groups)
    if transposed:
        size = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, p, d, k, s, o in sides()]
    else:
        size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s, o in sides()]
    return x.like(r.emit(x.id, words), (channels, *size))


@rule("native_group_norm")
def _(r, x, weight, bias, count, channels, size, groups, epsilon):
    x = r.real(x)
    rest = x.row[1 + x.group[1] :]
    parts = r.shaped(x, (prod(x.row[: -len(rest)]) if rest else prod(x.row), prod(rest)))
    number_of_groups = groups * (prod(x.row[: x.group[1]]))
    id = r.emit(parts.id, ["group_norm", str(number_of_groups), f"epsilon={epsilon!r}", "noaffine"])
    return [by_channel(r, x.like(id, x.row, parts.have), weight, bias)]


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_native_batch_norm_legit")
def _(r, x, weight, bias, mean, variance, *rest):
    x = r.real(x)
    epsilon, training = rest[-1], len(rest) == 3 and rest[0]
    if isinstance(mean, (bool, int)) or mean is None or training:
        # nn.InstanceNorm: (1, batch and channels, ...)
        if not isinstance(mean, torch.Tensor) and x.batch == 1 and x.group == (0, 1) and x.row[0] == 1:
            x = r.shaped(x, x.row[1:] if len(x.row) < 6 else (x.row[1], prod(x.row[2:])))
            y = x.like(r.emit(x.id, ["instance_norm", f"epsilon={epsilon!r}", "noaffine"]), x.row, x.have)
            for word, value in (("multiply", weight), ("add", bias)):
                if value is not None:
                    y = r.pair(word, y, r.view(value, (1, -1, *[1] * (len(x.row) - 2))))
            return [y]
        raise Unsupported(
            "batch norm by the batch's own statistics: an example's output depends on the rest of its batch"
        )
    if not isinstance(mean, torch.Tensor):
        raise Unsupported("batch norm by statistics that are made of parameters")
    mean, variance = (part.double().numpy() for part in (mean, variance))
    if x.batch == 0 and not sum(x.group):
        x = r.shaped(x, x.row if len(x.row) < 5 else (x.row[0], prod(x.row[1:])))
        name = r.constant_name(np.stack([mean, variance]))
        y = x.like(r.emit(x.id, ["batch_norm", name, f"epsilon={epsilon!r}", "noaffine"]), x.row, x.have)
    else:
        shape = (-1, *[1] * (len(r.shape(x)) - 2))
        factor = 1 / np.sqrt(variance + epsilon)
        y = r.pair("subtract", x, r.constant(mean.reshape(shape)))
        y = r.pair("multiply", y, r.constant(factor.reshape(shape)))
    return [by_channel(r, y, weight, bias)]


def resized(r, x, operation, size, scales, mode, rest):
    x = r.real(x)
    space = channels(r, x)[0].row[1:]
    given = [s for scale in scales for s in (scale if isinstance(scale, (list, tuple)) else [scale])]
    if size is None:
        size = [int(n * s) for n, s in zip(space, given)]
    factors = [new // old for old, new in zip(space, size)]
    exact = all(f * old == new for f, old, new in zip(factors, space, size)) and all(
        s is None or s == int(s) for s in given
    )
    if exact and len(space) < 3 and mode:
        x, back = channels(r, x)
        words = ["upsample", "x".join(map(str, factors)), *mode]
        return back(r.emit(x.id, words), (x.row[0], *map(int, size)))
    return (r.move if "nearest" in operation.__name__ else lambda f, x: linear(r, x, f))(operation, x)


def upsampling(name, mode, corners):
    def apply(r, x, size=None, *rest):
        operation = getattr(torch.ops.aten, name)
        function = lambda t: operation(t, size, *rest)
        function.__name__ = name
        words = mode + ["align_corners"] if corners and rest and rest[0] is True else mode
        return resized(r, x, function, size, rest[1:] if corners else rest, words, rest)

    return apply


for torch_name in ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"):
    RULES[torch_name] = upsampling(torch_name, ["nearest"], False)
for torch_name in ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"):
    RULES[torch_name] = upsampling(torch_name, ["bilinear"], True)
for torch_name in ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d"):
    RULES[torch_name] = upsampling(torch_name, None, False)
for torch_name in ("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):
    RULES[torch_name] = upsampling(torch_name, None, True)


@rule("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_avg_pool1d")
def _(r, x, size):
    x, back = channels(r, x)
    words = ["adaptive_avg_pool", "x".join(map(str, size))]
    return back(r.emit(x.id, words), (x.row[0], *size))


@rule("adaptive_max_pool2d", "adaptive_max_pool1d")
def _(r, x, size):
    x, back = channels(r, x)
    words = ["adaptive_max_pool", "x".join(map(str, size))]
    return [back(r.emit(x.id, words), (x.row[0], *size))]


@rule("_adaptive_avg_pool3d", "adaptive_avg_pool3d", "avg_pool3d")
def _(r, x, *rest):
    operation = torch.ops.aten.avg_pool3d if len(rest) > 1 else torch.ops.aten._adaptive_avg_pool3d
    return linear(r, x, lambda t: operation(t, *rest))


@rule("unbind")
def _(r, x, axis=0):
    return [RULES["select"](r, x, axis, i) for i in range(r.shape(x)[axis])]


def pooled(x, kernel, stride, pad, ceil):
    stride = stride or kernel
    two = lambda numbers: list(numbers) * 2 if len(numbers) == 1 else list(numbers)
    kernel, stride, pad = two(kernel), two(stride), two(pad)
    size = []
    for n, p, k, s in zip(x.row[1:], pad, kernel, stride):
        count = (n + 2 * p - k + (s - 1 if ceil else 0)) // s + 1
        size.append(
            count - (ceil and (count - 1) * s >= n + p)
        )  # the last window starts inside, or in the padding before
    pair = lambda numbers: "x".join(map(str, numbers))
    words = [pair(kernel), "stride=" + pair(stride), "pad=" + pair(pad)] + ["ceil_mode"] * bool(ceil)
    return (x.row[0], *size), words


@rule("max_pool2d_with_indices", "max_pool2d")
def _(r, x, kernel, stride=(), pad=(0, 0), dilation=(1, 1), ceil=False):
    x, back = channels(r, x)
    if tuple(dilation) not in ((1, 1), (1,)):
        raise Unsupported("max pooling with dilation")
    row, words = pooled(x, kernel, stride, pad, ceil)
    return [back(r.emit(x.id, ["max_pool", *words]), row)]


@rule("max_pool3d_with_indices")
def _(r, x, kernel, stride=(), pad=(0, 0, 0), dilation=(1, 1, 1), ceil=False):
    x, kernel = r.real(x), list(kernel) * 3 if len(kernel) == 1 else list(kernel)
    stride = list(stride or kernel)
    if any(pad) or ceil or len(stride) != 3:
        raise Unsupported("max pooling of three axes with padding or ceil_mode")
    patches, size = unfolded(
        r, x, kernel, stride, [0] * 3, list(dilation) * 3 if len(dilation) == 1 else list(dilation)
    )
    y = along(r, patches, [3], False, "max")
    return [r.view(y, (r.size, x.row[0], *size))]


@rule("avg_pool2d")
def _(r, x, kernel, stride=(), pad=(0, 0), ceil=False, include=True, divisor=None):
    if divisor:
        return linear(r, r.real(x), lambda t: torch.ops.aten.avg_pool2d(t, kernel, stride, pad, ceil, include, divisor))
    x, back = channels(r, x)
    row, words = pooled(x, kernel, stride, pad, ceil)
    words += [] if include else ["count_include_pad=0"]
    return back(r.emit(x.id, ["avg_pool", *words]), row)


def attention(r, q, k, v, dropout=0.0, causal=False, mask=None, scale=None, **more):
    if dropout:
        raise Unsupported("dropout")
    q, k, v = r.real(q), r.real(k), r.real(v)
    rank = len(r.shape(k))
    if more.get("enable_gqa"):
        heads = r.shape(q)[-3]
        k, v = (RULES["repeat_interleave"](r, t, heads // r.shape(t)[-3], rank - 3) for t in (k, v))
    if r.shape(q)[:-2] != r.shape(k)[:-2]:
        raise Unsupported("attention of groups of queries")
    back = r.permute(k, [*range(rank - 2), rank - 1, rank - 2])
    scores = r.scale(r.matmul(q, back), scale if scale is not None else 1 / math.sqrt(q.row[-1]))
    if causal:
        hidden = np.triu(np.full((q.row[-2], k.row[-2]), HIDDEN), 1)
        scores = r.pair("add", scores, r.constant(hidden))
    if mask is not None:
        boolean = mask.id in r.masks if isinstance(mask, Value) else mask.dtype == torch.bool
        scores = RULES["where"](r, mask, scores, HIDDEN) if boolean else r.pair("add", scores, r.constant_or(mask))
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


# These take tensors of constants as they are: all of them, or those at these places.
PLAIN = {
    "embedding": (1,),
    "_embedding_bag": (1, 2),
    "_embedding_bag_forward_only": (1, 2),
    "embedding_bag": (1, 2),
    "masked_fill": (1, 2),
    "where": (0, 1, 2),
    "native_batch_norm": (3, 4),
    "_native_batch_norm_legit_no_training": (3, 4),
    "index": (0,),
    "gather": (2,),
    "take_along_dim": (1,),
    "take": (1,),
    "index_select": (2,),
    "repeat_interleave": (1,),
    "clamp": (1, 2),
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
    "index_put": (0, 2),
    "copy": (0, 1),
}

# What no line says, and why.
DRAWS = (
    "rand randn rand_like randn_like randint normal bernoulli multinomial randperm uniform exponential poisson".split()
)
REASONS = {
    **dict.fromkeys(
        "topk sort argsort argmax argmin kthvalue median nanmedian mode unique _unique2 msort nonzero".split(),
        "a choice that jumps while the weights change has no path integral",
    ),
    **dict.fromkeys("round floor ceil trunc frac fmod remainder heaviside".split(), "what jumps has no path integral"),
    **dict.fromkeys(DRAWS, "a random network at each step"),
    "hardshrink": "it jumps, and there is no path integral over a jump",
    "_local_scalar_dense": "a number of the data that Python code sees: control flow that depends on the data",
}


def circular(x, sides, mode="constant", value=None):
    """torch.nn.functional.pad in circles, which PyTorch computes in place."""
    for i in range(0, len(sides), 2):
        axis = x.dim() - 1 - i // 2
        size = x.shape[axis]
        x = x.index_select(axis, torch.arange(-sides[i], size + sides[i + 1]) % size)
    return x


def one_hot(x, num_classes=-1):
    """torch.nn.functional.one_hot, which PyTorch computes in place."""
    if num_classes < 0:
        raise Unsupported("one_hot without num_classes")
    return (x.unsqueeze(-1) == torch.arange(num_classes)).long()


SEEN = set(
    "__bool__ __float__ __int__ __index__ __complex__ __array__ item tolist numpy equal allclose is_nonzero".split()
)


class Gradients(torch.overrides.TorchFunctionMode):
    """What a trace does not say: that a value is cut off from gradients, by detach, .data or no_grad, which is marked; that
    Python code sees a number which depends on the data or on parameters."""

    def __init__(self):
        super().__init__()
        self.known = {}  # what depends on them, by id; the tensors are kept, so that no other one takes an id

    def start(self, tensors):
        self.known.update((id(tensor), tensor) for tensor in tensors)

    def __torch_function__(self, function, types, args=(), keywords=None):
        name = getattr(function, "__name__", "")
        if name == "register_hook":
            raise Unsupported("a hook on gradients: what it makes of them is not the derivative of the model")
        tensors = [
            x for x in torch.utils._pytree.tree_flatten((args, keywords or {}))[0] if isinstance(x, torch.Tensor)
        ]
        depends = any(id(x) in self.known for x in tensors)
        if depends and name in SEEN:
            raise Unsupported(f"{name}(): a number of the data or of the parameters that Python code sees")
        if name == "pad" and any(isinstance(x, str) and x == "circular" for x in (*args, *(keywords or {}).values())):
            function = circular
        if name == "one_hot":
            function = one_hot
        result = function(*args, **(keywords or {}))
        if depends:
            made = torch.utils._pytree.tree_flatten(result)[0]
            self.start(x for x in made if isinstance(x, torch.Tensor))
        if isinstance(result, torch.Tensor) and result.is_floating_point() and not result.requires_grad:
            if any(x.requires_grad for x in tensors):
                result = torch.nan_to_num(result)
                self.start([result])
        return result


@contextlib.contextmanager
def watched(model):
    """Refuses what changes gradients outside of the graph, and chance that Python or NumPy draws."""

    def own(function, *args, **more):
        if function.__module__.startswith("torch."):
            return usual.__func__(function, *args, **more)
        raise Unsupported(f"{function.__name__}, an autograd.Function: its gradient is what its author wrote")

    for name, module in model.named_modules():
        if getattr(module, "_backward_hooks", None) or getattr(module, "_backward_pre_hooks", None):
            raise Unsupported(f"a hook on the gradients of {name or 'the model'}")
    inherited, usual = "apply" not in vars(torch.autograd.Function), torch.autograd.Function.apply
    states = random.getstate(), np.random.get_state()
    torch.autograd.Function.apply = classmethod(own)
    try:
        yield
    finally:
        if inherited:
            del torch.autograd.Function.apply
        else:
            torch.autograd.Function.apply = usual
    after = random.getstate(), np.random.get_state()
    if states[0] != after[0] or any(np.any(a != b) for a, b in zip(states[1], after[1])):
        raise Unsupported("random numbers that Python or NumPy draws")


def trace(model, inputs, frozen=False):
    """frozen: parameters that are not trained have no gradient, so that what is cut off from them alone is no cut."""
    parameters, buffers, alias, flat, mode, held = {}, {}, {}, [], [None], {}
    # Of constants Python code may see numbers, and Gradients refuses the others.
    options = {"_error_on_data_dependent_ops": False}
    options = {name: value for name, value in options.items() if name in inspect.signature(make_fx).parameters}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = prefix + ("." if prefix else "") + name
                known = next((key for key, other in parameters.items() if other is parameter), full)
                parameters.setdefault(known, parameter)
                alias[full] = known
        if isinstance(module, torch.nn.RNNBase):  # has its weights in a list, too
            names = [prefix + ("." if prefix else "") + name for name in module._flat_weights_names]
            flat.append((module, module._flat_weights, names))

    def before(module, inputs):
        held.update({name: functools.reduce(getattr, name.split("."), module) for name in buffers})

    def after(module, inputs, outputs):
        others = [name for name in held if functools.reduce(getattr, name.split("."), module) is not held[name]]
        if others:
            raise Unsupported(f"a forward that replaces buffers: {', '.join(others)}")

    def run(parameters, x):
        mode[0].start([*parameters.values(), x])
        values = {name: parameters[known] for name, known in alias.items()}
        for module, _, names in flat:
            module.__dict__["_flat_weights"] = [values[name] for name in names]
        outputs = functional_call(model, {**values, **buffers}, (x,))
        if not isinstance(outputs, (torch.Tensor, list, tuple)):
            raise Unsupported(f"outputs in a {type(outputs).__name__}, which is no tensor")
        return outputs

    def traced(function):
        mode[0] = Gradients()
        hooks = model.register_forward_pre_hook(before), model.register_forward_hook(after)
        buffers.update({name: buffer.clone() for name, buffer in model.named_buffers()})
        leaves = {k: v.detach().requires_grad_(v.requires_grad or not frozen) for k, v in parameters.items()}
        try:
            # With gradients: without them PyTorch fuses whole layers into one operation of its own.
            with watched(model), mode[0], torch.enable_grad():
                return make_fx(function, **options)(leaves, inputs)
        except Unsupported:
            raise
        except Exception as error:  # whatever the model or the tracer raises
            text = str(error).strip().splitlines() or [type(error).__name__]
            if "tracing tensor" in text[0] or "data-dependent" in text[0] or "symbolic" in text[0].lower():
                raise Unsupported(
                    "a number of the data or of the parameters that Python code sees, such as in `if`, float() or item()"
                ) from error
            raise Unsupported(f"the model cannot be traced: {type(error).__name__}: {text[0][:300]}") from error
        finally:
            for hook in hooks:
                hook.remove()
            for module, weights, _ in flat:
                module.__dict__["_flat_weights"] = weights

    graph = traced(run)
    changed = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    if changed:
        raise Unsupported(f"a forward that changes buffers (batch norm in training mode does): {', '.join(changed)}")
    try:
        in_place(graph.graph)
    except Unsupported:  # what is written into a part of a tensor becomes a new tensor
        graph = traced(functionalize(run))
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
                if (
                    root[other] is root[node]
                    and at[other] < at[node]
                    and any(at[user] > at[node] for user in other.users)
                ):
                    raise Unsupported(f"{node.target}: what is changed in place is used under another name, too")


def living(graph):
    """The nodes that the first output depends on, and what is done in place."""
    last = next(node for node in graph.nodes if node.op == "output")
    first = last.args[0]
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    live = {last, first} if isinstance(first, torch.fx.Node) else {last}
    for node in reversed(graph.nodes):
        if (node in live and node is not last) or node.meta.get("write"):
            live |= {node, *node.all_input_nodes}
    return live


def read_once(model, inputs, frozen=False):
    graph, parameters = trace(model, inputs, frozen)
    plain = set()
    while True:
        try:
            return read_graph(graph, parameters, inputs, plain)
        except Shared as error:  # such tensors become values of their own
            if plain.issuperset(error.parameters):
                raise
            plain.update(error.parameters)


def read_graph(graph, parameters, inputs, plain):
    names = list(parameters)
    row = tuple(inputs.shape[1:]) or (1,)
    reader, live = Reader(len(inputs), not inputs.dtype.is_floating_point, row, parameters), living(graph.graph)
    reader.plain = plain
    known, places = {}, 0
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if places < len(names):
                value = parameters[names[places]]
                known[node] = Value(None, tuple(value.shape), parameter=names[places])
            else:
                known[node] = Value(0, inputs.shape[1:], 0)
                if inputs.dtype == torch.bool:
                    reader.masks.add(0)
            places += 1
        elif node.op == "get_attr":
            known[node] = getattr(graph, node.target)
            if isinstance(known[node], torch.Tensor) and known[node].requires_grad:
                raise Unsupported("a tensor that is trained and is no parameter of the model")
        elif node.op == "output":
            last = node.args[0]
            last = last[0] if isinstance(last, (list, tuple)) and last else last
            if not isinstance(last, torch.fx.Node):
                raise Unsupported("outputs that are neither a tensor nor several with the outputs in front")
            last = known[last]
        elif node not in live:
            known[node] = None
        elif getattr(node.target, "__name__", "") == "getitem":
            parts, at = known[node.args[0]], node.args[1]
            known[node] = parts[at] if at < len(parts) else None  # a by-product that nobody reads, or the end refuses
        else:
            known[node] = call(reader, node, known)
    if not isinstance(last, Value):
        raise Unsupported("outputs that do not depend on the inputs")
    if last.batch != 0 or sum(last.group):
        raise Unsupported("outputs whose first axis is not the batch")
    for name, padding in reader.padded.items():
        if len(set(padding)) > 1 or reader.uses[name] != len(padding):
            raise Unsupported(f"{name}, a table with padding_idx that is used in another way, too")
    last, outputs = reader.shaped(last, (prod(last.row),)), last.row
    line = reader.line(row, last.id)
    if len(line) > 65472 or line.count(";") >= 10000:
        raise Unsupported(
            f"a network of {line.count(';') + 1} layers and {len(line)} characters; 10000 and 65472 are possible"
        )
    words = {word for layer in line.split("; ") for word in layer.split()}
    constants = {name: table for name, table in reader.constants.items() if name in words}
    return Network(line, [parameters[n] for n in reader.order], constants), outputs


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
    drawn = getattr(torch, "Tag", None) and getattr(torch.Tag, "nondeterministic_seeded", None)
    if name in REASONS or (drawn and drawn in getattr(node.target, "tags", ()) and name not in RULES):
        if (
            name == "bernoulli"
            and args[1:] == (0.0,)
            or not any(isinstance(value, (Value, Complex)) for value in flat)
            and name not in DRAWS
        ):
            pass
        else:
            raise Unsupported(f"the operation {node.target}: {REASONS.get(name, 'a random network at each step')}")
    if not any(isinstance(value, (Value, Complex)) for value in flat):
        made = node.target(*args, **keywords)  # constants stay constants
        return torch.zeros_like(made) if name.startswith(("empty", "new_empty")) else made
    if name in ("mul", "multiply") and any(isinstance(value, Complex) for value in flat):
        x, y = args if isinstance(args[0], Complex) else reversed(args)
        return complex_product(reader, x, y)
    if any(isinstance(value, Complex) for value in flat) and not name.startswith("view_as_real"):
        raise Unsupported(f"the operation {node.target} on complex numbers")
    if name not in RULES:
        raise Unsupported(f"the operation {node.target}")
    extra = ("layout", "device", "pin_memory", "memory_format") + (() if name == "_to_copy" else ("dtype",))
    keywords = {k: v for k, v in keywords.items() if k not in extra}
    plain = PLAIN.get(name, ())
    args = [reader.constant_or(x) if isinstance(x, torch.Tensor) and i not in plain else x for i, x in enumerate(args)]
    try:
        return RULES[name](reader, *args, **keywords)
    except Shared:
        raise
    except Unsupported as error:
        raise Unsupported(f"{node.target}: {error}") from None


def other_rows(inputs):
    """Rows that are not the first one: the others, or the first one turned around."""
    if len(inputs) > 1 and any(not torch.equal(inputs[0], row) for row in inputs[1:]):
        return inputs.flip(0)
    row = inputs[:1].flatten(1).flip(1).reshape(inputs[:1].shape)
    return torch.cat([row, inputs[:1]])


def check_rows(model, inputs, most):
    """Whether the outputs of a row depend on the rest of its batch, or on the batch's size."""
    rows = torch.cat([inputs[:8], other_rows(inputs)[:8]])
    buffers, outputs = dict(model.named_buffers()), []
    with torch.enable_grad(), watched(model):  # without gradients PyTorch may take other ways
        for count in sorted({2, 3, len(inputs), most}):
            some = rows[torch.arange(count) % len(rows)]
            try:
                out = functional_call(model, {name: buffer.clone() for name, buffer in buffers.items()}, (some,))
            except Exception as error:
                raise Unsupported(f"a model that fails for a batch of {count}: {error}") from error
            outputs.append((out[0] if isinstance(out, (list, tuple)) else out).detach().double())
    whole, size = outputs[-1], float(outputs[-1].abs().max()) or 1.0
    double = torch.float64 in (inputs.dtype, next(model.parameters()).dtype)
    for out in outputs:
        if out.shape[1:] != whole.shape[1:] or not float((out - whole[: len(out)]).abs().max()) <= size * (
            1e-9 if double else 1e-4
        ):
            raise Unsupported(
                "a network whose outputs for a row depend on the rest of its batch, on its size, or on chance"
            )


def read_twice(model, inputs, primes):
    networks = []
    for size, from_rows in zip(primes, (inputs, other_rows(inputs))):
        rows = from_rows[torch.arange(size) % len(from_rows)].clone()
        try:
            networks.append(read_once(model, rows)[0])
        except Unsupported:
            if all(p.requires_grad for p in model.parameters()):
                raise
            networks.append(read_once(model, rows, frozen=True)[0])
    one, two = (network.constants for network in networks)
    if networks[0].line != networks[1].line or any(not np.array_equal(one[name], two[name]) for name in one):
        raise Unsupported(
            "a network that depends on the size of the batch, on the data outside of the graph, or on chance"
        )
    return networks[0]


def read_network(model, inputs):
    """See the top of this file. inputs: a batch, as the model takes it, of one row or more; other values of such rows have to
    give the same network."""
    sizes = set(inputs.shape[1:]) | {size for p in model.parameters() for size in p.shape}
    fits = lambda *primes: [p for p in primes if not any(size % p == 0 for size in sizes)][:2]
    large = fits(101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157)
    if len(large) < 2:
        raise Unsupported("sizes among which the batch's cannot be told apart")
    network, small = None, fits(7, 11, 13, 17, 19, 23, 29, 31)
    if sum(p.numel() for p in model.parameters()) > 1000000 and len(small) == 2:  # a forward of 100 rows costs much
        with contextlib.suppress(Unsupported):
            network = read_twice(model, inputs, small)
    network = network or read_twice(model, inputs, large)
    check_rows(model, inputs, large[0])
    return network
