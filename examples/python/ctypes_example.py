"""The C library from Python, through ctypes: no compiler, no binding.

    cmake -B build -DPATHKERNEL_SHARED=ON && cmake --build build
    python3 ctypes_example.py build/libpathkernel.so

Without an argument: $PATHKERNEL_LIBRARY, or the one that is installed. Parses a network, checks its outputs
against NumPy, records a few steps of training, decomposes them, checks the identity.

The structs of the library are plain and zero means default, so that most can be a block of zeros that is large
enough; what is read or set from here is mirrored below. Before version 1.0 a minor version may change them: the
version is checked.
"""

import ctypes
import ctypes.util
import multiprocessing
import os
import sys
import tempfile

import numpy as np
from numpy.ctypeslib import ndpointer

VERSION = "0.1."
size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
numbers = ndpointer(np.float64, flags="C_CONTIGUOUS")


class Context(ctypes.Structure):
    _fields_ = [
        ("allocator", pointer * 3),
        ("threads", ctypes.c_int),
        ("memory_limit", size_t),
        ("progress", pointer),
        ("progress_user", pointer),
        ("operations", pointer),
        ("memory_used", size_t),
        ("memory_peak", size_t),
        ("regions", size_t),
        ("backed_off", size_t),
        ("load", ctypes.c_uint64 * 6),
        ("message", ctypes.c_char * 512),
    ]

    def __init__(self, threads=0):
        """threads: 0 for all processors; one in a process that was forked, see below."""
        if forked and threads > 1:
            raise Error("a forked process has one thread of OpenMP: use threads=1, or multiprocessing's spawn")
        super().__init__(threads=1 if forked else threads)


# A child of fork has none of its parent's threads, but the OpenMP library in it (gcc's libgomp) waits for them for ever once
# the parent has used them. multiprocessing forks on Linux, by default up to Python 3.13. Two ways out: one thread in the child,
# as here, or multiprocessing.get_context("spawn"), whose children start from the beginning.
forked = False


def after_fork():
    global forked
    forked = True


os.register_at_fork(after_in_child=after_fork)


class Matrix(ctypes.Structure):
    _fields_ = [("data", pointer), ("rows", size_t), ("cols", size_t), ("ld", size_t)]


class Opaque(ctypes.Structure):
    """A pk_graph, pk_run or pk_decompose_options that is only handed around: more than it needs, all zero."""

    _fields_ = [("bytes", ctypes.c_uint64 * 1024)]


class Decomposition(ctypes.Structure):
    """The beginning of pk_decomposition."""

    _fields_ = (
        [(name, size_t) for name in ("first_row", "rows", "outputs", "examples", "groups", "steps", "layers")]
        + [(name, pointer) for name in ("initial", "final", "data", "decay", "unattributed", "closure")]
        + [
            ("kept_axes", ctypes.c_uint),
            ("kept_rank", ctypes.c_int),
            ("kept_shape", size_t * 5),
            ("kept_row_items", size_t),
            ("kept_data", pointer),
            ("rest", Opaque),
        ]
    )


def load(path):
    library = ctypes.CDLL(path)
    context, graph, anything = ctypes.POINTER(Context), ctypes.POINTER(Opaque), ctypes.POINTER(Opaque)
    for name, result, arguments in (
        ("pk_version", ctypes.c_char_p, []),
        ("pk_status_text", ctypes.c_char_p, [ctypes.c_int]),
        ("pk_network_parse", ctypes.c_int, [context, ctypes.c_char_p, graph]),
        ("pk_network_initialize", ctypes.c_int, [context, graph, ctypes.c_uint64, numbers]),
        ("pk_graph_evaluate", ctypes.c_int, [context, graph, numbers, Matrix, Matrix]),
        ("pk_graph_release", None, [context, graph]),
        ("pk_run_open", ctypes.c_int, [context, ctypes.c_char_p, anything]),
        ("pk_run_release", None, [context, anything]),
        ("pk_decompose", ctypes.c_int, [context, anything, Matrix, anything, ctypes.POINTER(Decomposition)]),
        ("pk_decomposition_release", None, [context, ctypes.POINTER(Decomposition)]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    version = library.pk_version().decode()
    if not version.startswith(VERSION):
        raise ImportError(f"{path} is version {version}; this file knows the structs of {VERSION}x")
    return library


class Error(RuntimeError):
    pass


def check(library, context, status):
    """Statuses become exceptions that carry the library's sentence."""
    if status:
        raise Error(f"{library.pk_status_text(status).decode()}: {context.message.decode()}")


def matrix(array):
    """A view: array must be float64 in C order, and outlive it."""
    assert array.dtype == np.float64 and array.flags.c_contiguous and array.ndim == 2
    return Matrix(array.ctypes.data, *array.shape, array.shape[1])


def evaluate(library, network, weights, inputs, outputs):
    """outputs (rows, C) := the network of a line on inputs."""
    context, graph = Context(), Opaque()
    check(library, context, library.pk_network_parse(context, network.encode(), graph))
    try:
        check(
            library,
            context,
            library.pk_graph_evaluate(context, graph, weights, matrix(inputs), matrix(outputs)),
        )
    finally:
        library.pk_graph_release(context, graph)


def decompose(library, run, inputs, threads=0):
    """The decomposition of a run directory on inputs, as NumPy arrays of their own, by example."""
    context, recorded, options, found = Context(threads), Opaque(), Opaque(), Decomposition()
    check(library, context, library.pk_run_open(context, os.fsencode(run), recorded))
    try:
        check(library, context, library.pk_decompose(context, recorded, matrix(inputs), options, found))

        def take(name, *shape):
            return np.ctypeslib.as_array(
                ctypes.cast(getattr(found, name), ctypes.POINTER(ctypes.c_double)), shape
            ).copy()

        shape = found.rows, found.outputs
        result = {n: take(n, *shape) for n in ("initial", "final", "decay", "unattributed", "closure")}
        result["by_example"] = take("kept_data", *shape, found.examples)
        return result
    finally:
        library.pk_decomposition_release(context, found)
        library.pk_run_release(context, recorded)


def decompose_elsewhere(path, run, inputs):
    """The same as a task of multiprocessing: a library cannot be handed over, its path can."""
    return decompose(load(path), run, inputs)


def main(path):
    library = load(path)
    print("pathkernel", library.pk_version().decode(), "at", path)
    random = np.random.default_rng(1)
    network = "input 3; dense 8; tanh; dense 2"
    shapes = [(8, 3), (8,), (2, 8), (2,)]

    def layers(w):
        return [
            p.reshape(shape)
            for p, shape in zip(np.split(w, np.cumsum([np.prod(s) for s in shapes])[:-1]), shapes)
        ]

    def forward(w, x):
        W1, b1, W2, b2 = layers(w)
        hidden = np.tanh(x @ W1.T + b1)
        return hidden, hidden @ W2.T + b2

    context, graph = Context(), Opaque()
    w = np.empty(50)
    check(library, context, library.pk_network_parse(context, network.encode(), graph))
    check(library, context, library.pk_network_initialize(context, graph, 7, w))
    library.pk_graph_release(context, graph)

    x, tests = random.normal(size=(20, 3)), random.normal(size=(4, 3))
    outputs = np.empty((20, 2))
    evaluate(library, network, w, x, outputs)
    error = np.abs(outputs - forward(w, x)[1]).max()
    print(f"outputs against NumPy: {error:.1e}")
    assert error < 1e-14

    try:  # errors arrive as sentences
        evaluate(library, "input 3; dance 8", w, x, outputs)
        raise AssertionError("accepted")
    except Error as refused:
        print("an error:", refused)

    # Ten steps of gradient descent on (f - y)^2 / 2 in NumPy, as a run directory; see docs/run-directory.md.
    y, rate, all_weights = np.sin(x[:, :2]), 0.3, [w.copy()]
    for _ in range(10):
        W1, b1, W2, b2 = layers(w)
        hidden, f = forward(w, x)
        df = (f - y) / len(x)
        dh = df @ W2 * (1 - hidden**2)
        w = w - rate * np.concatenate([(dh.T @ x).ravel(), dh.sum(0), (df.T @ hidden).ravel(), df.sum(0)])
        all_weights.append(w)
    with tempfile.TemporaryDirectory() as run:
        arrays = {
            "weights": np.array(all_weights),
            "learning_rates": np.full(10, rate),
            "batch_offsets": np.arange(11, dtype=np.int64) * 20,
            "batch_items": np.tile(np.arange(20, dtype=np.int64), 10),
            "train_inputs": x,
            "train_targets": y,
        }
        for name, array in arrays.items():
            np.save(os.path.join(run, name + ".npy"), array)
        with open(os.path.join(run, "run.txt"), "w", encoding="ascii") as file:
            file.write(f"pathkernel-run 1\nnetwork {network}\nloss squared\noptimizer sgd\n")
        result = decompose(library, run, tests)

        # Several at a time: each process with one thread.
        with multiprocessing.get_context("fork").Pool(2) as pool:
            tasks = [pool.apply_async(decompose_elsewhere, (path, run, tests[i : i + 2])) for i in (0, 2)]
            halves = [task.get(timeout=60)["by_example"] for task in tasks]
        assert np.abs(np.concatenate(halves) - result["by_example"]).max() < 1e-12
        print("the same in two forked processes")
    parts = (
        result["initial"]
        + result["by_example"].sum(2)
        + result["decay"]
        + result["unattributed"]
        + result["closure"]
    )
    errors = {
        "sum of the parts - final": np.abs(parts - result["final"]).max(),
        "closure": np.abs(result["closure"]).max(),
        "unattributed": np.abs(result["unattributed"]).max(),
        "final against NumPy": np.abs(result["final"] - forward(w, tests)[1]).max(),
    }
    for name, value in errors.items():
        print(f"{name}: {value:.1e}")
        assert value < 1e-12


if __name__ == "__main__":
    chosen = (
        sys.argv[1]
        if len(sys.argv) > 1
        else os.environ.get("PATHKERNEL_LIBRARY") or ctypes.util.find_library("pathkernel")
    )
    if not chosen:
        sys.exit("no libpathkernel.so: give its path, or set PATHKERNEL_LIBRARY")
    main(chosen)
