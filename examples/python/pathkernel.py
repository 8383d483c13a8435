"""pathkernel from Python: train, decompose and measure in one file on ctypes and NumPy.

    import numpy as np, pathkernel

    run = pathkernel.Run("run")                  # a run directory, recorded in PyTorch or by pathkernel.train
    result = run.decompose(x)                    # x: (M, D...), any number type and memory layout
    result.by_example[m, c, i]                   # what training example i contributed to output c on input m
    result.strongest(0)                          # the examples that moved input 0's decision most
    gram = run.kernel("ntk", x)                  # (M, M), an array
    run.compare(x)                               # ten approximations beside the exact decomposition

The shared library is the one that `pip install ./examples/python` builds, $PATHKERNEL_LIBRARY (a path), one beside this
file, or an installed one. It is loaded when it is first needed: results of the program are read without it.

Every call computes without the GIL, so threads run side by side, each with a run of its own or all with one. Ctrl-C
cancels a call at the next piece of work and raises KeyboardInterrupt; a training run keeps its finished steps. What is wrong
raises Error with the library's sentence, and is also a ValueError, MemoryError or OSError where one of these fits. A result that is
not closed or not explained by its run comes with a warning (ClosureWarning, UnattributedWarning), never silently.

>>> import tempfile
>>> import numpy as np
>>> random = np.random.default_rng(0)
>>> x = random.normal(size=(40, 3))
>>> y = (x[:, 0] * x[:, 1] > 0).astype(int)
>>> folder = tempfile.TemporaryDirectory()
>>> run = train(folder.name + "/run", x, y, network="input 3; dense 8; tanh; dense 2",
...             loss="softmax_cross_entropy", optimizer="adamw weight_decay=0.1", rate=0.05, steps=30, batch=10)
>>> run
Run('input 3; dense 8; tanh; dense 2': 50 parameters, 40 examples, 30 steps)
>>> result = run.decompose(x[:4], keep=["example", "step"])
>>> result.by_example.shape, result.by_step.shape
((4, 2, 40), (4, 2, 30))
>>> bool(np.abs(result.residual()).max() < 1e-12)   # final - (initial + contributions + decay + unattributed + closure)
True
>>> bool(np.allclose(run(x[:4]), result.final))
True
>>> folder.cleanup()
"""

from __future__ import annotations

import ctypes
import ctypes.util
import enum
import math
import os
import re
import signal
import sys
import threading
import warnings
import weakref
from ctypes import c_char_p, c_double, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Callable, Union
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

__all__ = [
    "ClosureWarning",
    "Decomposition",
    "Error",
    "FileError",
    "Gram",
    "InputError",
    "MemoryLimitError",
    "Network",
    "Run",
    "Status",
    "UnattributedWarning",
    "load",
    "train",
    "version",
]

Progress = Union[None, bool, Callable[[str, float], Any]]


# ---- errors


class Status(enum.IntEnum):
    """What a call of the library returns."""

    OK = 0
    ARGUMENT = 1
    SHAPE = 2
    OVERFLOW = 3
    MEMORY = 4
    MEMORY_LIMIT = 5
    IO = 6
    FORMAT = 7
    UNSUPPORTED = 8
    NOT_FINITE = 9
    NOT_CLOSED = 10
    CANCELLED = 11
    NOT_REPRODUCED = 12
    UNATTRIBUTED = 13


class Error(Exception):
    """The library's sentence, and its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = Status(status)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (int(self.status), str(self))


class InputError(Error, ValueError):
    """An argument, an array or a file's content is wrong."""


class MemoryLimitError(Error, MemoryError):
    """The memory limit cannot be met (the sentence names the least that would do), or there is no memory."""


class FileError(Error, OSError):
    """A file cannot be read or written."""

    def __init__(self, status: int, message: str) -> None:
        Error.__init__(self, status, message)

    def __str__(self) -> str:
        return str(self.args[0])


class ClosureWarning(UserWarning):
    """Computed, but what quadrature left over is more than the tolerance."""


class UnattributedWarning(UserWarning):
    """Computed, but the declared optimizer, loss or data are not those that made the recorded weights."""


_ERRORS: dict[int, type] = {
    Status.ARGUMENT: InputError,
    Status.SHAPE: InputError,
    Status.FORMAT: InputError,
    Status.UNSUPPORTED: InputError,
    Status.NOT_FINITE: InputError,
    Status.OVERFLOW: MemoryLimitError,
    Status.MEMORY: MemoryLimitError,
    Status.MEMORY_LIMIT: MemoryLimitError,
    Status.IO: FileError,
}


def _refusal(message: str) -> InputError:
    return InputError(Status.ARGUMENT, message)


def _error(status: int, message: str) -> Error:
    made: Error = _ERRORS.get(status, Error)(int(status), message)
    return made


# ---- the library

# What is called, as pathkernel.h declares it; tests/python/test_module.py lets the C compiler compare the two.
_FUNCTIONS = """
const char *pk_version(void);
const char *pk_status_text(pk_status status);
const pk_field *pk_layout(size_t index);
pk_array pk_array_view(pk_type type, int rank, const size_t *shape, const void *data);
pk_status pk_array_check_rows(pk_context *context, const pk_array *array, int rank, const size_t *dims, const char *name);
pk_status pk_dataset_check(pk_context *context, const pk_dataset *dataset, size_t input_width, size_t outputs);
pk_status pk_network_parse_with(pk_context *context, const char *text, const pk_constants *constants, pk_graph *graph);
pk_status pk_network_initialize(pk_context *context, const pk_graph *graph, uint64_t seed, pk_real *weights);
pk_status pk_graph_check_inputs(pk_context *context, const pk_graph *graph, size_t row, const pk_real *inputs);
pk_status pk_graph_evaluate(pk_context *context, const pk_graph *graph, const pk_real *weights, pk_matrix inputs, pk_matrix outputs);
void pk_graph_release(pk_context *context, pk_graph *graph);
pk_status pk_run_open(pk_context *context, const char *directory, pk_run *run);
pk_status pk_run_recover(pk_context *context, const char *directory, pk_run *run);
pk_status pk_run_until(pk_context *context, pk_run *run, size_t steps);
pk_status pk_run_check_inputs(pk_context *context, const pk_run *run, const pk_array *inputs, const char *name);
void pk_run_release(pk_context *context, pk_run *run);
pk_status pk_replay_prepare(pk_context *context, const pk_run *run, size_t reach, pk_replay *replay);
pk_status pk_replay_weights(pk_context *context, pk_replay *replay, size_t step, pk_real *weights);
void pk_replay_release(pk_context *context, pk_replay *replay);
pk_status pk_average_parse(pk_context *context, const char *text, pk_average *average);
pk_status pk_run_average(pk_context *context, const pk_run *run, const pk_average *average, pk_real *weights);
pk_status pk_quadrature_parse(pk_context *context, const char *text, pk_quadrature *quadrature);
pk_status pk_decompose(pk_context *context, const pk_run *run, pk_matrix inputs, const pk_decompose_options *options, pk_decomposition *out);
void pk_decomposition_release(pk_context *context, pk_decomposition *decomposition);
pk_status pk_compare(pk_context *context, const pk_run *run, pk_matrix inputs, pk_comparison *rules);
pk_kernel_kind pk_kernel_find(const char *name);
const char *pk_kernel_name(pk_kernel_kind kind);
const char *pk_kernel_outputs_name(pk_kernel_outputs outputs);
pk_kernel_outputs pk_kernel_outputs_find(const char *name);
const char *pk_kernel_map_name(pk_kernel_map map);
int pk_kernel_map_find(const char *name);
pk_status pk_kernel_shape(pk_context *context, const pk_run *run, const pk_dataset *left, const pk_dataset *right, const pk_kernel_options *options, size_t *shape, int *rank);
pk_status pk_kernels(pk_context *context, const pk_run *run, const pk_dataset *left, const pk_dataset *right, size_t count, const pk_kernel_options *options, double *const *grams, pk_kernel_report *reports);
pk_status pk_optimizer_parse(pk_context *context, const char *text, pk_optimizer *optimizer);
pk_status pk_criterion_parse(pk_context *context, const char *text, pk_criterion *criterion);
pk_status pk_criterion_check(pk_context *context, const pk_criterion *criterion, const pk_dataset *dataset, size_t outputs);
void pk_criterion_release(pk_context *context, pk_criterion *criterion);
pk_status pk_train(pk_context *context, const pk_graph *graph, const pk_dataset *train, const pk_train_options *options, pk_real *weights, pk_train_result *result);
"""

# Fields that are called: these are compared likewise.
_CALLBACKS = {
    "pk_context.progress": "int (*)(void *user, const char *phase, double fraction)",
    "pk_decompose_options.readout.function": "void (*)(void *user, size_t row, const pk_real *f, pk_real *h, pk_real *slope)",
    "pk_constants.load": "pk_status (*)(void *user, pk_context *context, const char *name, pk_array *array)",
}

# What is read or written of each struct. Where the fields are says the library itself (pk_layout), as it was compiled.
# ["pk_tensor"]: as many of them as there is room for.
_STRUCTS: dict[str, dict[str, Any]] = {
    "pk_context": {
        "threads": c_int,
        "memory_limit": c_size_t,
        "progress": c_void_p,
        "progress_user": c_void_p,
        "memory_used": c_size_t,
        "memory_peak": c_size_t,
        "message": ctypes.c_char * 512,
    },
    "pk_matrix": {"data": c_void_p, "rows": c_size_t, "cols": c_size_t, "ld": c_size_t},
    "pk_array": {
        "type": c_uint,
        "rank": c_int,
        "shape": c_size_t * 8,
        "data": c_void_p,
        "row_items": c_size_t,
    },
    "pk_dataset": {"inputs": "pk_array", "targets": "pk_array"},
    "pk_graph": {
        "parameters": c_size_t,
        "columns": c_size_t,
        "checked": c_int,
        "input_width": c_size_t,
        "output_width": c_size_t,
        "input_shape.rank": c_int,
        "input_shape.dims": [c_size_t],
        "text": c_char_p,
    },
    "pk_constants": {"load": c_void_p, "user": c_void_p},
    "pk_run": {
        "graph": "pk_graph",
        "steps": c_size_t,
        "parameters": c_size_t,
        "examples": c_size_t,
        "outputs": c_size_t,
        "keep_every": c_size_t,
        "cut_off": c_int,
    },
    "pk_replay": {},
    "pk_quadrature": {"rule": c_uint, "nodes": c_int},
    "pk_average": {},
    "pk_decompose_options": {
        "quadrature": "pk_quadrature",
        "average": "pk_average",
        "tolerance": c_double,
        "unattributed": c_double,
        "readout.kind": c_uint,
        "readout.output": c_size_t,
        "readout.labels": c_void_p,
        "readout.count": c_size_t,
        "readout.function": c_void_p,
        "readout.user": c_void_p,
        "keep": c_uint * 8,
        "groups": c_void_p,
        "group_count": c_size_t,
        "bounds": c_int,
        "step_closure": c_int,
        "rows_at_once": c_size_t,
    },
    "pk_tensor": {"axes": c_uint, "rank": c_int, "shape": c_size_t * 5, "data": c_void_p},
    "pk_decomposition": {
        **{name: c_size_t for name in ("rows", "outputs", "examples", "groups", "steps", "layers")},
        **{name: c_void_p for name in ("initial", "final", "data", "decay", "inherited")},
        **{name: c_void_p for name in ("unattributed", "closure")},
        "kept": ["pk_tensor"],
        "kept_count": c_size_t,
        "bounds": c_void_p,
        "step_closure": c_void_p,
        **{
            name: c_double
            for name in ("worst_closure", "worst_relative", "worst_excess", "worst_unattributed")
        },
        **{name: c_double for name in ("unattributed_limit", "scale", "seconds")},
        **{name: c_size_t for name in ("points", "pieces", "refused", "passes")},
    },
    "pk_kernel_options": {
        "kind": c_uint,
        "outputs": c_uint,
        "output": c_size_t,
        "steps": c_void_p,
        "step_count": c_size_t,
        "quadrature": "pk_quadrature",
        "tolerance": c_double,
        "unweighted": c_int,
        "by_layer": c_int,
        "append_one": c_int,
        "map": c_uint,
    },
    "pk_kernel_report": {
        "error": c_double,
        "points": c_size_t,
        "refused": c_size_t,
        "zero_rows": c_size_t,
        "seconds": c_double,
    },
    "pk_comparison": {
        "rule": c_char_p,
        **{name: c_double for name in ("residual_max", "residual_median", "spearman", "seconds")},
    },
    "pk_optimizer": {},
    "pk_criterion": {},
    "pk_schedule": {"kind": c_uint, "rate": c_double, "rates": c_void_p, "rates_count": c_size_t},
    "pk_train_options": {
        "criterion": c_void_p,
        "optimizer": "pk_optimizer",
        "schedule": "pk_schedule",
        "groups": c_void_p,
        "group_count": c_size_t,
        "group_schedules": c_void_p,
        "steps": c_size_t,
        "batch_size": c_size_t,
        "shuffle_off": c_int,
        "seed": c_uint64,
        "clip_norm": c_double,
        "record": c_char_p,
        "resume": c_int,
        "replace": c_int,
        "record_float32": c_int,
        "keep_every": c_size_t,
    },
    "pk_train_result": {"steps": c_size_t, "resumed": c_size_t, "objective": c_double},
}
_KINDS = {c_double: 1, c_int: 2, c_uint: 3, c_size_t: 3, c_uint64: 3}  # of pk_field


class _Field(ctypes.Structure):
    _fields_ = [
        ("type", c_char_p),
        ("name", c_char_p),
        ("offset", c_size_t),
        ("size", c_size_t),
        ("kind", c_uint),
    ]


class _Library:
    """The functions of the shared library, and its structs as it was compiled with them."""

    def __init__(self, path: str) -> None:
        try:
            self.path, self.functions = path, ctypes.CDLL(path)
        except OSError as error:
            raise ImportError(f"{path} cannot be loaded: {error}") from error
        try:
            layout = self.functions.pk_layout
        except AttributeError:
            raise ImportError(
                f"{path} is no library of pathkernel, or an older one: it has no pk_layout"
            ) from None
        layout.restype, layout.argtypes = ctypes.POINTER(_Field), [c_size_t]
        self.fields: dict[tuple[str, str], tuple[int, int, int]] = {}
        for index in range(1 << 20):
            found = layout(index)
            if not found:
                break
            field = found.contents
            self.fields[field.type.decode(), field.name.decode()] = field.offset, field.size, field.kind
        if self.fields["pk_field", ""][1] != ctypes.sizeof(_Field):
            raise ImportError(f"{path}: its pk_field is another one than this file's")
        self.real = np.dtype(f"f{self.fields['pk_real', ''][1]}")
        self.structs: dict[str, Any] = {}
        for name, members in _STRUCTS.items():
            self.structs[name] = self._struct(name, dict(members))
        for declaration in _FUNCTIONS.strip().splitlines():
            self._declare(declaration)
        self.callbacks = {name: self._callback(text) for name, text in _CALLBACKS.items()}

    def __getattr__(self, name: str) -> Any:
        """Functions (pk_run_open), structs made anew (pk_run -> structs), constants (PK_BY_STEP)."""
        if name.startswith("PK_"):
            return self.fields["", name][0]
        return getattr(self.functions, name)

    def new(self, struct: str) -> Any:
        return self.structs[struct]()

    def _struct(self, name: str, members: dict[str, Any]) -> type:
        missing = [field for field in ["", *members] if (name, field) not in self.fields]
        if missing:
            raise ImportError(f"{self.path} has no {name}.{missing[0]}; it is another version than this file")
        layout: list[tuple[str, Any]] = []
        at = 0
        for field in sorted(members, key=lambda member: self.fields[name, member][0]):
            offset, size, kind = self.fields[name, field]
            type_ = members[field]
            if isinstance(type_, list):
                item = self.structs[type_[0]] if isinstance(type_[0], str) else type_[0]
                type_ = item * (size // ctypes.sizeof(item))
            elif isinstance(type_, str):
                type_ = self.structs[type_]
            if ctypes.sizeof(type_) != size or kind != _KINDS.get(type_, 0):
                raise ImportError(f"{self.path}: {name}.{field} has another type than this file knows")
            if offset > at:
                layout.append((f"_before_{len(layout)}", ctypes.c_char * (offset - at)))
            layout.append((field.replace(".", "_"), type_))
            at = offset + size
        whole = self.fields[name, ""][1]
        if whole > at:
            layout.append(("_rest", ctypes.c_char * (whole - at)))
        made = type(name, (ctypes.Structure,), {"_fields_": layout})
        agrees = ctypes.sizeof(made) == whole and all(
            getattr(made, field.replace(".", "_")).offset == self.fields[name, field][0] for field in members
        )
        if not agrees:
            raise ImportError(f"{self.path}: {name} cannot be laid out as it was compiled")
        return made

    def _type(self, text: str) -> Any:
        """The type of a parameter or result, such as `const char *name`."""
        words = re.sub(r"\bconst\b", "", text).replace("*", " * ").split()
        if "*" in words:
            return c_char_p if words[:2] == ["char", "*"] and words.count("*") == 1 else c_void_p
        known = {"void": None, "size_t": c_size_t, "uint64_t": c_uint64, "double": c_double, "int": c_int}
        return known.get(words[0], self.structs.get(words[0], c_int))  # others are enums

    def _declare(self, declaration: str) -> None:
        match = re.fullmatch(r"(.+?)(pk_\w+)\((.*)\);", declaration)
        assert match, declaration
        result, name, arguments = match.groups()
        try:
            function = getattr(self.functions, name)
        except AttributeError:
            raise ImportError(f"{self.path} has no {name}; it is another version than this file") from None
        function.restype = self._type(result)
        function.argtypes = [] if arguments == "void" else [self._type(one) for one in arguments.split(",")]

    def _callback(self, declaration: str) -> Any:
        match = re.fullmatch(r"(.+?)\(\*\)\((.*)\)", declaration)
        assert match, declaration
        return ctypes.CFUNCTYPE(self._type(match[1]), *(self._type(one) for one in match[2].split(",")))


def _candidates() -> Iterator[str]:
    chosen = os.environ.get("PATHKERNEL_LIBRARY")
    if chosen:
        yield chosen
        return
    here = Path(__file__).resolve().parent
    name = "libpathkernel.dylib" if sys.platform == "darwin" else "libpathkernel.so"
    for path in (here / "pathkernel.libs" / name, here / name):
        if path.is_file():
            yield str(path)
    installed = ctypes.util.find_library("pathkernel")
    if installed:
        yield installed


_loaded: _Library | None = None
_loading = threading.Lock()


def _library() -> _Library:
    global _loaded
    with _loading:
        if _loaded is None:
            path = next(_candidates(), None)
            if path is None:
                raise ImportError(
                    "no libpathkernel.so: pip install ./examples/python in a clone of pathkernel, or build one "
                    "(cmake -B build -DPATHKERNEL_SHARED=ON && cmake --build build) and set PATHKERNEL_LIBRARY to its path"
                )
            _loaded = _Library(path)
        return _loaded


def version() -> str:
    """The version of the library.

    >>> version().count(".")
    2
    """
    return str(_library().pk_version().decode())


# ---- calls

# A child of fork has none of its parent's threads, but gcc's OpenMP in it waits for them for ever once the parent has used
# them. multiprocessing forks on Linux, by default up to Python 3.13. So such a child computes with one thread;
# multiprocessing.get_context("spawn") starts children that have all.
_forked = False


def _after_fork() -> None:
    global _forked, _loading
    _forked, _loading = True, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _bytes(limit: int | str | None) -> int:
    """
    >>> _bytes("2G"), _bytes("1.5M"), _bytes(None)
    (2147483648, 1572864, 0)
    """
    if limit is None:
        return 0
    if isinstance(limit, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?B)?\s*", limit, re.IGNORECASE)
        if not match:
            raise _refusal(f"memory_limit: {limit!r} is no number of bytes such as 2000000, '500M' or '2G'")
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    if int(limit) != limit or limit < 0:
        raise _refusal(f"memory_limit: {limit!r} is no number of bytes")
    return int(limit)


def _interactive() -> bool:
    return "ipykernel" in sys.modules or (hasattr(sys.stderr, "isatty") and sys.stderr.isatty())


def _bar(progress: Progress) -> Any:
    """A bar of tqdm that shows itself after a second, where it is installed and somebody looks on."""
    if callable(progress) or progress is False or (progress is None and not _interactive()):
        return None
    try:
        if "ipykernel" in sys.modules:
            from tqdm.auto import tqdm
        else:
            from tqdm import tqdm
    except ImportError:
        if progress:
            raise _refusal("progress=True shows a bar of tqdm, which is not installed") from None
        return None
    return tqdm(
        total=1.0,
        delay=0 if progress else 1,
        leave=False,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    )


class _Call:
    """A context for one call, with its progress and Ctrl-C. Nothing is raised inside of the library: what a callback
    raises, and an interrupt, cancel the call and are raised when it has returned and given its memory back.
    """

    def __init__(
        self, threads: int = 0, memory_limit: int | str | None = None, progress: Progress = False
    ) -> None:
        if isinstance(threads, bool) or int(threads) != threads or not 0 <= threads <= 4096:
            raise _refusal(f"threads: {threads!r}; a number of threads, or 0 for all processors")
        if _forked and threads > 1:
            raise _refusal(
                "threads: a forked process has one thread of OpenMP; use threads=1, or multiprocessing's spawn",
            )
        self.library = _library()
        self.context = self.library.new("pk_context")
        self.context.threads = 1 if _forked else int(threads)
        self.context.memory_limit = _bytes(memory_limit)
        self.progress = progress
        self.error: BaseException | None = None
        self.signal: tuple[int, Any] | None = None

    def message(self) -> str:
        return str(self.context.message.decode(errors="replace"))

    def check(self, status: int) -> None:
        """Statuses become exceptions that carry the library's sentence."""
        if status:
            text = self.library.pk_status_text(status).decode()
            raise _error(status, self.message() or text)

    def once(self, function: str, *arguments: Any) -> None:
        """A short call."""
        self.check(getattr(self.library, function)(ctypes.byref(self.context), *arguments))

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = number, frame

    def long(self, function: str, *arguments: Any) -> int:
        """A call that shows progress and can be cancelled; returns its status."""
        library, bar, told = (
            self.library,
            _bar(self.progress),
            self.progress if callable(self.progress) else None,
        )

        def callback(user: Any, phase: bytes | None, fraction: float) -> int:
            try:
                text = (phase or b"").decode(errors="replace")
                if bar is not None and fraction > bar.n:
                    bar.set_description_str(text, refresh=False)
                    bar.update(fraction - bar.n)
                if told is not None and told(text, fraction):
                    return 1
            except BaseException as error:  # it cannot pass through the library
                self.error = self.error or error
            return int(self.error is not None or self.signal is not None)

        thunk = library.callbacks["pk_context.progress"](callback)
        self.context.progress = ctypes.cast(thunk, c_void_p)
        # Python calls the handlers of signals in the main thread only, between two lines of Python: in the callback.
        before = None
        try:
            if threading.current_thread() is threading.main_thread() and callable(
                signal.getsignal(signal.SIGINT)
            ):
                before = signal.getsignal(signal.SIGINT)
                signal.signal(signal.SIGINT, self._on_signal)
            status = int(getattr(library, function)(ctypes.byref(self.context), *arguments))
        finally:
            if before is not None:
                signal.signal(signal.SIGINT, before)
            self.context.progress = None
            if bar is not None:
                bar.close()
        if self.signal is not None and callable(before):
            interrupt, self.signal = self.signal, None
            before(*interrupt)  # Python's own raises KeyboardInterrupt
        if self.error is not None:
            raise self.error
        return status


class _Held:
    """A struct of the library with what it holds, given back when nobody uses it any more: a call that it is handed to does."""

    def __init__(self, call: _Call, struct: str, release: str) -> None:
        self.call, self.struct = call, call.library.new(struct)
        self._as_parameter_ = ctypes.byref(self.struct)
        function = getattr(call.library, release)
        context = call.context
        weakref.finalize(self, lambda held: function(ctypes.byref(context), ctypes.byref(held)), self.struct)

    def take(self, address: int | None, *shape: int) -> np.ndarray:
        """The library's memory as an array, which keeps it; of nothing, an array of its own."""
        count = math.prod(shape)
        if not address or not count:
            return np.zeros(shape)
        buffer: Any = (c_double * count).from_address(address)
        buffer._held = self
        array: np.ndarray = np.frombuffer(buffer, np.float64)
        return array.reshape(shape)


# ---- arrays

_TYPES = {
    np.dtype(name): f"PK_{name.upper()}"
    for name in "float64 float32 int64 uint8 int8 int16 int32 uint16 uint32 bool".split()
}


def _numbers(given: Any, name: str, kinds: str = "biuf") -> np.ndarray:
    """Any array as one that the library reads: aligned, C order, native bytes, a type that it knows. The numbers are the
    same, to the bit; what would change them is refused."""
    if hasattr(given, "detach"):  # a tensor of torch
        given = given.detach().cpu()
    if isinstance(given, np.ma.MaskedArray) and np.ma.getmaskarray(given).any():
        raise _refusal(f"{name}: a masked array with masked entries")
    array = np.asarray(given)
    if array.dtype.kind not in kinds:
        wanted = "numbers, integers or bools" if "f" in kinds else "integers"
        raise _refusal(f"{name}: an array of {array.dtype}; {wanted} are needed")
    if array.ndim > 8:
        raise InputError(Status.SHAPE, f"{name}: an array of {array.ndim} axes; there are at most 8")
    dtype = array.dtype.newbyteorder("=")
    if dtype == np.float16:
        dtype = np.dtype(np.float32)
    elif dtype == np.uint64 and (not array.size or array.max() < 2**63):
        dtype = np.dtype(np.int64)
    if dtype not in _TYPES:
        raise _refusal(f"{name}: an array of {array.dtype}, which has numbers that float64 does not have")
    return np.require(array, dtype, ["C_CONTIGUOUS", "ALIGNED"])


def _view(array: np.ndarray) -> Any:
    library = _library()
    shape = (c_size_t * max(array.ndim, 1))(*array.shape)
    return library.pk_array_view(getattr(library, _TYPES[array.dtype]), array.ndim, shape, array.ctypes.data)


def _reals(array: np.ndarray, name: str) -> np.ndarray:
    """As the library computes with them, row by row: (M, numbers of a row)."""
    rows = np.require(
        array.reshape(len(array), math.prod(array.shape[1:])), _library().real, ["C_CONTIGUOUS", "ALIGNED"]
    )
    if array.dtype.kind in "iu" and not np.array_equal(rows.astype(array.dtype), array.reshape(rows.shape)):
        raise _refusal(f"{name}: whole numbers that are too large for {rows.dtype}")
    return rows


def _matrix(rows: np.ndarray) -> Any:
    return _library().structs["pk_matrix"](rows.ctypes.data, *rows.shape, rows.shape[1])


def _text(text: Any, name: str) -> bytes:
    if not isinstance(text, str) or "\0" in text:
        raise _refusal(f"{name}: {text!r} is no text")
    return text.encode()


def _path(path: Any) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:
        raise _refusal(f"{path!r} is no path")
    return name


def _whole(value: Any, name: str, least: int = 0) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if isinstance(value, (bool, np.bool_)) or number != value or not least <= number < 2**63:
        raise _refusal(f"{name}: {value!r}; a whole number, {least} or more, is needed")
    return number


def _quadrature(call: _Call, text: str) -> Any:
    quadrature = call.library.new("pk_quadrature")
    call.once(
        "pk_quadrature_parse",
        _text("trapezoid:2" if text == "trapezoid" else text, "quadrature"),
        ctypes.byref(quadrature),
    )
    return quadrature


def _warn(status: int, message: str) -> None:
    if status == Status.NOT_CLOSED:
        warnings.warn(message, ClosureWarning, stacklevel=3)
    elif status == Status.UNATTRIBUTED:
        warnings.warn(message, UnattributedWarning, stacklevel=3)


# ---- networks


class Network:
    """A network of a line of the network language (docs/network-language.md).

    >>> network = Network("input 3; dense 8; tanh; dense 2")
    >>> network
    Network('input 3; dense 8; tanh; dense 2', parameters=50)
    >>> network(network.initialize(seed=7), np.zeros((5, 3))).shape
    (5, 2)
    >>> Network("input 3; dance 8")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    pathkernel.InputError: network, layer 2: 'dance' is not a layer that is known (is it 'dense'?)...
    """

    def __init__(self, line: str, constants: Mapping[str, Any] | None = None) -> None:
        """constants: the arrays that the line names, such as the matrix of `propagate NAME`."""
        call = _Call()
        self._held = _Held(call, "pk_graph", "pk_graph_release")
        arrays = {name: _numbers(array, f"constants[{name!r}]") for name, array in (constants or {}).items()}
        library, missing = call.library, []

        def load_constant(user: Any, context: Any, name: bytes, array: Any) -> int:
            found = arrays.get(name.decode(errors="replace"))
            if found is None:
                missing.append(name.decode(errors="replace"))
                return int(Status.ARGUMENT)
            view = _view(found)
            ctypes.memmove(array, ctypes.byref(view), ctypes.sizeof(view))
            return int(Status.OK)

        thunk = library.callbacks["pk_constants.load"](load_constant)
        named = library.structs["pk_constants"](ctypes.cast(thunk, c_void_p), None)
        try:
            call.once("pk_network_parse_with", _text(line, "network"), ctypes.byref(named), self._held)
        except Error as error:
            if missing:
                raise InputError(
                    error.status,
                    f"the network names the array {missing[0]!r}: give constants={{{missing[0]!r}: ...}}",
                ) from None
            raise
        graph = self._held.struct
        self.line = str(graph.text.decode())
        self.parameters, self.outputs = int(graph.parameters), int(graph.output_width)
        self.input_shape = tuple(graph.input_shape_dims[: graph.input_shape_rank])

    def __repr__(self) -> str:
        return f"Network({self.line!r}, parameters={self.parameters})"

    def initialize(self, seed: int = 0) -> np.ndarray:
        """(P,) weights: each layer's own initialization, PyTorch's default for most."""
        weights = np.empty(self.parameters, _library().real)
        _Call().once("pk_network_initialize", self._held, _whole(seed, "seed"), weights.ctypes.data)
        return weights

    def __call__(self, weights: Any, x: Any, *, threads: int = 0) -> np.ndarray:
        """(M, C): f(weights, x)."""
        array = _numbers(x, "x")
        call, graph = _Call(threads), self._held.struct
        dims = (c_size_t * len(self.input_shape))(*self.input_shape)
        call.once("pk_array_check_rows", ctypes.byref(_view(array)), len(dims), dims, b"x")
        return _evaluate(call, graph, _flat(weights, self.parameters), _reals(array, "x"))


def _flat(weights: Any, parameters: int) -> np.ndarray:
    array = _numbers(weights, "weights")
    if array.size != parameters or array.ndim > 2:
        raise InputError(
            Status.SHAPE,
            f"weights: an array of {array.shape}; the network has {parameters} parameters, ({parameters},)",
        )
    return np.require(array.reshape(-1), _library().real, ["C_CONTIGUOUS", "ALIGNED"])


def _check_rows(call: _Call, graph: Any, rows: np.ndarray) -> None:
    """Tokens and the like: whether they are what the network's layers take."""
    for row in range(len(rows) if graph.checked else 0):
        call.once("pk_graph_check_inputs", ctypes.byref(graph), row, rows[row].ctypes.data)


def _evaluate(call: _Call, graph: Any, weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    outputs = np.empty((len(rows), graph.output_width), rows.dtype)
    if not len(rows):
        return outputs
    _check_rows(call, graph, rows)
    call.once("pk_graph_evaluate", ctypes.byref(graph), weights.ctypes.data, _matrix(rows), _matrix(outputs))
    return outputs.astype(np.float64, copy=False)


# ---- a run


class Gram(np.ndarray):
    """A kernel matrix: an array with the names of its axes, and what auto measured of its error. What is made of it has neither."""

    axes: tuple[str, ...] | None
    report: dict[str, float] | None

    def __array_finalize__(self, other: Any) -> None:
        self.axes = self.report = None  # of the matrix itself, not of its transpose or a part


_AT_WEIGHTS = (
    "ntk",
    "conjugate",
    "embedding",
    "path_average",
)  # kernels at numbers of weights 0 .. S; others at steps
_WITH_OUTPUTS = ("ntk", "path", "path_average", "epk")
_AXES = {"example": "PK_BY_EXAMPLE", "group": "PK_BY_GROUP", "step": "PK_BY_STEP", "layer": "PK_BY_LAYER"}


class Run:
    """A recorded run: a run directory (docs/run-directory.md).

    until: the run up to that step only (early stopping). recover: open a run whose files differ in length, as after a power
    cut. threads (0: all processors) and memory_limit (bytes, or "2G"; None: no limit) are defaults of the calls.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        until: int | None = None,
        recover: bool = False,
        threads: int = 0,
        memory_limit: int | str | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self._given = until, recover, threads, memory_limit
        self.threads, self.memory_limit = threads, memory_limit
        call = _Call(threads, memory_limit)
        held = _Held(call, "pk_run", "pk_run_release")
        call.once("pk_run_recover" if recover else "pk_run_open", _path(path), held)
        if until is not None:
            call.once("pk_run_until", held, _whole(until, "until"))
        self._held: _Held | None = held
        run = held.struct
        self.steps, self.parameters = int(run.steps), int(run.parameters)
        self.examples, self.outputs = int(run.examples), int(run.outputs)
        self.layers, self.keep_every = int(run.graph.columns), int(run.keep_every)
        self.cut_off = bool(run.cut_off)
        self.network = str(run.graph.text.decode())
        self.inherits = "initial_step" in self.manifest  # it begins with an optimizer's state

    def __repr__(self) -> str:
        return f"Run({self.network!r}: {self.parameters} parameters, {self.examples} examples, {self.steps} steps)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (os.path.abspath(self.path), *self._given)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the run's files back, after the calls that still compute with it; so does the end of the run's life."""
        self._held = None

    @property
    def manifest(self) -> dict[str, str]:
        """The lines of run.txt by their first word; several `group` lines are one, with line ends between."""
        found: dict[str, str] = {}
        with open(os.path.join(self.path, "run.txt"), encoding="utf-8") as file:
            for line in file:
                words = line.split("#")[0].split(None, 1)
                if words:
                    text = words[1].strip() if len(words) > 1 else ""
                    found[words[0]] = f"{found[words[0]]}\n{text}" if words[0] in found else text
        return found

    @property
    def train_inputs(self) -> np.ndarray:
        """(N, D...), mapped."""
        array: np.ndarray = np.load(os.path.join(self.path, "train_inputs.npy"), mmap_mode="r")
        return array

    @property
    def train_targets(self) -> np.ndarray:
        """(N,) labels, or (N,) or (N, C) numbers, mapped."""
        array: np.ndarray = np.load(os.path.join(self.path, "train_targets.npy"), mmap_mode="r")
        return array

    def weights(
        self, step: int = -1, *, average: str | None = None, threads: int | None = None
    ) -> np.ndarray:
        """(P,): w_step, step from 0 to run.steps; -1: the last. Those that were not kept are computed again, to the bit.
        average: that of all steps, as in decompose."""
        call = self._call(threads, None, False)
        step = self._step(step, self.steps)
        weights = np.empty(self.parameters, call.library.real)
        if average is not None:
            if step != self.steps:
                raise _refusal("weights: an average is of all steps; Run(path, until=...) ends earlier")
            chosen = self._average(call, average)
            call.once("pk_run_average", self._open, ctypes.byref(chosen), weights.ctypes.data)
            return weights
        replay: Any = _Held(call, "pk_replay", "pk_replay_release")
        replay.run = self._open  # which has to be there until the end
        call.once("pk_replay_prepare", replay.run, 0, replay)
        call.once("pk_replay_weights", replay, step, weights.ctypes.data)
        return weights

    def __call__(self, x: Any, step: int = -1, *, threads: int | None = None) -> np.ndarray:
        """(M, C): the network's outputs on x after a step; 0: before training, -1: at the end."""
        _, rows = self._rows(x, "x")
        weights = self.weights(step, threads=threads)
        held = self._open
        return _evaluate(self._call(threads, None, False), held.struct.graph, weights, rows)

    def decompose(
        self,
        x: Any,
        outputs: str | int | Sequence[int] | Callable[[int, np.ndarray], Any] = "all",
        keep: str | Sequence[str] = "example",
        *,
        labels: Any = None,
        groups: Any = None,
        average: str | None = None,
        quadrature: str = "auto",
        tolerance: float = 0,
        unattributed: float = 0,
        bounds: bool = False,
        step_closure: bool = False,
        rows_at_once: int = 0,
        threads: int | None = None,
        memory_limit: int | str | None = None,
        progress: Progress = None,
    ) -> Decomposition:
        """Decomposes f(w_S, x) over the training examples.

        x: (M, D...), the axes in the network's order. outputs: "all"; the number of one; numbers of several; "label", the
        output that the network decides for, with labels (M,) one for each input; or a smooth function of (number of the input,
        its outputs f (C,)), which gives numbers h (K,) and their slopes dh/df (K, C), such as a log-probability. keep: which sums to keep, of "example" (or
        "train"), "step", "layer", "group", and "total" for none; "example,step" keeps both axes in one array. groups: (N,)
        the number of each training example's group, for "group". average: "ema:BETA" or "swa:FROM:EVERY", the outputs of an average
        of the weights instead of the last ones. bounds: a bound on the error of each entry of by_example.
        tolerance, unattributed: 0 for the library's own. progress: True or False for a bar of tqdm, which long calls
        show by themselves; or a function of (phase, fraction), which cancels by returning something true.
        """
        array, rows = self._rows(x, "x")
        call = self._call(threads, memory_limit, progress)
        library = call.library
        options = library.new("pk_decompose_options")
        options.quadrature = _quadrature(call, quadrature)
        if average is not None:
            options.average = self._average(call, average)
        options.tolerance, options.unattributed = float(tolerance), float(unattributed)
        options.bounds, options.step_closure = int(bool(bounds)), int(bool(step_closure))
        options.rows_at_once = _whole(rows_at_once, "rows_at_once")
        for i, axes in enumerate(self._axes([keep] if isinstance(keep, str) else list(keep), groups)):
            options.keep[i] = axes
        if groups is not None:
            groups = np.require(_numbers(groups, "groups", "biu"), np.int64, ["C_CONTIGUOUS", "ALIGNED"])
            if groups.shape != (self.examples,):
                raise InputError(
                    Status.SHAPE,
                    f"groups: an array of {groups.shape}; each of {self.examples} training examples has one",
                )
            options.groups, options.group_count = groups.ctypes.data, int(groups.max(initial=0)) + 1
        chosen: list[int | None] = [None]
        if labels is not None or (isinstance(outputs, str) and outputs == "label"):
            if not (isinstance(outputs, str) and outputs in ("all", "label")):
                raise _refusal(f"outputs={outputs!r} does not go with labels")
            labels = self._labels(rows, labels, average)
            options.readout_kind, options.readout_labels = library.PK_READOUT_LABEL, labels.ctypes.data
        elif callable(outputs):
            readout = self._readout(call, outputs, rows, options)  # called until the end
        elif isinstance(outputs, str):
            if outputs != "all":
                raise _refusal(
                    f"outputs={outputs!r}; 'all', 'label', the number of an output or several numbers"
                )
        else:
            options.readout_kind = library.PK_READOUT_ONE
            wanted = _numbers(outputs, "outputs", "biu") if np.size(outputs) else np.empty((0, 0), int)
            if wanted.ndim > 1:
                raise _refusal("outputs: a number, or a list of numbers, is needed")
            chosen = [self._step(one, self.outputs - 1, "output") for one in np.atleast_1d(wanted).tolist()]
        parts = []
        for output in chosen:
            options.readout_output = output or 0
            held = _Held(call, "pk_decomposition", "pk_decomposition_release")
            status = call.long("pk_decompose", self._open, _matrix(rows), ctypes.byref(options), held)
            if status not in (Status.NOT_CLOSED, Status.UNATTRIBUTED):
                call.check(status)
            message = call.message() if status else ""
            _warn(status, message)
            parts.append(_decomposition(held, status, message, self.inherits))
        result = parts[0] if len(parts) == 1 else _joined(parts)
        result.run, result.inputs = self, array
        result.outputs = labels if labels is not None else None if chosen[0] is None else np.array(chosen)
        return result

    def kernel(
        self,
        kernel: str,
        left: Any = None,
        right: Any = None,
        *,
        left_labels: Any = None,
        right_labels: Any = None,
        outputs: str | int | None = None,
        steps: Any = None,
        rule: str = "auto",
        batch: str = "weight",
        by_layer: bool = False,
        append_one: bool = False,
        map: str = "none",
        tolerance: float = 0,
        threads: int | None = None,
        memory_limit: int | str | None = None,
        progress: Progress = None,
    ) -> Gram:
        """The Gram matrix of a kernel of the run: ntk, path, epk, conjugate and more (docs/run-directory.md, the program).

        left, right: (M, D...) rows, or None for the training rows; without right, the rows of left. outputs, of kernels that have
        them: trace (default), full, mean, sum, label or the number of one. steps: "final", "initial", "all", numbers or
        a slice. The result is (M, M'); more than one step of a kernel at a step, and by_layer, are axes in front; see its .axes.
        """
        call = self._call(threads, memory_limit, progress)
        library = call.library
        options = library.new("pk_kernel_options")
        options.kind = library.pk_kernel_find(_text(kernel, "kernel"))
        if not options.kind:
            names = ", ".join(_names(library.pk_kernel_name, 1))
            raise _refusal(f"{kernel!r} is no kernel; these are: {names}")
        self._kernel_outputs(kernel, outputs, options)
        if steps is not None:
            numbers = np.array(
                self._steps(steps, self.steps if kernel in _AT_WEIGHTS else self.steps - 1), c_size_t
            )
            options.steps, options.step_count = numbers.ctypes.data, len(numbers)
        if rule != "auto":
            options.quadrature = _quadrature(call, rule)
        if batch not in ("weight", "none"):
            raise _refusal(f"batch={batch!r}; 'weight' or 'none'")
        options.unweighted, options.by_layer, options.append_one = (
            int(batch == "none"),
            int(bool(by_layer)),
            int(bool(append_one)),
        )
        options.map, options.tolerance = max(library.pk_kernel_map_find(_text(map, "map")), 0), float(
            tolerance
        )
        if library.pk_kernel_map_find(_text(map, "map")) < 0:
            raise _refusal(f"map={map!r}; these are: {', '.join(_names(library.pk_kernel_map_name, 0))}")
        if right_labels is not None and right is None:
            raise _refusal("right_labels: without right the columns are the rows of left, with their labels")
        first, keep_first = self._side(left, left_labels, "left")
        if right is None or (right is left and right_labels is left_labels):
            second, keep_second = first, keep_first
        else:
            second, keep_second = self._side(right, right_labels, "right")
        sides = [None if side is None else ctypes.byref(side) for side in (first, second)]
        shape, rank = (c_size_t * 6)(), c_int()
        call.once("pk_kernel_shape", self._open, *sides, ctypes.byref(options), shape, ctypes.byref(rank))
        gram = np.zeros(tuple(shape[: rank.value]))
        report = library.new("pk_kernel_report")
        place = c_void_p(gram.ctypes.data)
        status = call.long(
            "pk_kernels",
            self._open,
            *sides,
            1,
            ctypes.byref(options),
            ctypes.byref(place),
            ctypes.byref(report),
        )
        if status != Status.NOT_CLOSED:
            call.check(status)
        _warn(status, call.message())
        del keep_first, keep_second
        result = gram.view(Gram)
        result.report = {
            name: getattr(report, name) for name in ("error", "points", "refused", "zero_rows", "seconds")
        }
        axes = (
            ["left", "left output", "right", "right output"]
            if options.outputs == library.pk_kernel_outputs_find(b"full")
            else ["left", "right"]
        )
        axes = (["layer"] if by_layer else []) + axes
        result.axes = tuple((["step"] if len(axes) < gram.ndim else []) + axes)
        return result

    def compare(
        self,
        x: Any,
        *,
        threads: int | None = None,
        memory_limit: int | str | None = None,
        progress: Progress = None,
    ) -> np.ndarray:
        """Ten rules beside the exact decomposition: an array of (rule, residual_max, residual_median, spearman, seconds).

        pandas.DataFrame(run.compare(x)) shows it.
        """
        _, rows = self._rows(x, "x")
        call = self._call(threads, memory_limit, progress)
        rules = (call.library.structs["pk_comparison"] * call.library.PK_COMPARE_RULES)()
        status = call.long("pk_compare", self._open, _matrix(rows), rules)
        if status not in (Status.NOT_CLOSED, Status.UNATTRIBUTED):
            call.check(status)
        _warn(status, call.message())
        names = ("residual_max", "residual_median", "spearman", "seconds")
        lines = [(rule.rule.decode(), *(getattr(rule, name) for name in names)) for rule in rules]
        return np.array(lines, [("rule", "U32"), *((name, "f8") for name in names)])

    # ---- arguments

    @property
    def _open(self) -> _Held:
        held = self._held
        if held is None:
            raise _refusal(f"{self!r} is closed")
        return held

    def _call(self, threads: int | None, memory_limit: int | str | None, progress: Progress) -> _Call:
        limit = self.memory_limit if memory_limit is None else memory_limit
        return _Call(self.threads if threads is None else threads, limit, progress)

    def _rows(self, x: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
        """x as the library reads it, and as it computes with it."""
        array = _numbers(x, name)
        _Call().once("pk_run_check_inputs", self._open, ctypes.byref(_view(array)), name.encode())
        return array, _reals(array, name)

    def _step(self, step: Any, last: int, what: str = "step") -> int:
        number = _whole(step, what, -(last + 1))
        if number > last:
            raise _refusal(f"{what} {number}; the run has {what}s 0 to {last}")
        return number if number >= 0 else number + last + 1

    def _steps(self, steps: Any, last: int) -> list[int]:
        if last < 0:
            raise _refusal("steps: the run has no steps")
        if isinstance(steps, str):
            words = {"final": [last], "initial": [0], "all": list(range(last + 1))}
            if steps not in words:
                raise _refusal(f"steps={steps!r}; 'final', 'initial', 'all', numbers or a slice")
            return words[steps]
        if isinstance(steps, slice):
            found = list(range(last + 1))[steps]
        else:
            found = [
                self._step(step, last)
                for step in np.atleast_1d(
                    _numbers(list(steps) if isinstance(steps, range) else steps, "steps", "iu")
                ).tolist()
            ]
        if not found:
            raise _refusal(f"steps={steps!r}: none")
        return found

    def _axes(self, keep: list[str], groups: Any) -> list[int]:
        library = _library()
        found: list[int] = []
        for text in keep:
            words = ["example" if word == "train" else word for word in str(text).split(",")]
            unknown = [word for word in words if word not in _AXES and words != ["total"]]
            if unknown:
                raise _refusal(
                    f"keep={text!r}: {', '.join(_AXES)} (with commas between to keep several axes) or total"
                )
            axes = (
                library.PK_BY_TOTAL
                if words == ["total"]
                else sum(getattr(library, _AXES[word]) for word in set(words))
            )
            if axes not in found:
                found.append(axes)
        if not found or len(found) > library.PK_KEPT:
            raise _refusal(f"keep: 1 to {library.PK_KEPT} sums can be kept")
        if groups is None and any(axes & library.PK_BY_GROUP for axes in found):
            raise _refusal("keep='group' needs groups, (N,) the number of each training example's group")
        return found

    def _average(self, call: _Call, text: str) -> Any:
        average = call.library.new("pk_average")
        call.once("pk_average_parse", _text(text, "average"), ctypes.byref(average))
        return average

    def _labels(self, rows: np.ndarray, labels: Any, average: str | None) -> np.ndarray:
        if labels is None:
            weights, held = self.weights(average=average), self._open
            labels = _evaluate(self._call(None, None, False), held.struct.graph, weights, rows).argmax(1)
        found: np.ndarray = np.require(
            _numbers(labels, "labels", "biu"), np.int64, ["C_CONTIGUOUS", "ALIGNED"]
        )
        if found.shape != (len(rows),):
            raise InputError(
                Status.SHAPE, f"labels: an array of {found.shape}; each of {len(rows)} inputs has one"
            )
        return found

    def _readout(
        self, call: _Call, function: Callable[[int, np.ndarray], Any], rows: np.ndarray, options: Any
    ) -> Any:
        """Sets a function of the outputs; returns what has to outlive the call."""
        outputs, real = self.outputs, _library().real
        number = ctypes.c_float if real == np.float32 else c_double
        if not len(rows):
            return None  # the library refuses that
        first, slopes = (np.asarray(one) for one in function(0, self(rows[:1])[0]))
        count = first.size
        if np.atleast_1d(first).ndim > 1 or np.atleast_2d(slopes).shape != (count, outputs):
            raise InputError(
                Status.SHAPE,
                f"outputs: the function gives {first.shape} numbers, and {slopes.shape} slopes instead of ({count}, {outputs})",
            )

        def readout(user: Any, row: int, f: int, h: int | None, slope: int | None) -> None:
            """Also called from the library's threads; several wait for each other."""
            places = [(h, (count,), 0), (slope, (count, outputs), 1)]
            try:
                given = np.ctypeslib.as_array((number * outputs).from_address(f)).astype(np.float64)
                results: Any = (0, 0) if call.error else function(row, given)
            except BaseException as error:  # it cannot pass through the library
                call.error = call.error or error
                results = 0, 0
            for place, shape, which in places:
                if place:
                    array = np.ctypeslib.as_array((number * math.prod(shape)).from_address(place)).reshape(
                        shape
                    )
                    try:
                        array[...] = results[which]
                    except BaseException as error:
                        call.error = call.error or error
                        array[...] = 0

        thunk = _library().callbacks["pk_decompose_options.readout.function"](readout)
        options.readout_kind, options.readout_count = _library().PK_READOUT_FUNCTION, count
        options.readout_function = ctypes.cast(thunk, c_void_p)
        return thunk

    def _kernel_outputs(self, kernel: str, outputs: str | int | None, options: Any) -> None:
        library = _library()
        if kernel not in _WITH_OUTPUTS:
            if outputs is not None:
                raise _refusal(f"outputs: the kernel {kernel} has none")
            return
        if outputs is None or isinstance(outputs, str):
            options.outputs = library.pk_kernel_outputs_find(_text(outputs or "trace", "outputs"))
            if options.outputs == library.PK_OUTPUTS_NONE:
                raise _refusal(
                    f"outputs={outputs!r}; 'trace', 'full', 'mean', 'sum', 'label' or the number of an output"
                )
        else:
            options.outputs, options.output = library.PK_OUTPUTS_ONE, self._step(
                outputs, self.outputs - 1, "output"
            )

    def _side(self, rows: Any, labels: Any, name: str) -> tuple[Any, Any]:
        """A side of a kernel, and what has to outlive it; None: the training rows."""
        if rows is None or (isinstance(rows, str) and rows == "train"):
            if labels is not None:
                raise _refusal(f"{name}_labels: the training rows have labels of their own")
            return None, None
        array = _numbers(rows, name)
        _Call().once("pk_run_check_inputs", self._open, ctypes.byref(_view(array)), name.encode())
        dataset = _library().new("pk_dataset")
        dataset.inputs = _view(array)
        targets = None
        if labels is not None:
            targets = _numbers(labels, f"{name}_labels")
            if not targets.ndim or len(targets) != len(array):
                raise InputError(
                    Status.SHAPE, f"{name}_labels: an array of {targets.shape} for {len(array)} rows"
                )
            dataset.targets = _view(targets)
        return dataset, (array, targets)


def _reopen(path: str, until: int | None, recover: bool, threads: int, memory_limit: Any) -> Run:
    return Run(path, until=until, recover=recover, threads=threads, memory_limit=memory_limit)


def _names(function: Any, first: int) -> list[str]:
    names: list[str] = []
    while len(names) < 100:
        name = function(first + len(names))
        if name is None:
            break
        names.append(name.decode())
    return names


def train(
    run: str | os.PathLike[str],
    x: Any,
    y: Any,
    *,
    network: str,
    loss: str,
    rate: Any,
    steps: int | None = None,
    epochs: int | None = None,
    optimizer: str = "sgd",
    batch: int = 0,
    shuffle: bool = True,
    seed: int = 0,
    weights: Any = None,
    clip: float = 0,
    groups: Sequence[str | tuple[str, Any]] = (),
    constants: Mapping[str, Any] | None = None,
    keep_every: int = 1,
    float32: bool = False,
    resume: bool = False,
    replace: bool = False,
    threads: int = 0,
    memory_limit: int | str | None = None,
    progress: Progress = None,
) -> Run:
    """Trains a network and records the run in the folder `run`, which is opened and returned.

    x: (N, D...), y: classes (N,), integers, or numbers (N, C), or (N,) for one output. rate: a number, (S,) the rate of each
    step, or a function of the step. groups: lines such as "1,3 weight_decay=0 rate=0.1" or "0 frozen", or such a line with rates
    of its own. weights: w_0, (P,); default: drawn from the seed, PyTorch's distributions. A run that Ctrl-C ended
    has all finished steps; resume=True goes on with it, to the bits of one that was not interrupted.

    >>> import tempfile
    >>> x = np.linspace(-1, 1, 21)[:, None]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = train(folder + "/run", x, x**2, network="input 1; dense 16; tanh; dense 1", loss="mean_squared",
    ...                 optimizer="adam", rate=lambda step: 0.05 * 0.99**step, epochs=200)
    ...     error, steps = np.abs(run(x) - x**2).mean(), run.steps
    >>> steps, bool(error < 0.05)
    (200, True)
    """
    made = Network(network, constants)
    call = _Call(threads, memory_limit, progress)
    library = call.library
    inputs, targets = _numbers(x, "x"), _numbers(y, "y")
    if not inputs.ndim or not targets.ndim or not len(inputs) or len(inputs) != len(targets):
        raise InputError(
            Status.SHAPE,
            f"x and y: arrays of {inputs.shape} and {targets.shape}; one target for each input is needed",
        )
    dims = (c_size_t * len(made.input_shape))(*made.input_shape)
    call.once("pk_array_check_rows", ctypes.byref(_view(inputs)), len(dims), dims, b"x")
    dataset = library.new("pk_dataset")
    dataset.inputs, dataset.targets = _view(inputs), _view(targets)
    call.once("pk_dataset_check", ctypes.byref(dataset), made._held.struct.input_width, made.outputs)
    criterion = _Held(call, "pk_criterion", "pk_criterion_release")
    call.once("pk_criterion_parse", _text(loss, "loss"), criterion)
    call.once("pk_criterion_check", criterion, ctypes.byref(dataset), made.outputs)
    _check_rows(call, made._held.struct, _reals(inputs, "x"))
    rule = library.new("pk_optimizer")
    call.once("pk_optimizer_parse", _text(optimizer, "optimizer"), ctypes.byref(rule))

    batch = min(_whole(batch, "batch"), len(inputs)) or len(inputs)
    if (steps is None) == (epochs is None):
        raise _refusal("train needs the number of steps or of epochs")
    count = (
        _whole(epochs, "epochs", 1) * -(-len(inputs) // batch) if steps is None else _whole(steps, "steps")
    )
    options = library.new("pk_train_options")
    options.criterion = ctypes.addressof(criterion.struct)
    options.optimizer = rule
    options.schedule, rates = _schedule(rate, count, "rate")
    keep: list[Any] = [rates]
    lines = [_text(group if isinstance(group, str) else group[0], "groups") for group in groups]
    options.groups, options.group_count = ctypes.cast((c_char_p * max(len(lines), 1))(*lines), c_void_p), len(
        lines
    )
    keep.append(lines)
    if any(not isinstance(group, str) for group in groups):
        schedules = (library.structs["pk_schedule"] * len(lines))()
        for i, group in enumerate(groups):
            schedules[i], rates = _schedule(
                rate if isinstance(group, str) else group[1], count, f"groups[{i}]"
            )
            keep.append(rates)
        keep.append(schedules)
        options.group_schedules = ctypes.addressof(schedules)
    options.steps, options.batch_size, options.shuffle_off = count, batch, int(not shuffle)
    options.seed, options.clip_norm, options.record = _whole(seed, "seed"), float(clip), _path(run)
    options.resume, options.replace, options.record_float32 = (
        int(bool(resume)),
        int(bool(replace)),
        int(bool(float32)),
    )
    options.keep_every = _whole(keep_every, "keep_every", 1)
    moving = made.initialize(seed) if weights is None else _flat(weights, made.parameters).copy()
    result = library.new("pk_train_result")
    status = call.long(
        "pk_train",
        made._held,
        ctypes.byref(dataset),
        ctypes.byref(options),
        moving.ctypes.data,
        ctypes.byref(result),
    )
    del keep
    call.check(status)
    return Run(run, threads=threads, memory_limit=memory_limit)


def _schedule(rate: Any, steps: int, name: str) -> tuple[Any, np.ndarray | None]:
    """A pk_schedule, and the rates that have to outlive it."""
    library = _library()
    schedule = library.new("pk_schedule")
    if callable(rate):
        rate = np.array([float(rate(step)) for step in range(steps)])
    rates = np.require(_numbers(rate, name), np.float64, ["C_CONTIGUOUS", "ALIGNED"])
    if rates.ndim == 0:
        schedule.kind, schedule.rate = library.PK_SCHEDULE_CONSTANT, float(rates)
        return schedule, None
    if rates.shape != (steps,):
        raise InputError(Status.SHAPE, f"{name}: an array of {rates.shape} for {steps} steps")
    if not steps:
        return schedule, None
    schedule.kind, schedule.rates, schedule.rates_count = library.PK_SCHEDULE_ARRAY, rates.ctypes.data, steps
    return schedule, rates


# ---- results

_PARTS = ("initial", "data", "decay", "inherited", "unattributed", "closure")  # which add up to final


class Decomposition:
    """The arrays of a decomposition, by the names of the program's files.

    initial, final, data (the sum over the examples), decay, unattributed, closure: (M, C), and inherited where the run began with
    an optimizer's state. by_example (M, C, N), by_step (M, C, S), by_layer (M, C, layers), by_group, by_example_step ...: what was kept;
    bounds (M, C, N), closure_by_step (M, C, S) where asked for. C: the outputs that were decomposed, one where they are
    those of labels. They are this object's own and may be written to.

    status, message: whether it closed and is explained by the run. certificate, cost: numbers. run, inputs: what was decomposed.
    """

    arrays: dict[str, np.ndarray]

    def __init__(self, arrays: dict[str, np.ndarray], status: int = Status.OK, message: str = "") -> None:
        self.arrays, self.status, self.message = arrays, Status(status), message
        self.certificate: dict[str, float] = {}
        self.cost: dict[str, float] = {}
        self.run: Run | None = None
        self.inputs: np.ndarray | None = None
        self.outputs: np.ndarray | None = None  # the numbers of the outputs, or labels; None: all

    def __getattr__(self, name: str) -> np.ndarray:
        arrays: dict[str, np.ndarray] = self.__dict__.get("arrays", {})
        if name in arrays:
            return arrays[name]
        if name.startswith("by_"):
            raise AttributeError(
                f"{name} was not kept: keep={','.join(name[3:].split('_'))!r}; there are {', '.join(arrays)}"
            )
        raise AttributeError(f"no {name}; there are {', '.join(arrays)}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.arrays]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.arrays.items())
        return f"Decomposition({shapes}{'' if self.status == Status.OK else ', ' + self.status.name})"

    @property
    def closed(self) -> bool:
        return self.status != Status.NOT_CLOSED

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """What adds up to final, (M, C) each."""
        found = {name: self.arrays[name] for name in _PARTS if name in self.arrays}
        if "data" not in found:
            name = next((name for name in self.arrays if name.startswith("by_")), None)
            if name is None:
                raise _refusal("these results have no contributions")
            array = self.arrays[name]
            found["data"] = array.sum(axis=tuple(range(2, array.ndim)))
        return found

    def residual(self) -> np.ndarray:
        """final - the sum of the parts, (M, C): rounding."""
        return self.final - sum(self.parts.values())

    def _output(self, row: int, output: int | None) -> int:
        """The output that the network decides for, where none is named."""
        return int(self.final[row].argmax()) if output is None else output

    def strongest(
        self, row: int = 0, output: int | None = None, count: int = 10, sign: int = 0, by: str = "example"
    ) -> np.ndarray:
        """An array of (example, contribution) with the largest contributions to an output of an input, strongest first.

        output: default, the one that is largest in the end. sign: 1 for those that raised it, -1 for those that lowered it.
        by: "example", "step", "layer" or "group".
        """
        values = (
            self.arrays[f"by_{by}"][row, self._output(row, output)]
            if f"by_{by}" in self.arrays
            else getattr(self, f"by_{by}")
        )
        order = np.argsort(-np.abs(values), kind="stable")
        if sign:
            order = order[np.sign(values[order]) == np.sign(sign)]
        order = order[:count]
        found = np.empty(len(order), [(by, "i8"), ("contribution", "f8")])
        found[by], found["contribution"] = order, values[order]
        return found

    def combine(self, matrix: Any) -> Decomposition:
        """The decomposition of matrix @ f, (K, C): differences of logits and other linear functions of the outputs."""
        matrix = np.atleast_2d(np.asarray(matrix, np.float64))
        arrays = {
            name: np.einsum("kc,mc...->mk...", matrix, array)
            for name, array in self.arrays.items()
            if name != "bounds"
        }
        if "bounds" in self.arrays:
            arrays["bounds"] = np.einsum("kc,mc...->mk...", np.abs(matrix), self.bounds)
        made = Decomposition(arrays, self.status, self.message)
        made.run, made.inputs, made.certificate, made.cost = (
            self.run,
            self.inputs,
            self.certificate,
            self.cost,
        )
        return made

    def save(self, folder: str | os.PathLike[str]) -> None:
        """NAME.npy for each array, as the program writes them; load reads them."""
        os.makedirs(folder, exist_ok=True)
        for name, array in self.arrays.items():
            np.save(os.path.join(folder, name + ".npy"), array)

    # ---- pandas

    def frame(self, rows: Sequence[int] | None = None, count: int = 10, by: str = "example") -> Any:
        """A pandas.DataFrame: for each input the strongest contributions to the output it decides for, with targets."""
        import pandas

        lines = []
        targets = self.run.train_targets if self.run is not None and by == "example" else None
        for row in range(len(self.final)) if rows is None else rows:
            output = self._output(row, None)
            for place, (index, value) in enumerate(self.strongest(row, output, count, 0, by).tolist()):
                line = {
                    "input": row,
                    "output": self._name(row, output),
                    "place": place,
                    by: index,
                    "contribution": value,
                }
                if targets is not None and targets.ndim == 1:
                    line["target"] = targets[index]
                lines.append(line)
        return pandas.DataFrame(lines)

    def summary(self) -> Any:
        """A pandas.DataFrame of the parts of every input and output."""
        import pandas

        rows, outputs = self.final.shape
        names = [(row, self._name(row, output)) for row in range(rows) for output in range(outputs)]
        columns = {name: part.ravel() for name, part in [*self.parts.items(), ("final", self.final)]}
        return pandas.DataFrame(columns, pandas.MultiIndex.from_tuples(names, names=["input", "output"]))

    def _name(self, row: int, output: int) -> int:
        """The network's number of an output of these results."""
        if self.outputs is None:
            return output
        return int(
            self.outputs[row if len(self.outputs) == len(self.final) and self.final.shape[1] == 1 else output]
        )

    # ---- matplotlib

    def waterfall(
        self,
        row: int = 0,
        output: int | None = None,
        count: int = 10,
        names: Sequence[str] | None = None,
        ax: Any = None,
    ) -> Any:
        """From the initial output to the final one: the strongest examples, all others together, decay and the rest.

        names: of the training examples. Returns the axes.
        """
        from matplotlib import pyplot

        ax = ax or pyplot.subplots(figsize=(7, 0.35 * count + 2))[1]
        output = self._output(row, output)
        strongest = self.strongest(row, output, count)
        others = self.by_example.shape[2] - len(strongest)
        bars = [("initial", float(self.initial[row, output]))]
        bars += [
            (names[i] if names is not None else f"example {i}", value) for i, value in strongest.tolist()
        ]
        bars.append(
            (f"{others} others", float(self.by_example[row, output].sum() - strongest["contribution"].sum()))
        )
        bars += [(name, float(part[row, output])) for name, part in self.parts.items() if name in _PARTS[2:]]
        ends = np.cumsum([value for _, value in bars])
        for place, ((name, value), end) in enumerate(zip(bars, ends)):
            ax.barh(
                place,
                value,
                left=end - value,
                color="tab:gray" if not place else "tab:blue" if value > 0 else "tab:red",
            )
            ax.annotate(
                f"{value:+.3g}",
                (max(end, end - value), place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.barh(len(bars), self.final[row, output], color="tab:gray")
        ax.set_yticks(range(len(bars) + 1), [*(str(name) for name, _ in bars), "final"])
        ax.invert_yaxis()
        ax.use_sticky_edges = False
        ax.margins(x=0.12)
        ax.set_title(f"input {row}, output {self._name(row, output)}")
        return ax

    def over_steps(
        self,
        row: int = 0,
        output: int | None = None,
        names: Sequence[str] | None = None,
        ax: Any = None,
    ) -> Any:
        """How contributions came about in the course of training, added up over the steps; keep="step".

        With keep="example,step" or "group,step" a line for each of the strongest examples, or each group. Returns the axes.
        """
        from matplotlib import pyplot

        ax = ax or pyplot.subplots(figsize=(7, 4))[1]
        output = self._output(row, output)
        detailed = next((axis for axis in ("group", "example") if f"by_{axis}_step" in self.arrays), None)
        if detailed:
            lines = self.arrays[f"by_{detailed}_step"][row, output]
            totals = lines.sum(1)
            for i in sorted(np.argsort(-np.abs(totals), kind="stable")[:10], key=lambda i: -totals[i]):
                ax.plot(np.cumsum(lines[i]), label=names[i] if names is not None else f"{detailed} {i}")
            ax.plot(np.cumsum(lines.sum(0)), "k--", label="all")
            ax.legend(fontsize=8)
        else:
            ax.plot(np.cumsum(self.by_step[row, output]), "k")
        ax.axhline(0, color="0.8", linewidth=0.8)
        ax.set_xlabel("step")
        ax.set_ylabel("contributions so far")
        ax.set_title(f"input {row}, output {self._name(row, output)}")
        return ax

    def contact_sheet(
        self,
        rows: Sequence[int] | None = None,
        count: int = 4,
        shape: tuple[int, ...] | None = None,
        images: Any = None,
        inputs: Any = None,
        labels: Any = None,
    ) -> Any:
        """A picture for each input: itself, the examples that speak most for its decision, those against it.

        images: of the training examples, default the run's inputs; inputs: those decomposed. shape: (H, W) or (H, W, 3), for rows
        that are vectors of another shape than a square. labels: of the training examples, default the run's. Returns the figure.
        """
        from matplotlib import pyplot

        if images is None or (labels is None and self.run is not None):
            if self.run is None:
                raise _refusal("contact_sheet needs images where the results do not come from a Run")
            images = self.run.train_inputs if images is None else images
            targets = self.run.train_targets
            labels = targets if labels is None and targets.ndim == 1 else labels
        inputs = self.inputs if inputs is None else inputs
        chosen = list(range(min(len(self.final), 10))) if rows is None else list(rows)
        figure, axes = pyplot.subplots(
            len(chosen), 2 * count + 1, figsize=(2 * count + 1, 1.3 * len(chosen)), squeeze=False
        )
        for line, row in zip(axes, chosen):
            output = self._output(row, None)
            shown = [(None if inputs is None else inputs[row], f"output {self._name(row, output)}")]
            for sign in (1, -1):
                found = self.strongest(row, output, count, sign).tolist()
                shown += [
                    (images[i], f"{'' if labels is None else str(labels[i]) + ': '}{value:+.2g}")
                    for i, value in found
                ]
                shown += [(None, "")] * (count - len(found))
            for ax, (image, title) in zip(line, shown):
                ax.axis("off")
                ax.set_title(title, fontsize=7)
                if image is not None:
                    ax.imshow(_image(np.asarray(image), shape), cmap="gray_r")
        figure.suptitle(f"input | {count} examples for | {count} against", fontsize=9)
        figure.tight_layout()
        return figure


def _image(row: np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """A row as a picture: (H, W), or (H, W, 3) of (3, H, W)."""
    row = row.reshape(shape) if shape else np.squeeze(row)
    if row.ndim == 1:
        side = math.isqrt(row.size)
        if side * side != row.size:
            raise InputError(
                Status.SHAPE, f"a row of {row.size} numbers is no square: give shape=(height, width)"
            )
        row = row.reshape(side, side)
    if row.ndim == 3 and row.shape[0] in (3, 4) and row.shape[2] not in (3, 4):
        row = np.moveaxis(row, 0, 2)
    return row


def _decomposition(held: _Held, status: int, message: str, inherits: bool) -> Decomposition:
    library, d = held.call.library, held.struct
    names = [name for name in ("initial", "final", *_PARTS[1:]) if name != "inherited" or inherits]
    arrays = {name: held.take(getattr(d, name), d.rows, d.outputs) for name in names}
    for tensor in d.kept[: d.kept_count]:
        axes = [axis for axis, constant in _AXES.items() if tensor.axes & getattr(library, constant)]
        if axes:
            arrays["by_" + "_".join(axes)] = held.take(tensor.data, *tensor.shape[: tensor.rank])
    if d.bounds:
        arrays["bounds"] = held.take(d.bounds, d.rows, d.outputs, d.examples)
    if d.step_closure:
        arrays["closure_by_step"] = held.take(d.step_closure, d.rows, d.outputs, d.steps)
    made = Decomposition(arrays, status, message)
    certificate = (
        "worst_closure",
        "worst_relative",
        "worst_excess",
        "worst_unattributed",
        "unattributed_limit",
        "scale",
    )
    made.certificate = {name: getattr(d, name) for name in certificate}
    made.cost = {name: getattr(d, name) for name in ("points", "pieces", "refused", "passes", "seconds")}
    return made


def _joined(parts: list[Decomposition]) -> Decomposition:
    """Results of one output each as one."""
    arrays = {name: np.concatenate([part.arrays[name] for part in parts], axis=1) for name in parts[0].arrays}
    worst = next((part for part in parts if part.status != Status.OK), parts[0])
    made = Decomposition(arrays, worst.status, worst.message)
    made.certificate = {name: max(part.certificate[name] for part in parts) for name in parts[0].certificate}
    made.cost = {name: sum(part.cost[name] for part in parts) for name in parts[0].cost}
    return made


def load(folder: str | os.PathLike[str], run: Run | str | None = None) -> Decomposition:
    """What pathkernel decompose wrote, or Decomposition.save: every array of the folder, mapped, not read.

    run: the run that was decomposed, for targets and pictures.
    """
    names = sorted(name[:-4] for name in os.listdir(folder) if name.endswith(".npy"))
    made = Decomposition(
        {name: np.load(os.path.join(folder, name + ".npy"), mmap_mode="r") for name in names}
    )
    made.run = Run(run) if isinstance(run, (str, os.PathLike)) else run
    return made
