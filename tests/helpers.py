"""What the tests of mechanisms share: random variables, and a comparison with a plain reading."""

import ast
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from attention_jax.functional import cost

REFERENCE = pathlib.Path(__file__).parent / 'reference'


def array(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    """Normal numbers of a fixed seed."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def shapes(batch: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> shape and type of a batch's arrays."""
    return {name: (x.shape, x.dtype) for name, x in batch.items()}


def random_variables(module: nn.Module, *inputs: Any, dtype: Any = np.float64) -> dict[str, Any]:
    """Variables with every entry random, so that nothing hides behind a zero or a one."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep='/').items():
        value = array(leaf.shape, zlib.crc32(path.encode()))
        if path.endswith('/var'):
            value = 0.5 + value**2
        elif path.endswith('/scale'):
            value = 1 + 0.3 * value
        elif len(leaf.shape) > 1:
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        flat[path] = value.astype(dtype)
    return traverse_util.unflatten_dict(flat, sep='/')


def generator(name: str, seed: int = 0) -> np.random.RandomState:
    """Random numbers that follow from a name: of a network's parameter, its input, a cotangent."""
    return np.random.RandomState(zlib.crc32(f'{seed}/{name}'.encode()))


def drawn(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A parameter or statistic from its PyTorch name alone, as the stored values were made."""
    r, last = generator(name, seed), name.rpartition('.')[2]
    if last == 'running_mean':
        return 0.1 * r.standard_normal(shape)
    if last == 'running_var':
        return 0.5 + r.random_sample(shape)
    if len(shape) >= 2:
        return r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    if last == 'weight':
        return 0.5 + r.random_sample(shape)
    return 0.1 * r.standard_normal(shape)


def counted(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Parameters, multiply-adds, and those of products between activations, of one call."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with cost.tally() as counts:
        variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables.get('params', {})))
    return parameters, counts['macs'], counts['matmul']


def called(module: nn.Module, shape: tuple[int, ...]) -> set[str]:
    """Paths of the modules that a call on a map goes through, those without arrays too."""
    paths = set()

    def note(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        paths.add('/'.join(context.module.path))
        return method(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return paths


def inner(out: Any, cotangent: Any) -> Any:
    """sum(output * cotangent), over all outputs of a module that has several."""
    return sum((o * g).sum() for o, g in zip(*map(jax.tree.leaves, (out, cotangent)), strict=True))


def value_and_gradients(
    module: nn.Module,
    variables: dict[str, Any],
    inputs: tuple[Any, ...],
    cotangent: Any,
    train: bool,
) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """Output, changed collections, gradients of sum(output * cotangent): by parameters, inputs."""
    params = variables.get('params', {})
    rest = {k: v for k, v in variables.items() if k != 'params'}

    @jax.jit
    def run(params: Any, rest: Any, inputs: Any) -> Any:
        def loss(params: Any, inputs: Any) -> Any:
            out, changed = module.apply(
                {'params': params, **rest}, *inputs, train=train, mutable=list(rest)
            )
            return inner(out, cotangent), (out, changed)

        (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, inputs)
        return *aux, *grads

    out, changed, by_params, by_inputs = run(params, rest, inputs)
    return out, changed, by_params, by_inputs


def assert_close(got: Any, want: Any, tolerance: float = 1e-9, what: str = '') -> None:
    """Equal up to `tolerance`, relative to the largest entry or 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f'{what}: shape {got.shape}, expected {want.shape}'
    scale = max(1.0, np.abs(want).max(initial=0.0))
    error = np.abs(got - want).max(initial=0.0) / scale
    assert error <= tolerance, f'{what}: error {error:.1e} is above {tolerance:.0e}'


def check(
    module: nn.Module,
    reading: Callable[..., Any],
    *inputs: np.ndarray,
    train: bool = False,
    tolerance: float = 1e-9,
) -> None:
    """Compares a module in float64 with a plain reading of its equation.

    Args:
        module: the module.
        reading: `reading(xp, variables, *inputs)`, written with the array module `xp`: NumPy gives
            the values, jax.numpy the gradients of the naive form.
        *inputs: float64 arrays.
        train: mode of the module; the reading must do the same.
        tolerance: relative to the largest entry.
    """
    variables = random_variables(module, *inputs)
    want = reading(np, variables, *inputs)
    leaves, structure = jax.tree.flatten(want)
    cotangent = structure.unflatten(array(leaf.shape, 99 + i) for i, leaf in enumerate(leaves))
    out, _, by_params, by_inputs = value_and_gradients(module, variables, inputs, cotangent, train)
    jax.tree.map(lambda o, w: assert_close(o, w, tolerance, 'output'), out, want)

    def loss(params: Any, inputs: Any) -> Any:
        return inner(reading(jnp, {**variables, 'params': params}, *inputs), cotangent)

    naive = jax.jit(jax.grad(loss, argnums=(0, 1)))
    want_params, want_inputs = naive(jax.tree.map(jnp.asarray, variables.get('params', {})), inputs)
    for got, expected, what in ((by_params, want_params, 'params'), (by_inputs, want_inputs, 'x')):
        jax.tree.map(
            lambda g, e, w=what: assert_close(g, e, tolerance, f'gradient {w}'), got, expected
        )


def sigmoid(xp: Any, x: Any) -> Any:
    """The logistic function, by its definition."""
    return 1 / (1 + xp.exp(-x))


def normalize(
    xp: Any,
    variables: dict[str, Any],
    path: tuple[str, ...],
    x: Any,
    train: bool,
    eps: float = 1e-5,
) -> Any:
    """Batch normalisation over all axes but the last, by its definition."""
    params, stats = variables['params'], variables['batch_stats']
    for key in path:
        params, stats = params[key], stats[key]
    rows = x.reshape(-1, x.shape[-1])
    mean, var = (rows.mean(0), rows.var(0)) if train else (stats['mean'], stats['var'])
    rows = (rows - mean[None]) / xp.sqrt(var + eps)[None] * params['scale'][None]
    return (rows + params['bias'][None]).reshape(x.shape)


def convolve(
    xp: Any, x: Any, kernel: Any, *, strides: int = 1, dilation: int = 1, groups: int = 1
) -> Any:
    """Convolution of `[b, h, w, c]` with half a window of padding, by gathering every window."""
    window, outputs = kernel.shape[:2], kernel.shape[-1]
    places = []
    for n, k in zip(x.shape[1:3], window, strict=True):
        count = (n + (k - 1) // 2 * 2 * dilation - dilation * (k - 1) - 1) // strides + 1
        places.append(np.arange(count)[:, None] * strides + np.arange(k) * dilation)
    pads = [((k - 1) // 2 * dilation,) * 2 for k in window]
    x = xp.pad(x, ((0, 0), *pads, (0, 0)))
    windows = x[:, places[0]][:, :, :, places[1]]  # [b, h', kh, w', kw, c]
    windows = windows.reshape(*windows.shape[:-1], groups, -1)
    kernel = kernel.reshape(*kernel.shape[:-1], groups, outputs // groups)
    y = xp.einsum('bpaqcgi,acigo->bpqgo', windows, kernel)
    return y.reshape(*y.shape[:3], outputs)


def contracts(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Mechanism -> what is expected of it: the literal `CONTRACT` of each test file in `folder`."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob('*_test.py')):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'CONTRACT':
                found |= ast.literal_eval(node.value)
    return found


def reference_cases(name: str = '*', folder: pathlib.Path = REFERENCE) -> list[pathlib.Path]:
    """The stored cases of authors' outputs and gradients, sorted."""
    return sorted(p for p in folder.glob(f'{name}/*.npz') if p.parent.name != 'networks')


def load_case(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a case's description (its `arguments` as our constructors take them) and arrays."""
    arrays = dict(np.load(path))
    meta = json.loads(str(arrays.pop('meta')))

    def revive(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(revive(v) for v in value)
        return float('inf') if value == 'inf' else value

    meta['arguments'] = {k: revive(v) for k, v in meta['arguments'].items()}
    return meta, arrays


def prefixed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def inputs_of(arrays: dict[str, np.ndarray], stem: str = 'input') -> Iterator[np.ndarray]:
    """`input`, `input2`, ... in order, or what else is numbered so."""
    yield arrays[stem]
    number = 2
    while f'{stem}{number}' in arrays:
        yield arrays[f'{stem}{number}']
        number += 1
