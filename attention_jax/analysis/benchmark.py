"""Times of mechanisms, beside PyTorch's.

Both are timed in one process, alternating, after their outputs and gradients were found equal. A
time is the mean over as many calls as take some milliseconds, after a call that is not timed, so
that neither finds the caches and threads as the other left them. The PyTorch forms lie in
`benchmarks/torch_forms.py` of the repository; where that, or PyTorch, is missing, ours are timed
alone.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from attention_jax import checks
from attention_jax.modules.registry import attention_entry, create_attention, list_attention

SHAPES = ((8, 56, 56, 64), (8, 28, 28, 256))
FORMS = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks' / 'torch_forms.py'

_TIMED = ('forward', 'forward_backward')  # what is timed of each side
# Largest difference from PyTorch, relative, in the Euclidean norm, that counts as equal.
_TOLERANCE = {'float32': 1e-3, 'bfloat16': 0.1}
# Cores that others may use meanwhile. PyTorch's threads wait for each other actively: where one of
# them is not scheduled, a call takes milliseconds that it would not take alone.
_OTHERS = 0.2
_SECONDS = 0.02  # that the calls of one sample take at the least


def measure(
    names: Sequence[str] = (),
    *,
    shapes: Sequence[Sequence[int]] = SHAPES,
    repeats: int = 10,
    dtype: str = 'float32',
    threads: int | None = None,
    channels_last: bool = False,
) -> Iterator[dict[str, Any]]:
    """Times mechanisms; yields what they run on, then a row as soon as it is measured.

    Forward is in evaluation mode; forward + backward in training mode, with gradients by input and
    parameters and the new statistics; dropout is off.

    Args:
        names: registry names, or 'NAME/VARIANT'; none is every mechanism, and the variants that
            timm has.
        shapes: of the inputs, `[b, h, w, c]`.
        repeats: number of samples of each time.
        dtype: 'float32' or 'bfloat16', of the input; ours keeps its parameters in float32.
        threads: number of CPU cores and threads that both use (Linux); None is all. It must be said
            before JAX runs anything in this process.
        channels_last: has PyTorch's maps in that layout.

    Yields:
        First the result of `environment`. Then for each mechanism and shape a dict of JSON types:
        `name`, `shape`, `dtype`, `arguments`; `ours` and `torch` (None where there is none), with
        `forward` and `forward_backward`: `median`, `low`, `high` (quartiles) in milliseconds, and
        `calls` a sample; `ours` with `compile_seconds`, `torch` with `source` and `difference` from
        ours; `ratio`, our median over PyTorch's (None where there is none, where the two are not
        equal, or where the machine was busy); `others`, the number of cores that other processes
        kept busy meanwhile (None where the system does not tell); and `note`.

    Raises:
        ValueError: an unknown name, a shape that is not one, or another bad argument.
    """
    checks.choice('dtype', dtype, tuple(_TOLERANCE))
    checks.at_least('repeats', repeats, 1)
    for shape in shapes:
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f'shape {"x".join(map(str, shape))} must be four numbers: 8x56x56x64')
    for name in names:
        variant(name)
    with _limited(threads):
        machine = environment()
        yield machine
        forms = None if machine['alone'] else load_forms()
        if not names:
            names = list_attention()
            names = forms.names(names) if forms else names
        layout = {'threads': threads, 'channels_last': channels_last}
        for name in names:
            for shape in shapes:
                yield _row(name, tuple(shape), forms, repeats, dtype, layout)


def variant(name: str) -> tuple[str, dict[str, Any]]:
    """Splits 'NAME/VARIANT' into the registry name and the variant's arguments.

    Raises:
        ValueError: there is no such mechanism, or it has no such variant.
    """
    mechanism, _, which = name.partition('/')
    variants = {'': {}, **attention_entry(mechanism).variants}
    checks.choice(f'variant of {mechanism}', which, list(variants))
    return mechanism, dict(variants[which])


def load_forms() -> Any:
    """The module of PyTorch forms, by its path: it is no part of the package."""
    spec = importlib.util.spec_from_file_location('torch_forms', FORMS)
    module = sys.modules['torch_forms'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, Any]:
    """The machine, versions and load, and `alone`: why nothing is timed beside PyTorch, or ''."""
    packages = ('jax', 'jaxlib', 'flax', 'numpy', 'torch', 'timm')
    alone = ''
    if importlib.util.find_spec('torch') is None:
        alone = "PyTorch is not installed: pip install 'attention_jax[parity]'"
    elif not FORMS.is_file():
        alone = f'the PyTorch forms are not here: {FORMS}'
    elif jax.default_backend() != 'cpu':
        alone = f'PyTorch is only timed on a CPU, and JAX runs on {jax.default_backend()}'
    return {
        'cpu': _cpu(),
        'cores': len(os.sched_getaffinity(0)) if _has_affinity() else os.cpu_count(),
        'device': jax.devices()[0].device_kind,
        'system': platform.platform(),
        'python': platform.python_version(),
        'versions': {
            name: importlib.metadata.version(name)
            for name in packages
            if importlib.util.find_spec(name)
        },
        'load': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'alone': alone,
    }


def quartiles(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of samples."""
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return {'median': float(median), 'low': float(low), 'high': float(high)}


# One row.


def _row(
    name: str,
    shape: tuple[int, ...],
    forms: Any | None,
    repeats: int,
    dtype: str,
    layout: Mapping[str, Any],
) -> dict[str, Any]:
    mechanism, chosen = variant(name)
    entry = attention_entry(mechanism)
    needed = dict(entry.example(shape))
    if getattr(entry.cls, 'dropout_rate', 0.0):  # the field's default
        needed['dropout_rate'] = 0.0
    arguments = {**chosen, **needed}
    row = {'name': name, 'shape': list(shape), 'dtype': dtype, 'arguments': arguments}
    row |= {'ours': None, 'torch': None, 'ratio': None, 'others': None, 'note': ''}
    module = create_attention(mechanism, **arguments)
    xs = tuple(_example(f'x{i}', shape) for i in range(entry.maps))
    try:
        variables = _random_variables(module, xs)
    except ValueError as error:  # what the mechanism says of this shape
        return {**row, 'note': str(error)}

    ours = _Ours(module, variables, [jnp.asarray(x, dtype) for x in xs])
    sides, facts, notes = {'ours': ours}, {'ours': {'compile_seconds': ours.compile_seconds}}, []
    if forms:
        cotangents = [np.asarray(g, np.float32) for g in ours.cotangents]
        torch = forms.create(name, variables, xs, cotangents, needed, dtype=dtype, **layout)
        if torch:
            difference = _difference(ours.values(), torch.values())
            if not difference <= _TOLERANCE[dtype]:
                notes.append(f'differs from PyTorch by {difference:.1e}')
            sides['torch'] = torch
            facts['torch'] = {'source': torch.source, 'difference': difference}
    others_kept_busy = _watch()
    calls = {(side, what): getattr(sides[side], what) for what in _TIMED for side in sides}
    times = _alternate(calls, repeats)
    row['others'] = others_kept_busy()
    if row['others'] is not None and row['others'] > _OTHERS:
        notes.append(f'other processes used {row["others"]:.1f} cores')
    for side in sides:
        row[side] = {what: times[side, what] for what in _TIMED} | facts[side]
    if 'torch' in sides and not notes:
        row['ratio'] = {
            what: row['ours'][what]['median'] / row['torch'][what]['median'] for what in _TIMED
        }
    return {**row, 'note': '; '.join(notes)}


class _Ours:
    """A mechanism compiled, ready to be timed; like `Form` of the PyTorch forms."""

    def __init__(
        self, module: nn.Module, variables: Mapping[str, Any], xs: Sequence[jax.Array]
    ) -> None:
        params = jax.tree.map(jnp.asarray, variables.get('params', {}))
        rest = {k: jax.tree.map(jnp.asarray, v) for k, v in variables.items() if k != 'params'}

        def forward(params: Any, rest: Any, xs: Any) -> Any:
            return module.apply({'params': params, **rest}, *xs)

        def forward_backward(params: Any, rest: Any, xs: Any, cotangent: Any) -> Any:
            def run(params: Any, xs: Any) -> Any:
                variables = {'params': params, **rest}
                return module.apply(variables, *xs, train=True, mutable=list(rest))

            out, pullback, changed = jax.vjp(run, params, xs, has_aux=True)
            return out, changed, pullback(cotangent)

        xs = tuple(xs)
        leaves, structure = jax.tree.flatten(jax.eval_shape(forward, params, rest, xs))
        self.cotangents = [
            jnp.asarray(_array(f'g{i}', leaf.shape), leaf.dtype) for i, leaf in enumerate(leaves)
        ]
        cotangent = structure.unflatten(self.cotangents)
        started = time.perf_counter()
        run = jax.jit(forward).lower(params, rest, xs).compile()
        run_back = jax.jit(forward_backward).lower(params, rest, xs, cotangent).compile()
        self.compile_seconds = time.perf_counter() - started
        self.forward = lambda: jax.block_until_ready(run(params, rest, xs))
        self.forward_backward = lambda: jax.block_until_ready(run_back(params, rest, xs, cotangent))

    def values(self) -> list[list[np.ndarray]]:
        """Outputs in evaluation mode, outputs in training mode, gradients by the inputs."""
        out, _, (_, by_x) = self.forward_backward()
        return [
            [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]
            for tree in (self.forward(), out, by_x)
        ]


def _difference(ours: Sequence[Sequence[Any]], theirs: Sequence[Sequence[Any]]) -> float:
    """Largest difference of an array, relative, in the Euclidean norm.

    The largest entry would not do: where a ReLU's input is zero up to rounding, the two sides may
    take either slope.
    """
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            if a.shape != b.shape:
                raise AssertionError(f'shapes {a.shape} and {b.shape} of ours and of PyTorch')
            worst = max(worst, float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)))
    return worst


def _alternate(
    calls: Mapping[Any, Callable[[], Any]], repeats: int
) -> dict[Any, dict[str, float | int]]:
    """Times functions in turn, `repeats` times each; milliseconds a call."""
    numbers = {}
    for key, call in calls.items():
        call()
        numbers[key] = max(1, math.ceil(_SECONDS / max(_timed(call, 1), 1e-6)))
    samples = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            call()
            samples[key].append(1e3 * _timed(call, numbers[key]))
    return {key: {**quartiles(samples[key]), 'calls': numbers[key]} for key in calls}


def _timed(call: Callable[[], Any], number: int) -> float:
    """Seconds a call, of `number` calls."""
    started = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - started) / number


def _array(what: str, shape: Sequence[int]) -> np.ndarray:
    """Normal numbers, the same for the same name."""
    random = np.random.default_rng(zlib.crc32(what.encode()))
    return random.standard_normal(shape, np.float32)


def _example(what: str, shape: Sequence[int]) -> np.ndarray:
    """A map whose means differ between the examples, as those of images do.

    Norms of pooled vectors would else divide by hardly more than rounding errors.
    """
    return _array(what, shape) + _array(f'{what}/mean', (shape[0], 1, 1, shape[-1]))


def _random_variables(module: nn.Module, xs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Variables with every entry random: fresh ones have zeros that hide a difference."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *xs)
    found = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items():
        value = _array(path, leaf.shape)
        if path.endswith('/var'):
            value = 0.5 + value**2
        elif path.endswith('/scale'):
            value = 1 + 0.3 * value
        elif len(leaf.shape) > 1:
            value = value / math.sqrt(math.prod(leaf.shape[:-1]))
        found[path] = value.astype(leaf.dtype)
    return traverse_util.unflatten_dict(found, sep='/')


# The machine.


@contextlib.contextmanager
def _limited(threads: int | None) -> Iterator[None]:
    """Keeps what is started inside to some cores: JAX has no number of threads to set."""
    if threads is None:
        yield
        return
    if not _has_affinity():
        raise ValueError('threads can only be set on Linux')
    cores = os.sched_getaffinity(0)
    if not 1 <= threads <= len(cores):
        raise ValueError(f'threads must be from 1 to {len(cores)}, the cores here, got {threads}')
    os.sched_setaffinity(0, sorted(cores)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _has_affinity() -> bool:
    return hasattr(os, 'sched_setaffinity')


def _watch() -> Callable[[], float | None]:
    """A function that says how many cores other processes kept busy since now, on average."""
    started, busy, own = time.perf_counter(), _busy(), time.process_time()

    def others() -> float | None:
        if busy is None:
            return None
        seconds = _busy() - busy - (time.process_time() - own)
        # The kernel counts in hundredths of a second.
        return round(max(seconds - 0.02, 0) / (time.perf_counter() - started), 2)

    return others


def _busy() -> float | None:
    """Seconds that all cores worked since the machine started, or the host kept them from it."""
    path = pathlib.Path('/proc/stat')
    if not path.is_file():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, path.read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf('SC_CLK_TCK')


def _cpu() -> str:
    """The processor's name where the system tells it."""
    path = pathlib.Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
