"""The Python module against NumPy, the C compiler, and what users do to it.

    PATHKERNEL_LIBRARY=build/test/libpathkernel.so python3 tests/python/test_module.py

Needs NumPy. The test of the declarations needs a C compiler (CC, default cc); that of the program, PATHKERNEL_DECOMPOSE; those of
pictures, tables and tqdm, these packages. Without, they are skipped, and say so. Where no module is installed, it is examples/python's.
"""

import copy
import ctypes
import doctest
import io
import itertools
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
import weakref

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
try:
    import pathkernel
except ImportError:
    sys.path.insert(0, os.path.join(ROOT, "examples", "python"))
    import pathkernel

PROGRAM = os.environ.get("PATHKERNEL_DECOMPOSE")
N, M, STEPS = 24, 5, 12
SMOOTH = "input 3; dense 6; tanh; dense 2"
random = np.random.default_rng(5)
X, TESTS = random.normal(size=(N, 3)), random.normal(size=(M, 3))
LABELS = (X[:, 0] * X[:, 1] > 0).astype(np.int64)
FOLDER = tempfile.TemporaryDirectory()
names = itertools.count()


def rounding(tolerance):
    """A tolerance for double; of a library in float, as many of its roundings, but at most 2e-3."""
    return tolerance if pathkernel._library().real == np.float64 else min(5e8 * tolerance, 2e-3)


def new_folder():
    return os.path.join(FOLDER.name, f"run{next(names)}")


def trained(folder=None, network=SMOOTH, **options):
    options = {
        "loss": "softmax_cross_entropy",
        "optimizer": "adamw weight_decay=0.1",
        "rate": 0.05,
        "steps": STEPS,
        "batch": 8,
        **options,
    }
    return pathkernel.train(
        folder or new_folder(), options.pop("x", X), options.pop("y", LABELS), network=network, **options
    )


RUN = trained()
RESULT = RUN.decompose(TESTS, keep=["example", "step", "layer"])


# ---- an independent forward, its gradient, and the definition


def split(w):
    shapes = [(6, 3), (6,), (2, 6), (2,)]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(w, ends), shapes)]


def forward(w, x):
    W1, b1, W2, b2 = split(w)
    hidden = np.tanh(x @ W1.T + b1)
    return hidden, hidden @ W2.T + b2


def gradient(w, x, seed):
    """d <seed, f> / dw of one row."""
    hidden, _ = forward(w, x)
    back = split(w)[2].T @ seed * (1 - hidden**2)
    return np.concatenate([np.outer(back, x).ravel(), back, np.outer(seed, hidden).ravel(), seed])


def recorded_by_hand(folder, rate=0.3, steps=6):
    """Gradient descent on the mean of (f - y)^2 / 2 in NumPy, as a run directory; its weights and gradients."""
    w, y = np.random.default_rng(2).normal(size=38) / 2, np.sin(X[:, :2])
    weights, gradients = [w], []
    for _ in range(steps):
        g = np.array([gradient(w, x, f - t) for x, f, t in zip(X, forward(w, X)[1], y)])
        w = w - rate * g.mean(0)
        weights.append(w)
        gradients.append(g)
    os.makedirs(folder)
    arrays = {
        "weights": np.array(weights),
        "learning_rates": np.full(steps, rate),
        "batch_offsets": np.arange(steps + 1, dtype=np.int64) * N,
        "batch_items": np.tile(np.arange(N, dtype=np.int64), steps),
        "train_inputs": X,
        "train_targets": y,
    }
    for name, array in arrays.items():
        np.save(os.path.join(folder, name + ".npy"), array)
    with open(os.path.join(folder, "run.txt"), "w", encoding="ascii") as file:
        file.write(f"pathkernel-run 1\nnetwork {SMOOTH}\nloss squared\noptimizer sgd\n")
    return weights, gradients, rate


class Declarations(unittest.TestCase):
    """What the module takes the library to be, against the header, by the C compiler."""

    def test_header(self):
        header = os.path.join(ROOT, "pathkernel.h")
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if not compiler or not os.path.exists(header):
            self.skipTest("there is no C compiler, or no pathkernel.h")
        library = pathkernel._library()
        lines = ["#define PATHKERNEL_FLOAT" if library.real == np.float32 else "", '#include "pathkernel.h"']
        lines.append(pathkernel._FUNCTIONS)  # another declaration of a function is an error
        for name, type_ in pathkernel._CALLBACKS.items():
            struct, field = name.split(".", 1)
            lines.append(
                f"_Static_assert(_Generic((({struct} *)0)->{field}, {type_}: 1, default: 0), {name!r});"
            )
        for struct, fields in pathkernel._STRUCTS.items():
            made = library.structs[struct]
            lines.append(f"_Static_assert(sizeof({struct}) == {ctypes.sizeof(made)}, {struct!r});")
            for field in fields:
                place = getattr(made, field.replace(".", "_"))
                lines.append(
                    f"_Static_assert(offsetof({struct}, {field}) == {place.offset}"
                    f" && sizeof((({struct} *)0)->{field}) == {place.size}, '{struct}.{field}');"
                )
        for name, type_ in ctypes_of(pathkernel._STRUCTS):
            lines.append(f"_Static_assert(_Generic({name}, {type_}: 1, default: 0), '{name}');")
        for status in pathkernel.Status:
            lines.append(f"_Static_assert(PK_{status.name} == {int(status)}, '{status.name}');")
        lines.append(f"_Static_assert(PK__STATUS_LAST == {len(pathkernel.Status)}, 'statuses');")
        source = "\n".join(lines).replace("'", '"') + "\nint main(void) { return 0; }\n"
        command = [compiler, "-std=gnu11", "-Werror", "-I", ROOT, "-x", "c", "-fsyntax-only", "-"]
        compiled = subprocess.run(command, input=source, text=True, capture_output=True)
        self.assertEqual(compiled.returncode, 0, compiled.stderr[:2000])
        # The test finds what it is for: another type, another place, another list of parameters.
        for old, new in (
            ("size_t steps);", "int steps);"),
            ('"pk_matrix.ld"', '"pk_matrix.ld"), "");_Static_assert((0'),
            ("double fraction)", "float fraction)"),
        ):
            self.assertIn(old, source)
            wrong = subprocess.run(command, input=source.replace(old, new, 1), text=True, capture_output=True)
            self.assertNotEqual(wrong.returncode, 0, f"{old} -> {new}")

    def test_other_libraries_are_refused(self):
        """No library, one of another kind, and one whose fields have another type: sentences, no crash."""
        library = pathkernel._library()
        self.assertRaisesRegex(ImportError, "no libpathkernel", self.loaded_by, "")
        self.assertRaisesRegex(ImportError, "cannot be loaded", self.loaded_by, "/nonexistent.so")
        math_library = ctypes.util.find_library("m")
        self.assertRaisesRegex(ImportError, "no library of pathkernel", pathkernel._Library, math_library)
        for fields in ({"threads": ctypes.c_double}, {"threads": ctypes.c_uint}, {"nothing": ctypes.c_int}):
            self.assertRaisesRegex(ImportError, "pk_context", library._struct, "pk_context", dict(fields))

    def loaded_by(self, path):
        code = "import ctypes.util, pathkernel; ctypes.util.find_library = lambda name: None; pathkernel.version()"
        with tempfile.TemporaryDirectory() as alone:  # without a library beside it
            shutil.copy(pathkernel.__file__, alone)
            environment = {**os.environ, "PATHKERNEL_LIBRARY": path, "PYTHONPATH": alone}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, text=True, capture_output=True
            )
        self.assertNotEqual(done.returncode, 0)
        raise ImportError(done.stderr.splitlines()[-1])


def ctypes_of(structs):
    """Fields that are plain numbers, with the C types that they are taken for."""
    known = {
        ctypes.c_double: "double",
        ctypes.c_int: "int",
        ctypes.c_size_t: "size_t",
        ctypes.c_uint64: "uint64_t",
    }
    for struct, fields in structs.items():
        for field, type_ in fields.items():
            if isinstance(type_, type) and type_ in known:
                yield f"(({struct} *)0)->{field}", known[type_]


class Numbers(unittest.TestCase):
    def test_network(self):
        network = pathkernel.Network(SMOOTH)
        w = network.initialize(7)
        np.testing.assert_allclose(network(w, X), forward(w, X)[1], rtol=0, atol=rounding(1e-14))
        self.assertEqual((network.parameters, network.outputs, network.input_shape), (38, 2, (3,)))

    def test_definition(self):
        """Every contribution is what its definition gives, by 20 Gauss-Legendre nodes a step in NumPy."""
        folder = new_folder()
        weights, gradients, rate = recorded_by_hand(folder)
        result = pathkernel.Run(folder).decompose(TESTS, keep=["example,step", "example"])
        nodes, factors = np.polynomial.legendre.leggauss(20)
        wanted = np.zeros((M, 2, N, len(gradients)))
        for m, c, s in itertools.product(range(M), range(2), range(len(gradients))):
            step = weights[s + 1] - weights[s]
            phi = sum(
                k / 2 * gradient(weights[s] + (t + 1) / 2 * step, TESTS[m], np.eye(2)[c])
                for t, k in zip(nodes, factors)
            )
            wanted[m, c, :, s] = -rate / N * gradients[s] @ phi
        np.testing.assert_allclose(result.by_example_step, wanted, rtol=0, atol=rounding(1e-12))
        np.testing.assert_allclose(result.by_example, wanted.sum(3), rtol=0, atol=rounding(1e-12))
        np.testing.assert_allclose(
            result.initial, forward(weights[0], TESTS)[1], rtol=0, atol=rounding(1e-14)
        )
        np.testing.assert_allclose(result.final, forward(weights[-1], TESTS)[1], rtol=0, atol=rounding(1e-14))
        self.assertLess(np.abs(result.residual()).max(), rounding(1e-14))
        self.assertLess(np.abs(result.closure).max(), rounding(1e-13))

    def test_parts(self):
        self.assertEqual(RESULT.by_example.shape, (M, 2, N))
        self.assertEqual(RESULT.by_step.shape, (M, 2, STEPS))
        self.assertEqual(RESULT.by_layer.shape, (M, 2, 2))
        for name in ("by_example", "by_step", "by_layer"):
            np.testing.assert_allclose(RESULT[name].sum(2), RESULT.data, rtol=0, atol=rounding(1e-13))
        self.assertEqual(list(RESULT.parts), ["initial", "data", "decay", "unattributed", "closure"])
        self.assertLess(np.abs(RESULT.residual()).max(), rounding(1e-14))
        self.assertGreater(np.abs(RESULT.decay).max(), 1e-6)
        self.assertTrue(RESULT.closed)
        self.assertEqual(RESULT.status, pathkernel.Status.OK)
        self.assertLess(RESULT.certificate["worst_closure"], rounding(1e-12))
        self.assertIn("by_example (5, 2, 24)", repr(RESULT))

    def test_outputs(self):
        one = RUN.decompose(TESTS, 1)
        several = RUN.decompose(TESTS, [1, 0, 1], keep=["example", "layer"])
        label = RUN.decompose(TESTS, "label")
        given = RUN.decompose(TESTS, labels=[0, 1, 1, 0, 1])
        np.testing.assert_allclose(one.by_example, RESULT.by_example[:, 1:], rtol=0, atol=rounding(1e-11))
        np.testing.assert_allclose(
            several.by_example, RESULT.by_example[:, [1, 0, 1]], rtol=0, atol=rounding(1e-11)
        )
        np.testing.assert_allclose(
            several.by_layer, RESULT.by_layer[:, [1, 0, 1]], rtol=0, atol=rounding(1e-11)
        )
        rows = np.arange(M)
        np.testing.assert_allclose(label.final[:, 0], RESULT.final.max(1), rtol=0, atol=rounding(1e-11))
        np.testing.assert_array_equal(label.outputs, RESULT.final.argmax(1))
        np.testing.assert_allclose(
            given.by_example[:, 0], RESULT.by_example[rows, [0, 1, 1, 0, 1]], rtol=0, atol=rounding(1e-11)
        )
        np.testing.assert_array_equal(RUN.decompose(TESTS, -1).by_example, one.by_example)

    def test_functions(self):
        """log p of the second class, and a linear function, by the chain rule of the definition: both close, one is known."""

        def both(row, f):
            p = np.exp(f - f.max()) / np.exp(f - f.max()).sum()
            return [np.log(p[1]), f[0] + row * f[1]], [np.eye(2)[1] - p, [1, row]]

        result = RUN.decompose(TESTS, both, keep=["example", "layer"])
        p = np.exp(RESULT.final) / np.exp(RESULT.final).sum(1, keepdims=True)
        np.testing.assert_allclose(result.final[:, 0], np.log(p[:, 1]), rtol=0, atol=rounding(1e-13))
        rows = np.arange(M)[:, None]
        wanted = RESULT.by_example[:, 0] + rows * RESULT.by_example[:, 1]
        np.testing.assert_allclose(result.by_example[:, 1], wanted, rtol=0, atol=rounding(1e-10))
        self.assertLess(np.abs(result.residual()).max(), rounding(1e-13))
        self.assertTrue(result.closed)
        self.assertGreater(np.abs(result.by_example[:, 0]).max(), 1e-3)
        one = RUN.decompose(TESTS, lambda row, f: (f[0], [1, 0]), threads=2)
        np.testing.assert_allclose(
            one.by_example[:, 0], RESULT.by_example[:, 0], rtol=0, atol=rounding(1e-10)
        )
        calls = []

        def failing(row, f):
            calls.append(row)
            if len(calls) > 3:
                raise KeyError("mine")
            return f[0], [1, 0]

        self.assertRaisesRegex(KeyError, "mine", RUN.decompose, TESTS, failing, threads=2)
        for wrong in (lambda row, f: (f[0], [1]), lambda row, f: (f, [1, 0])):
            self.assertRaisesRegex(pathkernel.InputError, "slopes", RUN.decompose, TESTS, wrong)

    def test_keeps(self):
        groups = np.arange(N) % 3
        result = RUN.decompose(
            TESTS, keep=["group,step", "train,layer", "total", "group"], groups=groups.astype(np.uint8)
        )
        self.assertEqual(
            [name for name in result if name.startswith("by")],
            ["by_group_step", "by_example_layer", "by_group"],
        )
        wanted = np.stack([RESULT.by_example[:, :, groups == g].sum(2) for g in range(3)], 2)
        np.testing.assert_allclose(result.by_group, wanted, rtol=0, atol=rounding(1e-13))
        np.testing.assert_allclose(result.by_group_step.sum(3), wanted, rtol=0, atol=rounding(1e-13))
        np.testing.assert_allclose(
            result.by_example_layer.sum(2), RESULT.by_layer, rtol=0, atol=rounding(1e-13)
        )
        total = RUN.decompose(TESTS, keep="total")
        self.assertFalse([name for name in total if name.startswith("by")])
        self.assertLess(np.abs(total.residual()).max(), rounding(1e-14))
        with self.assertRaisesRegex(AttributeError, "by_step was not kept: keep='step'"):
            total.by_step
        with self.assertRaisesRegex(AttributeError, "no nonsense"):
            total.nonsense

    def test_bounds_and_step_closure(self):
        result = RUN.decompose(TESTS, bounds=True, step_closure=True)
        self.assertEqual(result.bounds.shape, (M, 2, N))
        self.assertTrue(
            (result.bounds > 0).all() and result.bounds.max() < (1e-9 if rounding(1e-9) == 1e-9 else 1)
        )
        self.assertEqual(result.closure_by_step.shape, (M, 2, STEPS))
        self.assertLess(np.abs(result.closure_by_step).max(), rounding(1e-12))

    def test_rules_and_until(self):
        with self.assertWarnsRegex(pathkernel.ClosureWarning, "closure is .* the tolerance"):
            rough = RUN.decompose(TESTS, quadrature="left")
        self.assertEqual(rough.status, pathkernel.Status.NOT_CLOSED)
        self.assertFalse(rough.closed)
        self.assertGreater(np.abs(rough.closure).max(), 1e-6)
        gauss = RUN.decompose(TESTS, quadrature="gauss:9", tolerance=1e-6)
        np.testing.assert_allclose(gauss.by_example, RESULT.by_example, rtol=0, atol=rounding(1e-9))
        early = pathkernel.Run(RUN.path, until=4)
        self.assertEqual((early.steps, early.decompose(TESTS, keep="step").by_step.shape[2]), (4, 4))
        np.testing.assert_allclose(early.decompose(TESTS).final, RUN(TESTS, 4), rtol=0, atol=rounding(1e-14))
        np.testing.assert_array_equal(early(TESTS), RUN(TESTS, 4))

    def test_average(self):
        """Averages have paths of their own: they begin and end where NumPy says, and close."""
        w = np.load(os.path.join(RUN.path, "weights.npy"))
        averages = {"swa:4:2": w[4::2].mean(0), "ema:0": w[-1]}
        ema = w[0]
        for one in w[1:]:
            ema = 0.8 * ema + 0.2 * one
        averages["ema:0.8"] = ema
        for text, wanted in averages.items():
            result = RUN.decompose(TESTS, average=text)
            network = pathkernel.Network(SMOOTH)
            np.testing.assert_allclose(RUN.weights(average=text), wanted, rtol=0, atol=rounding(1e-14))
            np.testing.assert_allclose(result.final, network(wanted, TESTS), rtol=0, atol=rounding(1e-13))
            self.assertLess(np.abs(result.residual()).max(), rounding(1e-14))
            self.assertTrue(result.closed)
            label = RUN.decompose(TESTS, "label", average=text)
            np.testing.assert_allclose(label.final[:, 0], result.final.max(1), rtol=0, atol=rounding(1e-12))
        self.assertRaisesRegex(pathkernel.InputError, "median", RUN.decompose, TESTS, average="median")
        self.assertRaisesRegex(pathkernel.InputError, "is of all steps", RUN.weights, 3, average="ema:0.8")

    def test_inherited(self):
        """The second half of a run, which begins with the first half's momentum: what is inherited is one of the parts."""
        folder, half, rate, beta = new_folder(), new_folder(), 0.2, 0.9
        weights, _, _ = recorded_by_hand(folder)
        y = np.load(os.path.join(folder, "train_targets.npy"))
        w, m, kept = weights[0], np.zeros(38), [weights[0]]
        for step in range(6):
            if step == 3:
                state, kept = m, [w]
            m = beta * m + np.mean([gradient(w, x, f - t) for x, f, t in zip(X, forward(w, X)[1], y)], 0)
            w = w - rate * m
            kept.append(w)
        shutil.copytree(folder, half)
        arrays = {"weights": np.array(kept), "learning_rates": np.full(3, rate), "initial_state": state[None]}
        arrays["batch_offsets"] = np.arange(4, dtype=np.int64) * N
        arrays["batch_items"] = np.tile(np.arange(N, dtype=np.int64), 3)
        for name, array in arrays.items():
            np.save(os.path.join(half, name + ".npy"), array)
        with open(os.path.join(half, "run.txt"), "w", encoding="ascii") as file:
            file.write(
                f"pathkernel-run 1\nnetwork {SMOOTH}\nloss squared\noptimizer sgd momentum={beta}\ninitial_step 3\n"
            )
        result = pathkernel.Run(half).decompose(TESTS)
        self.assertIn("inherited", result.parts)
        self.assertGreater(np.abs(result.inherited).max(), 1e-3)
        self.assertLess(np.abs(result.residual()).max(), rounding(1e-13))
        self.assertTrue(result.closed and result.status == pathkernel.Status.OK)
        self.assertNotIn("inherited", RESULT)

    def test_unattributed(self):
        folder = new_folder()
        shutil.copytree(RUN.path, folder)
        rates = os.path.join(folder, "learning_rates.npy")
        np.save(rates, np.load(rates) * 1.01)
        with self.assertWarnsRegex(pathkernel.UnattributedWarning, "unattributed"):
            wrong = pathkernel.Run(folder).decompose(TESTS)
        self.assertEqual(wrong.status, pathkernel.Status.UNATTRIBUTED)
        self.assertLess(np.abs(wrong.residual()).max(), rounding(1e-14))

    def test_helpers(self):
        row = RESULT.by_example[2, 1]
        found = RESULT.strongest(2, 1, 5)
        np.testing.assert_array_equal(found["example"], np.argsort(-np.abs(row), kind="stable")[:5])
        np.testing.assert_array_equal(found["contribution"], row[found["example"]])
        for sign in (1, -1):
            found = RESULT.strongest(2, 1, 1000, sign)
            self.assertEqual(len(found), (np.sign(row) == sign).sum())
            self.assertTrue((np.sign(found["contribution"]) == sign).all())
        self.assertEqual(RESULT.strongest(0, by="step").dtype.names, ("step", "contribution"))
        difference = RESULT.combine([1, -1])
        np.testing.assert_allclose(
            difference.by_step[:, 0],
            RESULT.by_step[:, 0] - RESULT.by_step[:, 1],
            rtol=0,
            atol=rounding(1e-15),
        )
        self.assertLess(np.abs(difference.residual()).max(), rounding(1e-14))

    def test_save_and_load(self):
        folder = new_folder()
        RESULT.save(folder)
        pickled = pickle.loads(pickle.dumps(RESULT))
        np.testing.assert_array_equal(pickled.by_layer, RESULT.by_layer)
        self.assertEqual((repr(pickled), repr(pickled.run)), (repr(RESULT), repr(RUN)))
        again = pathkernel.load(folder, RUN)
        self.assertEqual(set(again), set(RESULT))
        np.testing.assert_array_equal(again.by_step, RESULT.by_step)
        self.assertLess(np.abs(again.residual()).max(), rounding(1e-14))

    def test_program(self):
        if not PROGRAM:
            self.skipTest("PATHKERNEL_DECOMPOSE names no program")
        folder = new_folder()
        os.makedirs(folder)
        inputs, out = os.path.join(folder, "x.npy"), os.path.join(folder, "out")
        np.save(inputs, TESTS)
        keeps = ["--keep", "train", "--keep", "step", "--keep", "layer,step", "--bounds", "--step-closure"]
        command = [PROGRAM, RUN.path, "--inputs", inputs, "--out", out, *keeps]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        theirs = pathkernel.load(out)
        ours = RUN.decompose(TESTS, keep=["example", "step", "step,layer"], bounds=True, step_closure=True)
        self.assertEqual(set(theirs) | {"data"}, set(ours))
        for name in theirs:
            np.testing.assert_allclose(
                theirs[name], ours[name], rtol=1e-3, atol=rounding(1e-12), err_msg=name
            )
        np.testing.assert_allclose(theirs.parts["data"], ours.data, rtol=0, atol=rounding(1e-13))

    def test_weights(self):
        stored = np.load(os.path.join(RUN.path, "weights.npy"))
        sparse = trained(keep_every=5)
        for step in (0, 3, STEPS, -1, -STEPS - 1):
            np.testing.assert_array_equal(RUN.weights(step), stored[step])
            np.testing.assert_array_equal(sparse.weights(step), stored[step])
        self.assertEqual(sparse.keep_every, 5)
        self.assertRaisesRegex(pathkernel.InputError, "steps 0 to 12", RUN.weights, 13)
        self.assertEqual(RUN.manifest["network"], SMOOTH)
        np.testing.assert_array_equal(RUN.train_inputs, X)
        np.testing.assert_array_equal(RUN.train_targets, LABELS)

    def test_compare(self):
        rules = RUN.compare(TESTS)
        self.assertEqual(len(rules), 10)
        exact = rules[rules["rule"] == "exact"][0]
        self.assertLess(exact["residual_max"], rounding(1e-12))
        self.assertGreater(exact["spearman"], 1 - rounding(1e-12))
        self.assertGreater(rules[rules["rule"] == "left"][0]["residual_max"], 1e-5)


class Kernels(unittest.TestCase):
    def jacobian(self, rows):
        w = RUN.weights()
        return np.array([[gradient(w, x, seed) for seed in np.eye(2)] for x in rows])

    def test_ntk(self):
        left, right = self.jacobian(TESTS), self.jacobian(X)
        gram = RUN.kernel("ntk", TESTS, X, outputs="full")
        self.assertEqual(gram.axes, ("left", "left output", "right", "right output"))
        np.testing.assert_allclose(
            gram, np.einsum("ikp,jlp->ikjl", left, right), rtol=0, atol=rounding(1e-12)
        )
        trace = RUN.kernel("ntk", TESTS, "train")
        self.assertEqual((trace.shape, trace.axes), ((M, N), ("left", "right")))
        np.testing.assert_allclose(trace, np.einsum("ikp,jkp->ij", left, right), rtol=0, atol=rounding(1e-12))
        self.assertEqual(RUN.kernel("ntk").shape, (N, N))
        np.testing.assert_array_equal(RUN.kernel("ntk", TESTS), RUN.kernel("ntk", TESTS).T)
        np.testing.assert_allclose(
            RUN.kernel("ntk", TESTS, outputs=1),
            np.einsum("ip,jp->ij", left[:, 1], left[:, 1]),
            rtol=0,
            atol=rounding(1e-12),
        )
        labels = np.array([0, 1, 1, 0, 1])
        chosen = left[np.arange(M), labels]
        np.testing.assert_allclose(
            RUN.kernel("ntk", TESTS, outputs="label", left_labels=labels),
            chosen @ chosen.T,
            rtol=0,
            atol=rounding(1e-12),
        )
        cosine = RUN.kernel("ntk", TESTS, map="cosine")
        np.testing.assert_allclose(np.diag(cosine), 1, rtol=0, atol=rounding(1e-12))

    def test_steps(self):
        gram = RUN.kernel("ntk", TESTS, steps=range(0, 13, 4), by_layer=True)
        self.assertEqual((gram.shape, gram.axes), ((4, 2, M, M), ("step", "layer", "left", "right")))
        np.testing.assert_allclose(gram[-1].sum(0), RUN.kernel("ntk", TESTS), rtol=0, atol=rounding(1e-12))
        for steps in ("final", [12], 12, -1, slice(12, None)):
            np.testing.assert_array_equal(RUN.kernel("ntk", TESTS, steps=steps), RUN.kernel("ntk", TESTS))
        self.assertEqual(RUN.kernel("ntk", TESTS, steps="all").shape, (STEPS + 1, M, M))
        np.testing.assert_array_equal(
            RUN.kernel("tracin", TESTS, "train", steps="all", left_labels=[0, 1, 0, 1, 0]),
            RUN.kernel("tracin", TESTS, "train", left_labels=[0, 1, 0, 1, 0]),
        )

    def test_names(self):
        for name in ("conjugate", "path", "path_average", "epk"):
            gram = RUN.kernel(name, TESTS, "train")
            self.assertEqual((type(gram), gram.shape, gram.dtype), (pathkernel.Gram, (M, N), np.float64))
            self.assertGreater(np.abs(gram).max(), 0)
        self.assertIsNone(gram[0].axes)
        square = RUN.kernel("ntk", TESTS)
        self.assertEqual((square.axes, square.T.axes), (("left", "right"), None))
        for wrong, arguments in (
            ("is no kernel; these are: ntk", dict(kernel="nonsense")),
            ("outputs='nonsense'", dict(kernel="ntk", outputs="nonsense")),
            ("the kernel conjugate has none", dict(kernel="conjugate", outputs="trace")),
            ("output 2; the run has outputs 0 to 1", dict(kernel="ntk", outputs=2)),
            ("step 13; the run has steps 0 to 12", dict(kernel="ntk", steps=13)),
            ("step 12; the run has steps 0 to 11", dict(kernel="epk", steps=[12])),
            ("map='nonsense'", dict(kernel="ntk", map="nonsense")),
            ("batch='nonsense'", dict(kernel="epk", batch="nonsense")),
            ("training rows have labels", dict(kernel="ntk", left_labels=[1])),
            ("for 5 rows", dict(kernel="ntk", left=TESTS, left_labels=[1])),
        ):
            self.assertRaisesRegex(pathkernel.InputError, wrong, RUN.kernel, **arguments)


class Arrays(unittest.TestCase):
    """Arrays of any kind give the same bits, or are refused by a sentence that says what is wrong."""

    def test_layouts(self):
        x = (TESTS * 8).round() / 8  # numbers of float16
        wanted = RUN.decompose(x).by_example
        wide = np.full((2 * M, 7), np.nan)
        wide[::2, 1:4] = x
        shifted = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.float64).reshape(M, 3)
        self.assertFalse(shifted.flags.aligned)
        locked = x.copy()
        locked.flags.writeable = False
        cases = {
            "strided": wide[::2, 1:4],
            "Fortran order": np.asfortranarray(x),
            "reversed": x[::-1].copy()[::-1],
            "negative strides": x[:, ::-1].copy()[:, ::-1],
            "misaligned": shifted,
            "read-only": locked,
            "big-endian": x.astype(">f8"),
            "float32": x.astype(np.float32),
            "float16": x.astype(np.float16),
            "a list": x.tolist(),
            "another axis": x[:, None, :],
            "a memory map": self.mapped(x),
            "unmasked": np.ma.array(x),
        }
        for name, array in cases.items():
            before = copy.deepcopy(array)
            with self.subTest(name):
                np.testing.assert_array_equal(RUN.decompose(array).by_example, wanted)
                np.testing.assert_array_equal(array, before)

    def mapped(self, x):
        path = new_folder() + ".npy"
        np.save(path, x)
        return np.load(path, mmap_mode="r")

    def test_integers(self):
        x = np.array([[0, 1, 1], [1, 0, 1]])
        wanted = RUN.decompose(x.astype(float)).by_example
        types = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 >i4".split()
        for type_ in types:
            np.testing.assert_array_equal(RUN.decompose(x.astype(type_)).by_example, wanted, err_msg=type_)

    def test_refused(self):
        nan, infinite = TESTS.copy(), TESTS.copy()
        nan[3, 1], infinite[2, 2] = np.nan, np.inf
        S = pathkernel.Status
        for status, words, x in (
            (S.SHAPE, "inputs are 0 x 3", TESTS[:0]),
            (S.SHAPE, r"x has shape \(5, 2\).*the network takes 3", TESTS[:, :2]),
            (S.SHAPE, "x has shape", TESTS[0]),
            (S.ARGUMENT, "x: no array of rows", np.float64(3)),
            (S.SHAPE, "at most 8", np.zeros((1,) * 9)),
            (S.NOT_FINITE, "row 3, column 1 is not finite", nan),
            (S.NOT_FINITE, "row 2, column 2 is not finite", infinite),
            (S.ARGUMENT, "complex128", TESTS.astype(complex)),
            (S.ARGUMENT, "object", np.array([[None, 1, 2]])),
            (S.ARGUMENT, "<U", [["a", "b", "c"]]),
            (S.ARGUMENT, "datetime64", np.zeros((1, 3), "M8[s]")),
            (S.ARGUMENT, r"\[\('a'", np.zeros((1, 3), [("a", "f8")])),
            (S.ARGUMENT, "masked", np.ma.array(TESTS, mask=TESTS > 0)),
            (S.ARGUMENT, "uint64", np.full((1, 3), 2**64 - 1, np.uint64)),
            (S.ARGUMENT, "whole numbers that are too large", np.full((1, 3), 2**53 + 1)),
            (S.ARGUMENT, "float64 does not have", np.zeros((1, 3), np.longdouble)),
        ):
            for call in (RUN.decompose, RUN, RUN.compare):
                if call is RUN and status in (S.NOT_FINITE, S.SHAPE) and np.size(x) in (15, 0):
                    continue  # outputs of NaN are NaN, and of nothing nothing
                with self.subTest(words=words, call=call):
                    with self.assertRaisesRegex(pathkernel.InputError, words) as refused:
                        call(x)
                    self.assertEqual(refused.exception.status, status)
                    self.assertIsInstance(refused.exception, ValueError)

    def test_tokens(self):
        tokens = np.array([[0, 1, 2], [2, 2, 1], [1, 0, 0]])
        run = trained(network="input 3; embedding 3 4; flatten; dense 2", x=tokens, y=[0, 1, 0], batch=0)
        self.assertEqual(run.decompose(tokens).by_example.shape, (3, 2, 3))
        np.testing.assert_array_equal(
            run.decompose(tokens.astype(float)).by_example, run.decompose(tokens).by_example
        )
        for wrong in (tokens + 1, tokens - 1, tokens + 0.5):
            self.assertRaisesRegex(pathkernel.InputError, "row|token", run.decompose, wrong)
            self.assertRaisesRegex(pathkernel.InputError, "row|token", run, wrong)

    def test_torch(self):
        try:
            import torch
        except ImportError:
            self.skipTest("there is no torch")
        x = torch.tensor(TESTS, requires_grad=True)
        np.testing.assert_array_equal(RUN.decompose(x).by_example, RUN.decompose(TESTS).by_example)
        # Two OpenMP runtimes in turn, on two threads each.
        torch.set_num_threads(2)
        for _ in range(3):
            product = (torch.ones(400, 400) @ torch.ones(400, 400))[0, 0].item()
            self.assertEqual(product, 400)
            result = RUN.decompose(TESTS, threads=2)
            np.testing.assert_array_equal(result.by_example, RUN.decompose(TESTS).by_example)


class Memory(unittest.TestCase):
    def test_results_outlive_everything(self):
        """Arrays are the library's memory: they keep it, and it is given back when the last of them is gone."""
        run = pathkernel.Run(RUN.path)
        result = run.decompose(TESTS, keep=["example", "step"])
        by_example, initial = result.by_example, result.initial[1:]
        held = weakref.ref(
            by_example.base.base._held if hasattr(by_example.base.base, "_held") else self.held(by_example)
        )
        run.close()
        del run, result
        np.testing.assert_array_equal(by_example, RUN.decompose(TESTS).by_example)
        by_example += 1  # its own
        del by_example
        self.assertIsNotNone(held())
        np.testing.assert_allclose(initial, RESULT.initial[1:], rtol=0, atol=rounding(1e-15))
        del initial
        self.assertIsNone(held())

    def held(self, array):
        while array is not None and not hasattr(array, "_held"):
            array = array.obj if isinstance(array, memoryview) else array.base
        return array._held

    def test_nothing_grows(self):
        x = random.normal(size=(500, 3))
        for i in range(150):
            if i == 50:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            RUN.decompose(x, keep=["example,step"])  # 2.3 MB
            pathkernel.Run(RUN.path)
            with self.assertRaises(pathkernel.InputError):
                RUN.decompose(TESTS * np.nan)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.assertLess(after - before, 40_000)  # KB; 100 results are 230 MB

    def test_closed(self):
        with pathkernel.Run(RUN.path) as run:
            run.decompose(TESTS)
        run = pathkernel.Run(RUN.path)  # closed in the midst of a call, which ends well
        result = run.decompose(TESTS, progress=lambda phase, fraction: run.close())
        np.testing.assert_array_equal(result.by_example, RUN.decompose(TESTS).by_example)
        for call in (run.decompose, run.compare, run, run.kernel, lambda x: run.weights()):
            self.assertRaisesRegex(
                pathkernel.InputError, "is closed", *((call, "ntk") if call == run.kernel else (call, TESTS))
            )
        run.close()

    def test_limit(self):
        S = pathkernel.Status
        with self.assertRaisesRegex(MemoryError, "the least that would do is") as refused:
            RUN.decompose(TESTS, memory_limit=10_000)
        self.assertEqual(refused.exception.status, S.MEMORY_LIMIT)
        self.assertIsInstance(refused.exception, pathkernel.Error)
        wanted = RUN.decompose(TESTS).by_example
        np.testing.assert_array_equal(RUN.decompose(TESTS, memory_limit="20M").by_example, wanted)
        limited = pathkernel.Run(RUN.path, memory_limit="20M")
        np.testing.assert_array_equal(limited.decompose(TESTS).by_example, wanted)
        self.assertRaises(MemoryError, RUN.kernel, "ntk", memory_limit="1K")
        for limit in ("much", "2X", -1, 1.5):
            self.assertRaisesRegex(
                pathkernel.InputError, "memory_limit", RUN.decompose, TESTS, memory_limit=limit
            )


class Errors(unittest.TestCase):
    def test_files(self):
        with self.assertRaisesRegex(OSError, "run.txt: No such file") as refused:
            pathkernel.Run("/nonexistent")
        self.assertIsInstance(refused.exception, pathkernel.Error)
        self.assertEqual(refused.exception.status, pathkernel.Status.IO)
        folder = new_folder()
        shutil.copytree(RUN.path, folder)
        with open(os.path.join(folder, "run.txt"), "a", encoding="ascii") as file:
            file.write("nonsense 3\n")
        self.assertRaisesRegex(ValueError, "run.txt line 5.*nonsense", pathkernel.Run, folder)
        self.assertRaisesRegex(pathkernel.InputError, "is no path", pathkernel.Run, "a\0b")

    def test_arguments(self):
        for words, arguments in (
            ("outputs='some'", dict(outputs="some")),
            ("output 2; the run has outputs 0 to 1", dict(outputs=2)),
            ("output.*-3", dict(outputs=-3)),
            ("outputs: a number", dict(outputs=[])),
            ("outputs: an array of float64", dict(outputs=1.5)),
            ("keep='nothing'", dict(keep="nothing")),
            ("keep='total,step'", dict(keep="total,step")),
            ("keep: 1 to 8", dict(keep=[])),
            ("needs groups", dict(keep="group")),
            ("each of 24 training", dict(keep="group", groups=[1, 2])),
            ("is in group -1", dict(keep="group", groups=-np.ones(N, int))),
            ("each of 5 inputs", dict(labels=[1])),
            ("label 7 of input", dict(labels=[7] * M)),
            ("does not go with labels", dict(outputs=1, labels=[1] * M)),
            ("is not a rule", dict(quadrature="simpson")),
            ("tolerance of -1", dict(tolerance=-1)),
            ("tolerance of nan", dict(tolerance=math.nan)),
            ("rows_at_once", dict(rows_at_once=-1)),
            ("threads", dict(threads=-1)),
            ("threads", dict(threads=1.5)),
        ):
            with self.subTest(words), self.assertRaisesRegex(pathkernel.InputError, words):
                RUN.decompose(TESTS, **arguments)

    def test_pickled(self):
        error = pickle.loads(pickle.dumps(pathkernel.InputError(pathkernel.Status.SHAPE, "a sentence")))
        self.assertEqual((type(error), error.status, str(error)), (pathkernel.InputError, 2, "a sentence"))
        error = pickle.loads(pickle.dumps(pathkernel.FileError(pathkernel.Status.IO, "a sentence")))
        self.assertEqual((type(error), error.status, str(error)), (pathkernel.FileError, 6, "a sentence"))


class Training(unittest.TestCase):
    def test_rates(self):
        rates = [0.05 * 0.9**step for step in range(STEPS)]
        by_array = trained(rate=rates)
        by_function = trained(rate=lambda step: 0.05 * 0.9**step)
        np.testing.assert_array_equal(by_array.weights(), by_function.weights())
        np.testing.assert_allclose(
            np.load(os.path.join(by_array.path, "learning_rates.npy")), rates, rtol=1e-15
        )
        self.assertRaisesRegex(pathkernel.InputError, "for 12 steps", trained, rate=rates[:-1])
        self.assertRaisesRegex(pathkernel.InputError, "rate", trained, rate=-1)
        self.assertRaisesRegex(pathkernel.InputError, "steps or of epochs", trained, epochs=3)
        self.assertEqual(trained(steps=None, epochs=2).steps, 6)

    def test_groups(self):
        frozen = trained(groups=["0 frozen"])
        weights = np.load(os.path.join(frozen.path, "weights.npy"))
        self.assertTrue(
            (weights[:, :18] == weights[0, :18]).all() and (weights[-1, 18:] != weights[0, 18:]).all()
        )
        rates = np.linspace(0.1, 0.01, STEPS)
        own = trained(groups=[("1,3 weight_decay=0", rates), "2 beta1=0.5"])
        stored = np.load(os.path.join(own.path, "group_rates.npy"))
        np.testing.assert_allclose(stored, np.stack([rates, np.full(STEPS, 0.05)], 1), rtol=1e-15)
        self.assertTrue(own.decompose(TESTS).closed)
        self.assertRaisesRegex(pathkernel.InputError, "tensor", trained, groups=["9 frozen"])

    def test_weights_and_seed(self):
        w = pathkernel.Network(SMOOTH).initialize(3)
        run = trained(weights=w)
        np.testing.assert_array_equal(run.weights(0), w)
        np.testing.assert_array_equal(trained(seed=3).weights(0), w)
        self.assertFalse((trained(seed=4).weights(0) == w).any())
        self.assertRaisesRegex(pathkernel.InputError, "38 parameters", trained, weights=w[1:])
        in_order = trained(shuffle=False)
        items = np.load(os.path.join(in_order.path, "batch_items.npy"))
        np.testing.assert_array_equal(items[:N], np.arange(N))

    def test_constants(self):
        matrix = np.eye(3)[::-1]
        run = trained(
            network="input 3x1; propagate a; flatten; dense 2", constants={"a": matrix.astype(">f4")}
        )
        network = pathkernel.Network("input 3x1; propagate a; flatten; dense 2", {"a": matrix})
        np.testing.assert_allclose(network(run.weights(), TESTS), run(TESTS), rtol=0, atol=rounding(1e-15))
        self.assertRaisesRegex(ValueError, "names the array 'a'", trained, network="input 3x1; propagate a")

    def test_existing_and_resumed(self):
        folder = new_folder()
        whole = trained(steps=9)
        trained(folder, steps=4)
        self.assertRaisesRegex(pathkernel.Error, "run", trained, folder, steps=9)
        resumed = trained(folder, steps=9, resume=True)
        np.testing.assert_array_equal(resumed.weights(), whole.weights())
        again = trained(folder, steps=2, replace=True)
        self.assertEqual(again.steps, 2)
        self.assertRaisesRegex(
            pathkernel.Error, "NaN|finite|diverge", trained, rate=1e200, optimizer="sgd", loss="mean_squared"
        )

    def test_data(self):
        for words, arguments in (
            ("one target for each", dict(y=LABELS[:-1])),
            ("one target for each", dict(x=X[:0], y=LABELS[:0])),
            ("not finite|NaN", dict(x=X * np.nan)),
            ("label", dict(y=LABELS + 5)),
            ("rows of 2", dict(x=X[:, :2])),
            ("loss", dict(loss="nonsense")),
            ("optimizer|nonsense", dict(optimizer="nonsense")),
            ("batch", dict(batch=-1)),
        ):
            folder = new_folder()
            with self.subTest(words), self.assertRaisesRegex(pathkernel.InputError, words):
                trained(folder, **arguments)
            self.assertFalse(os.path.exists(folder))


class Interrupts(unittest.TestCase):
    """Ctrl-C in the middle of a call: KeyboardInterrupt, and all is as before."""

    def interrupting(self, at=0.0):
        told = []

        def progress(phase, fraction):
            told.append((phase, fraction))
            if fraction >= at and None not in told:
                told.append(None)
                os.kill(os.getpid(), signal.SIGINT)

        return progress, told

    def test_decompose(self):
        handler = signal.getsignal(signal.SIGINT)
        for call in (
            lambda progress: RUN.decompose(np.repeat(TESTS, 20, 0), progress=progress),
            lambda progress: RUN.kernel("epk", TESTS, "train", progress=progress),
            lambda progress: RUN.compare(TESTS, progress=progress),
        ):
            progress, told = self.interrupting()
            with self.assertRaises(KeyboardInterrupt):
                call(progress)
            self.assertIn(None, told)
            self.assertLess(max(one[1] for one in told if one), 1)  # it did not go on to the end
            self.assertIs(signal.getsignal(signal.SIGINT), handler)
            call(None)

    def test_late(self):
        """An interrupt at the very end, when nothing can be cancelled any more, is not lost."""
        progress, told = self.interrupting(at=1)
        try:
            RUN.compare(TESTS, progress=progress)
            self.assertNotIn(None, told)
        except KeyboardInterrupt:
            self.assertIn(None, told)

    def test_train(self):
        folder = new_folder()
        progress, _ = self.interrupting(at=0.5)
        with self.assertRaises(KeyboardInterrupt):
            trained(folder, progress=progress)
        stopped = pathkernel.Run(folder)
        self.assertTrue(0 < stopped.steps < STEPS)
        np.testing.assert_array_equal(stopped.weights(), RUN.weights(stopped.steps))
        resumed = trained(folder, resume=True)
        np.testing.assert_array_equal(resumed.weights(), RUN.weights())

    def test_own_handler(self):
        seen = []
        before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        try:
            progress, _ = self.interrupting()
            with self.assertRaises(pathkernel.Error) as cancelled:
                RUN.compare(TESTS, progress=progress)
            self.assertEqual(cancelled.exception.status, pathkernel.Status.CANCELLED)
            self.assertEqual(seen, [signal.SIGINT])
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            progress, _ = self.interrupting()
            self.assertEqual(len(RUN.compare(TESTS, progress=progress)), 10)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_callbacks(self):
        class Own(Exception):
            pass

        def raising(phase, fraction):
            raise Own(phase)

        self.assertRaises(Own, RUN.decompose, TESTS, progress=raising)
        with self.assertRaisesRegex(pathkernel.Error, "cancel") as cancelled:
            RUN.decompose(TESTS, progress=lambda phase, fraction: True)
        self.assertEqual(cancelled.exception.status, pathkernel.Status.CANCELLED)
        told = []
        RUN.decompose(TESTS, progress=lambda phase, fraction: told.append((phase, fraction)))
        self.assertTrue(told and all(phase and 0 <= fraction <= 1 for phase, fraction in told))

    def test_tqdm(self):
        try:
            import tqdm
        except ImportError:
            self.skipTest("there is no tqdm")
        told, error = tqdm.__name__, sys.stderr
        sys.stderr = io.StringIO()
        try:
            RUN.compare(TESTS, progress=True)
            told = sys.stderr.getvalue()
        finally:
            sys.stderr = error
        self.assertIn("%|", told)

    def test_in_another_thread(self):
        """A call in a thread knows nothing of signals; the main thread's interrupt is Python's own."""
        found, done = [], threading.Event()
        progress, _ = self.interrupting()

        def work():
            found.append(RUN.compare(TESTS, progress=progress))
            done.set()

        with self.assertRaises(KeyboardInterrupt):
            threading.Thread(target=work).start()
            done.wait(60)
            done.wait(0.1)
        self.assertTrue(done.wait(60))
        self.assertEqual(len(found[0]), 10)


class Concurrency(unittest.TestCase):
    def together(self, runs):
        """Decomposes in threads that wait for each other in the midst of their calls: one after the other will not do."""
        meeting = threading.Barrier(len(runs), timeout=60)
        results, waited = [None] * len(runs), [False] * len(runs)

        def work(i):
            def progress(phase, fraction):
                if not waited[i]:
                    waited[i] = True
                    meeting.wait()

            results[i] = runs[i].decompose(TESTS, progress=progress)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(runs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            np.testing.assert_array_equal(result.by_example, RUN.decompose(TESTS).by_example)

    def test_two_runs(self):
        self.together([pathkernel.Run(RUN.path), pathkernel.Run(RUN.path)])

    def test_one_run(self):
        self.together([RUN, RUN, RUN])

    def test_threads(self):
        for threads in (1, 2, 5):
            np.testing.assert_array_equal(
                RUN.decompose(TESTS, threads=threads).by_example, RUN.decompose(TESTS).by_example
            )

    def test_processes(self):
        """Forked and spawned processes, which get a run by its path."""
        RUN.decompose(np.repeat(TESTS, 40, 0), threads=2)  # OpenMP has threads that a fork does not have
        for method in ("fork", "spawn"):
            with multiprocessing.get_context(method).Pool(2) as pool:
                tasks = [pool.apply_async(decompose_elsewhere, (RUN, TESTS[i : i + 2])) for i in (0, 2)]
                found = np.concatenate([task.get(timeout=120) for task in tasks])
            np.testing.assert_allclose(
                found, RUN.decompose(TESTS[:4]).by_example, rtol=0, atol=rounding(1e-14)
            )
        with multiprocessing.get_context("fork").Pool(1) as pool:
            task = pool.apply_async(decompose_elsewhere, (RUN, TESTS, 2))
            self.assertRaisesRegex(
                pathkernel.InputError, "forked process has one thread", task.get, timeout=60
            )


def decompose_elsewhere(run, x, threads=0):
    return run.decompose(x, threads=threads).by_example.copy()


class Pictures(unittest.TestCase):
    def setUp(self):
        try:
            import matplotlib
        except ImportError:
            self.skipTest("there is no matplotlib")
        matplotlib.use("Agg")

    def test_waterfall(self):
        ax = RESULT.waterfall(1, count=4)
        self.assertEqual(len(ax.patches), 1 + 4 + 1 + 3 + 1)
        ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
        self.assertAlmostEqual(ends[-2], RESULT.final[1].max(), 12)  # the last part ends where the output is
        self.assertIn("input 1", ax.get_title())

    def test_over_steps(self):
        line = RESULT.over_steps(0, 1).lines[0]
        self.assertAlmostEqual(line.get_ydata()[-1], RESULT.data[0, 1], 12)
        detailed = RUN.decompose(TESTS, keep="group,step", groups=LABELS).over_steps(0, names=["no", "yes"])
        self.assertEqual(len(detailed.lines), 4)
        self.assertEqual([text.get_text() for text in detailed.get_legend().get_texts()][-1], "all")

    def test_contact_sheet(self):
        figure = RESULT.contact_sheet(shape=(1, 3), rows=[0, 3], count=2)
        self.assertEqual(len(figure.axes), 2 * 5)
        self.assertRaisesRegex(pathkernel.InputError, "no square", RESULT.contact_sheet)
        figure.savefig(io.BytesIO())

    def test_frames(self):
        try:
            import pandas
        except ImportError:
            self.skipTest("there is no pandas")
        frame = RESULT.frame(count=3)
        self.assertEqual(len(frame), 3 * M)
        self.assertEqual(
            list(frame.columns), ["input", "output", "place", "example", "contribution", "target"]
        )
        self.assertEqual(frame.target[0], LABELS[frame.example[0]])
        summary = RESULT.summary()
        self.assertEqual(summary.shape, (2 * M, 6))
        np.testing.assert_allclose(
            summary.drop(columns="final").sum(axis=1), summary.final, rtol=0, atol=rounding(1e-13)
        )
        self.assertEqual(len(pandas.DataFrame(RUN.compare(TESTS))), 10)


def load_tests(loader, tests, pattern):
    tests.addTests(doctest.DocTestSuite(pathkernel))
    return tests


if __name__ == "__main__":
    print("pathkernel", pathkernel.version(), "at", pathkernel._library().path, "| NumPy", np.__version__)
    unittest.main()
