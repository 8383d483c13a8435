"""neural-tangents (https://github.com/google/neural-tangents, Apache-2.0), torch.func and bench_kernel: the empirical NTK.

    python3 run_ntk.py [--network dense|conv8|conv28|transformer] [--rows 16,128] [--threads 1,2]
                       [--kernels full,full_own,trace,trace_own] [--program bench_kernel]
                       [--jax-python PYTHON] [--torch-python PYTHON] [--budget SECONDS]

input 3072; dense 512; relu; dense 512; relu; dense 8 (or --widths), or a network of the table below, in float64, of rows x
with other rows y (full, trace) or with themselves (full_own, trace_own: neural-tangents gets x2=None, as it advises). All
get the same weights and inputs, made with NumPy. neural-tangents runs by its three algorithms, jitted, JAX on the CPU; torch.func
by the ways of its tutorial "Neural Tangent Kernels": Jacobian contraction, and NTK-vector products, eagerly, both for
the full kernel and for the trace (its tutorial's compute='full' and 'trace'; 'diagonal' is another object).

neural-tangents divides the trace by the number of outputs, which is put back. Each kernel must agree with ours to 1e-10
of the largest entry before its time counts, else the exit status is 1. Each part is a process of its own, held to as many
CPUs as threads; compilation is not timed; the least of the calls within --budget seconds counts. Jacobians that would need
more than --memory GB are left out, and said so; torch.func's NTK-vector products, whose gradients would fill 25 GB here
for 16 x 16, take as many of them at one time as fit there (chunk_size of vmap).
"""

import argparse
import math
import os
import subprocess
import sys
import time
import types

import common

AGREE = 1e-10
JAX_WAYS = ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES")
TORCH_WAYS = ("jacobian_contraction", "ntk_vector_products")


# Networks beside the dense one: our line, the shape of a row, and the layers as the peers see them. A layer is a name of
# `functions` with the shapes of its weights, which stand in PyTorch's order.
CONV8 = (
    "input 1x8x8; conv 16 3x3 pad=1; relu; conv 16 3x3 pad=1; relu; flatten; dense 10",
    (1, 8, 8),
    [
        ("conv", (16, 1, 3, 3), (16,)),
        ("relu",),
        ("conv", (16, 16, 3, 3), (16,)),
        ("relu",),
        ("flatten",),
        ("dense", (10, 1024), (10,)),
    ],
)
CONV28 = (
    "input 1x28x28; conv 8 3x3 pad=1; relu; avg_pool 2; conv 16 3x3 pad=1; relu; avg_pool 2; flatten; dense 10",
    (1, 28, 28),
    [
        ("conv", (8, 1, 3, 3), (8,)),
        ("relu",),
        ("halve",),
        ("conv", (16, 8, 3, 3), (16,)),
        ("relu",),
        ("halve",),
        ("flatten",),
        ("dense", (10, 784), (10,)),
    ],
)
TRANSFORMER = (
    "input 16x8; dense 32; residual( layer_norm; attention 4 ); residual( layer_norm; dense 64; gelu; dense 32 ); "
    "layer_norm; mean_tokens; dense 10",
    (16, 8),
    [
        ("dense", (32, 8), (32,)),
        ("attention_block", (32,), (32,), (96, 32), (96,), (32, 32), (32,)),
        ("feed_forward_block", (32,), (32,), (64, 32), (64,), (32, 64), (32,)),
        ("layer_norm", (32,), (32,)),
        ("mean_tokens",),
        ("dense", (10, 32), (10,)),
    ],
)
NETWORKS = {"conv8": CONV8, "conv28": CONV28, "transformer": TRANSFORMER}
HEADS = 4


def settings():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", help="bench_kernel; default: build/bench or build/test")
    parser.add_argument("--jax-python", default=sys.executable, help="that has neural_tangents")
    parser.add_argument("--torch-python", default=sys.executable, help="that has torch")
    parser.add_argument("--out", default="pathkernel-out/peers/ntk", help="where inputs and kernels go")
    parser.add_argument("--network", default="dense", choices=["dense", *NETWORKS])
    parser.add_argument("--widths", default="3072,512,512,8", help="of the dense network")
    parser.add_argument("--rows", default="16,128")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--kernels", default="full,full_own,trace,trace_own")
    parser.add_argument("--ways", help="only these, such as structured_derivatives,ntk_vector_products")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of calls of one way")
    parser.add_argument("--memory", type=float, default=4.0, help="GB that Jacobians may take")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds until a way is given up")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    job = parser.parse_args()
    job.widths = [int(width) for width in job.widths.split(",")]
    job.line, job.shape, job.layers = NETWORKS.get(job.network) or dense_network(job.widths)
    shapes = [shape for _, *shapes in job.layers for shape in shapes]
    job.weights, job.outputs = sum(map(math.prod, shapes)), shapes[-1][0]
    return job


def dense_network(widths):
    layers = []
    for width, out in zip(widths, widths[1:]):
        layers += [("relu",)] if layers else []
        layers += [("dense", (out, width), (out,))]
    line = f"input {widths[0]}; dense " + "; relu; dense ".join(map(str, widths[1:]))
    return line, (widths[0],), layers


# ---- the parts, each a process of its own


def make(job):
    import numpy as np

    random, rows = np.random.default_rng(0), int(job.rows)
    weights = []
    for name, *shapes in job.layers:
        for shape in shapes:
            bound = math.prod(shapes[0][1:]) ** -0.5 if len(shapes[0]) > 1 else 0.5
            one = len(shape) == 1 and "norm" in name + "_norm" * ("block" in name) and shape is shapes[0]
            weights += [one + random.uniform(-bound, bound, math.prod(shape))]
    np.save(os.path.join(job.folder, "weights.npy"), np.concatenate(weights)[None])
    for name in ("x", "y"):
        values = random.standard_normal((rows, math.prod(job.shape)))
        np.save(os.path.join(job.folder, name + ".npy"), values)


def parameters_of(job, weights):
    """The weights of each layer, from PyTorch's vector of parameters."""
    at, layers = 0, []
    for _, *shapes in job.layers:
        layer = []
        for shape in shapes:
            layer.append(weights[at : at + math.prod(shape)].reshape(shape))
            at += math.prod(shape)
        layers.append(layer)
    return layers


def network_of(job, functions, transpose):
    """The network as a function of parameters and rows (rows, numbers), out of a library's functions."""

    def attention(x, weight, bias, out, out_bias):
        tokens, width = x.shape[-2:]
        parts = (x @ weight.T + bias).reshape(-1, tokens, 3, HEADS, width // HEADS)
        q, k, v = (transpose(parts[:, :, i], (0, 2, 1, 3)) for i in range(3))
        scores = functions["softmax"](q @ transpose(k, (0, 1, 3, 2)) / (width // HEADS) ** 0.5)
        return transpose(scores @ v, (0, 2, 1, 3)).reshape(-1, tokens, width) @ out.T + out_bias

    def layer_norm(x, gain, shift):
        mean = x.mean(-1)[..., None]
        return (x - mean) / (((x - mean) ** 2).mean(-1)[..., None] + 1e-5) ** 0.5 * gain + shift

    def feed_forward(x, a, b, c, d):
        return functions["gelu"](x @ a.T + b) @ c.T + d

    def halve(x):
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).mean(5).mean(3)

    layers = {
        "conv": lambda x, w, b: functions["conv"](x, w) + b[:, None, None],
        "dense": lambda x, w, b: x @ w.T + b,
        "relu": functions["relu"],
        "halve": halve,
        "flatten": lambda x: x.reshape(x.shape[0], -1),
        "mean_tokens": lambda x: x.mean(1),
        "layer_norm": layer_norm,
        "attention_block": lambda x, g, s, *rest: x + attention(layer_norm(x, g, s), *rest),
        "feed_forward_block": lambda x, g, s, *rest: x + feed_forward(layer_norm(x, g, s), *rest),
    }

    def network(parameters, rows):
        values = rows.reshape(rows.shape[0], *job.shape)
        for (name, *_), weights in zip(job.layers, parameters):
            values = layers[name](values, *weights)
        return values

    return network


def full(job):
    return job.kernels.startswith("full")


def rows_of(job):
    """x, and y or, where the rows are taken with themselves, None."""
    data = common.load(job.folder)
    return data["x"], None if job.kernels.endswith("_own") else data["y"], data["weights"][0]


def reply(job, kernel, scale, wait=lambda value: value):
    """Times calls of kernel(), compares with ours: (n, C, n, C) or (n, n)."""
    import resource

    import numpy as np

    found = wait(kernel())  # compiles
    ours = np.load(os.path.join(job.folder, job.kernels + ".npy"))
    found = np.asarray(found) * scale
    if full(job):
        found = found.transpose(0, 2, 1, 3)
    difference = float(np.abs(found - ours).max() / np.abs(ours).max())
    times, end = [], time.perf_counter() + job.budget
    while not times or (time.perf_counter() < end and len(times) < 50):
        start = time.perf_counter()
        wait(kernel())
        times.append(time.perf_counter() - start)
    memory = common.megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    common.reply(seconds=min(times), difference=difference, memory=memory)


def jax_part(job):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_X64"] = "1"
    # Its experimental part needs TensorFlow, and nothing here needs that part.
    sys.modules["neural_tangents.experimental"] = types.ModuleType("neural_tangents.experimental")
    try:
        import jax
        import jax.numpy as jnp
        import neural_tangents as nt
    except ImportError as error:
        return common.reply(missing=f"neural-tangents is not installed here ({error})")
    x, y, weights = rows_of(job)
    x, y = jnp.asarray(x), None if y is None else jnp.asarray(y)
    parameters = parameters_of(job, jnp.asarray(weights))
    functions = {
        "conv": lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"),
        "relu": jax.nn.relu,
        "softmax": jax.nn.softmax,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    }
    network = network_of(job, functions, jnp.transpose)
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            network,
            trace_axes=() if full(job) else (-1,),
            vmap_axes=0,
            implementation=getattr(nt.NtkImplementation, job.way),
        )
    )
    scale = 1 if full(job) else job.outputs
    return reply(job, lambda: kernel(x, y, parameters), scale, jax.block_until_ready)


def torch_part(job):
    """As in https://docs.pytorch.org/tutorials/intermediate/neural_tangent_kernels.html."""
    try:
        import torch
        from torch.func import jacrev, jvp, vjp, vmap
    except ImportError as error:
        return common.reply(missing=f"torch.func is not installed here ({error})")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    x, y, weights = rows_of(job)
    x, y = torch.tensor(x), torch.tensor(x if y is None else y)
    parameters = parameters_of(job, torch.tensor(weights))
    functions = {
        "conv": lambda x, w: torch.nn.functional.conv2d(x, w, padding=1),
        "relu": torch.relu,
        "softmax": lambda x: torch.softmax(x, -1),
        "gelu": torch.nn.functional.gelu,
    }
    whole = network_of(job, functions, torch.permute)

    def network(parameters, row):
        return whole(parameters, row.unsqueeze(0)).squeeze(0)

    def contraction():
        parts = [
            [part for layer in vmap(jacrev(network), (None, 0))(parameters, rows) for part in layer]
            for rows in (x, y)
        ]
        indices = "Naf,Mbf->NMab" if full(job) else "Naf,Maf->NM"
        return sum(torch.einsum(indices, a.flatten(2), b.flatten(2)) for a, b in zip(*parts))

    def products():
        def pair(row, other):
            def vector_product(vector):
                _, back = vjp(lambda p: network(p, row), parameters)
                return jvp(lambda p: network(p, other), (parameters,), back(vector))[1]

            unit = torch.eye(job.outputs, dtype=x.dtype)
            return vmap(vector_product)(unit)

        gradient = 3 * 8 * job.outputs * weights.size  # three at one time
        together = int(max(1, min(len(y), job.memory * 1e9 / gradient)))
        found = torch.stack([vmap(pair, (None, 0), chunk_size=together)(row, y) for row in x])
        return found if full(job) else torch.einsum("NMKK->NM", found)

    with torch.no_grad():
        return reply(job, contraction if job.way == TORCH_WAYS[0] else products, 1)


# ---- the script


def find_bench(given):
    builds = [os.path.join(common.ROOT, "build", name, "bench", "bench_kernel") for name in ("bench", "test")]
    for path in [given or os.environ.get("PATHKERNEL_BENCH_KERNEL"), *builds]:
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)
    sys.exit("bench_kernel is not found: build it, or name it by --program")


def process(command, threads, patience=None):
    """Runs a process on so many CPUs: (what it printed, None), or (None, why not)."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = dict(os.environ, **{name: str(threads) for name in names})
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    try:
        text, errors = child.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return None, f"no answer in {patience:.0f} s"
    if child.returncode:
        return None, "does not run: " + "".join((errors or text).strip().splitlines()[-1:])
    return text, None


def ours(program, job, folder, kernel, threads):
    """(least seconds, error against gradients in long double); leaves the kernel in the folder."""
    command = [program, "--network", job.line, "--data", folder, "--kind", kernel]
    text, error = process(command, threads)
    if text is None:
        sys.exit(f"{' '.join(command)}: {error}")
    rows = [row.split(",") for row in text.splitlines() if not row.startswith("#")]
    return next((float(row[3]), float(row[9])) for row in rows if row[2] == str(threads))


def own_memory(program, job, folder, kernel, threads):
    """Peak MB of the benchmark, the matrices of its peak's measurement included."""
    options = "--quick", "--network", job.line, "--data", folder, "--kind", kernel
    return common.measured([program, *options], threads)[1]


def theirs(job, python, part, way, folder, kernel, threads):
    command = [python, os.path.abspath(__file__), "--part", part, "--way", way, "--folder", folder]
    command += ["--kernels", kernel, "--network", job.network, "--widths", ",".join(map(str, job.widths))]
    command += ["--budget", str(job.budget), "--memory", str(job.memory)]
    text, error = process(command, threads, job.patience)
    return common.json.loads(text.splitlines()[-1]) if text else {"missing": error}


COLUMNS = "{:64s} {:>2s} {:>9s} {:>9s} {:>7s} {:>9s} {:>9s} {:>8s}"


def compare(job, program, rows, threads, kernel):
    """Prints a line for each way. The number of wrong results."""
    folder = os.path.join(job.out, job.network, str(rows))
    seconds, error = ours(program, job, folder, kernel, threads)
    gigabytes = 2 * rows * job.outputs * job.weights * 8 / 1e9
    ways = [("jax", job.jax_python, way) for way in JAX_WAYS]
    ways += [("torch", job.torch_python, way) for way in TORCH_WAYS]
    wrong, missing, memory = 0, set(), None
    for part, python, way in ways:
        name = (
            f"ntk {job.network} {kernel} {rows}x{rows} {'neural-tangents' if part == 'jax' else 'torch.func'} {way.lower()}"
        )
        if part in missing or (job.ways and way.lower() not in job.ways.split(",")):
            continue
        if way.lower() == TORCH_WAYS[0] and gigabytes > job.memory:
            print(f"{name}: left out, its Jacobians are {gigabytes:.0f} GB")
            continue
        answer = theirs(job, python, part, way, folder, kernel, threads)
        if "missing" in answer:
            print(f"skipped: {name}: {answer['missing']}")
            missing |= {part} if "not installed" in answer["missing"] else set()
            continue
        if not answer["difference"] <= AGREE:
            print(f"{name}: THE NUMBERS DO NOT AGREE: {answer['difference']:.1e}")
            wrong += 1
            continue
        seconds = min(seconds, ours(program, job, folder, kernel, threads)[0])
        times = f"{seconds * 1e3:.2f}", f"{answer['seconds'] * 1e3:.2f}", f"{answer['seconds'] / seconds:.2f}"
        errors = f"{error:.1e}", f"{answer['difference']:.1e}", f"{answer['memory']:.0f}"
        print(COLUMNS.format(name, str(threads), *times, *errors), flush=True)
        memory = memory or own_memory(program, job, folder, kernel, threads)
        peer = answer["seconds"], answer["memory"]
        common.row(f"{name}, {threads} thread(s)", (seconds, memory), peer, error, answer["difference"])
    return wrong


def main():
    job = settings()
    if job.part:
        return {"make": make, "jax": jax_part, "torch": torch_part}[job.part](job)
    program, wrong = find_bench(job.program), 0
    print(common.machine().replace("one thread each", "as many CPUs as threads"))
    titles = "ours, ms", "its, ms", "ratio", "our error", "apart", "its, MB"
    print(COLUMNS.format("job, peer, its way", "n", *titles), flush=True)
    for rows in map(int, job.rows.split(",")):
        folder = os.path.join(job.out, job.network, str(rows))
        os.makedirs(folder, exist_ok=True)
        command = ["--part", "make", "--folder", folder, "--rows", str(rows)]
        command += ["--network", job.network, "--widths", ",".join(map(str, job.widths))]
        for python in dict.fromkeys([sys.executable, job.torch_python, job.jax_python]):
            text, error = process([python, os.path.abspath(__file__), *command], 1)
            if text is not None:
                break
        else:
            print(f"skipped: no Python with NumPy ({error})")
            return 0
        for threads in map(int, job.threads.split(",")):
            for kernel in job.kernels.split(","):
                wrong += compare(job, program, rows, threads, kernel)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
