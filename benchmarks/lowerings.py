"""What each lowering of `functional/` gains of a network's training step on a CPU.

    python benchmarks/lowerings.py step --json FILE                (all networks)
    python benchmarks/lowerings.py step resnet50 --json FILE
    python benchmarks/lowerings.py convolutions cifar_resnet20 --json FILE

`step`: each special form is replaced by a plain one, alone, and the network takes training steps in
turn with each of them, and in PyTorch where it has the network: float32, SGD with momentum, random
images, on an idle machine. `convolutions`: the forward pass, and the gradients by x and by the
kernel, of each convolution of a network, beside XLA's own form and PyTorch's. Both run in a process
of their own for each of `SETTINGS`; what FILE already has of this JAX is not measured again. With
`--repeats 0` all is only compiled, into `JAX_COMPILATION_CACHE_DIR`.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import networks
from jax import lax

from attention_jax.analysis import benchmark
from attention_jax.functional import conv, conv_forms, normalization, pooling
from attention_jax.functional.broadcast import expand_to
from attention_jax.modules import layers

Patch = Callable[[Any, str, Any], None]
SETTINGS = {'': '', 'no_ynn': '--xla_cpu_experimental_ynn_fusion_type=-individual_convolution'}
SLOW = 8.0  # seconds a step from which one is enough
conv_file = sys.modules[conv.__module__]


# The plain forms. Each takes a function that replaces a name of a module.


def rows(patch: Patch) -> None:
    """The gradient by the kernel in one piece."""

    def whole(x: Any, kernel: Any, strides: Any, pads: Any, dilation: Any) -> Any:
        return conv_forms.plain(x, kernel, strides=strides, pads=pads, dilation=dilation)

    patch(conv_forms, '_each_block', whole)


def phases(patch: Patch) -> None:
    """The gradient by x of a strided convolution as XLA has it."""
    patch(conv_forms, 'phases', functools.partial(conv_forms.plain, dilation=(1, 1)))


def rows_and_phases(patch: Patch) -> None:
    """XLA's own gradients of convolutions wider than 1x1."""
    patch(conv_forms, '_row_blocks', lambda x, k, s, p, d: _plain(x, k, s, p, d))


def flat(patch: Patch) -> None:
    """1x1 convolutions, and dense layers on maps, as convolutions."""
    _no_flat_dense(patch)
    patch(conv_forms, '_pointwise', lambda x, k, strides: _plain(x, k, strides, ((0, 0),) * 2))


def dense(patch: Patch) -> None:
    """All convolutions without groups as XLA has them."""
    _no_flat_dense(patch)
    patch(conv_forms, 'cpu_dense', conv_forms.plain)


def merged(patch: Patch) -> None:
    """Grouped convolutions as XLA has them."""
    _as_plain(patch, lambda x, kernel, groups: groups > 1 and kernel.shape[-2] > 1)


def merged_128(patch: Patch) -> None:
    """Groups merged to 128 channels, as on a TPU."""
    patch(conv_file, '_CPU_CHANNELS', 128)
    patch(conv_file, '_MOST_DENSE', 0)


def merged_plain(patch: Patch) -> None:
    """Merged groups as XLA's own convolutions."""
    old = conv_forms.merged

    def form(*args: Any, dense: Any, **kwargs: Any) -> Any:
        return old(*args, dense=conv_forms.plain, **kwargs)

    patch(conv_forms, 'merged', form)


def shifts(patch: Patch) -> None:
    """Depthwise convolutions as XLA has them."""
    _as_plain(patch, lambda x, kernel, groups: groups > 1 and kernel.shape[-2] == 1)


def shifts_rows(patch: Patch) -> None:
    """Depthwise convolutions as shifts whose gradient is autodiff's."""
    patch(
        conv_forms, '_unit_shifts', lambda x, k, p, d: conv_forms._shifted_sum(x, k, (1, 1), p, d)
    )


def shifts_merged(patch: Patch) -> None:
    """Depthwise convolutions as merged groups."""
    patch(conv_file, '_MOST_SHIFTS', 0)
    old = conv_file._lower

    def form(x: Any, kernel: Any, strides: Any, pads: Any, dilation: Any, groups: int) -> Any:
        if groups == 1 or kernel.shape[-2] > 1:
            return old(x, kernel, strides, pads, dilation, groups)
        settings = {'strides': strides, 'pads': pads, 'dilation': dilation, 'groups': groups}
        return conv_forms.merged(x, kernel, **settings, width=16, dense=conv_forms.cpu_dense)

    patch(conv_file, '_lower', form)


def toeplitz(patch: Patch) -> None:
    """Planes of two channels as convolutions."""
    patch(conv_forms, 'toeplitz', lambda x, k, p, d: _plain(x, k, (1, 1), p, d))


def max_slices(patch: Patch) -> None:
    """Maximum pools by reduce_window."""
    patch(pooling, '_max_of_slices', pooling._window_max)
    patch(pooling, '_max_by_axis', pooling._window_max)


def avg_slices(patch: Patch) -> None:
    """Average pools by reduce_window."""
    patch(pooling, '_sum_of_slices', pooling._window_sum)


def mean_and_max(patch: Patch) -> None:
    """The mean and the maximum each on its own, with autodiff's derivatives."""

    def form(x: Any, axes: Any) -> Any:
        wide = pooling.statistics_type(x.dtype)
        return jnp.mean(x, axes, dtype=wide), jnp.max(x, axes).astype(wide)

    patch(pooling, '_mean_and_max', form)


def norm_derivatives(patch: Patch) -> None:
    """Batch normalisation in two passes with autodiff's derivatives."""

    def two(x: Any, scale: Any, bias: Any, epsilon: float) -> Any:
        axes = tuple(range(x.ndim - 1))
        mean = x.mean(axes)
        var = jnp.square(x - expand_to(mean, x)).mean(axes)
        return normalization.normalize(x, mean, var, scale, bias, epsilon), mean, var

    patch(normalization, '_two_passes', two)


def norm(patch: Patch) -> None:
    """Batch normalisation in one pass with autodiff's derivatives, as on accelerators."""

    def form(x: Any, scale: Any, bias: Any, *, shift: Any, epsilon: float) -> Any:
        return normalization._one_pass(x, scale, bias, lax.stop_gradient(shift), epsilon)

    patch(layers, 'batch_norm', form)


def _plain(x: Any, kernel: Any, strides: Any, pads: Any, dilation: Any = None) -> Any:
    dilation = dilation or (1,) * len(strides)
    return conv_forms.plain(x, kernel, strides=strides, pads=pads, dilation=dilation)


def _no_flat_dense(patch: Patch) -> None:
    old = conv_forms.flat_product
    patch(
        conv_forms,
        'flat_product',
        lambda x, kernel: conv_forms.map_product(x, kernel) if x.ndim == 4 else old(x, kernel),
    )


def _as_plain(patch: Patch, when: Callable[[Any, Any, int], bool]) -> None:
    old = conv_file._lower

    def form(x: Any, kernel: Any, strides: Any, pads: Any, dilation: Any, groups: int) -> Any:
        if not when(x, kernel, groups):
            return old(x, kernel, strides, pads, dilation, groups)
        settings = {'strides': strides, 'pads': pads, 'dilation': dilation, 'groups': groups}
        return conv_forms.plain(x, kernel, **settings)

    patch(conv_file, '_lower', form)


# Network -> images a batch, their size, and the forms that it is tried without.
NETWORKS = {
    'resnet50': (8, 224, (rows_and_phases, dense, max_slices, norm_derivatives)),
    'cifar_resnet20': (128, 32, (rows, rows_and_phases, dense, norm_derivatives, norm)),
    'yolov4_tiny_voc_phi0': (4, 416, (rows, rows_and_phases, flat, max_slices, norm_derivatives)),
    'mobilenetv2_100': (8, 224, (shifts_rows, shifts_merged, flat, norm_derivatives, shifts)),
    'resnext50_32x4d': (4, 224, (merged_128, merged_plain, merged)),
    'cbam_resnet18': (8, 224, (toeplitz, mean_and_max, rows_and_phases)),
    'resnest50': (4, 224, (avg_slices, max_slices)),
}
# What the second of SETTINGS can change.
CONVOLUTIONS = (rows, rows_and_phases, flat, dense, merged_plain)


@contextlib.contextmanager
def patched(form: Callable[[Patch], None] | None) -> Iterator[None]:
    """Puts a plain form in place of a special one."""
    undo = []

    def patch(module: Any, name: str, value: Any) -> None:
        undo.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    if form is not None:
        form(patch)
    jax.clear_caches()
    try:
        yield
    finally:
        for entry in reversed(undo):
            setattr(*entry)


def measure_step(name: str, repeats: int) -> dict[str, Any]:
    """Seconds a training step: as it is, without each form, and PyTorch's, in turn."""
    batch, size, forms = NETWORKS[name]
    if SETTINGS['no_ynn'] in os.environ.get('XLA_FLAGS', ''):
        forms = [form for form in forms if form in CONVOLUTIONS]
    state, data = networks.first(name, batch, size)
    kept, runs = [state], {}

    def step(compiled: Any) -> None:
        kept[0], measured = compiled(kept[0], data)
        jax.block_until_ready((kept[0].params, measured))

    for form in (None, *forms):
        with patched(form):
            program = networks.build(name, batch, size).train_step
            compiled = program.lower(kept[0], data).compile()
            runs[form.__name__ if form else 'now'] = functools.partial(step, compiled)
    if repeats:
        with contextlib.suppress(KeyError, ImportError):
            runs['torch'] = networks.theirs(name, batch, size)
    row = alternate(runs, repeats, calls=1)
    now = row['median'].get('now', 0)
    gain = {key: round(time / now - 1, 3) for key, time in row['median'].items()}
    return {'batch': batch, 'size': size, **row, 'gain': gain}


def alternate(runs: dict[str, Callable[[], Any]], repeats: int, calls: int) -> dict[str, Any]:
    """Seconds a call of each, in turn: median and lowest; `cpu`, of all cores; `others`' cores."""
    wall: dict[str, list[float]] = {key: [] for key in runs}
    work: dict[str, list[float]] = {key: [] for key in runs}
    others = benchmark._watch()
    for _ in range(repeats):
        for key, run in runs.items():
            if max(wall[key], default=0) > SLOW:
                continue
            if not wall[key] or key.startswith(('now', 'torch')):
                run()  # the caches and threads as this side leaves them
            started, worked = time.perf_counter(), time.process_time()
            for _ in range(calls):
                run()
            wall[key].append((time.perf_counter() - started) / calls)
            work[key].append((time.process_time() - worked) / calls)
    return {
        'others': others() if repeats else None,
        'median': {key: round(statistics.median(t), 5) for key, t in wall.items() if t},
        'lowest': {key: round(min(t), 5) for key, t in wall.items() if t},
        'cpu': {key: round(statistics.median(t), 5) for key, t in work.items() if t},
    }


def convolutions(name: str) -> collections.Counter[tuple[Any, ...]]:
    """Shapes and settings of a network's convolutions without groups, and how many there are."""
    batch, size, _ = NETWORKS[name]
    found: collections.Counter[tuple[Any, ...]] = collections.Counter()

    def note(patch: Patch) -> None:
        old = conv_forms.cpu_dense

        def form(x: Any, kernel: Any, **settings: Any) -> Any:
            if x.shape[0] == batch:  # not the example of one that makes the variables
                found[x.shape, kernel.shape, settings['strides'], settings['pads']] += 1
            return old(x, kernel, **settings)

        patch(conv_forms, 'cpu_dense', form)

    with patched(note):
        program = networks.build(name, batch, size)
        program.train_step.lower(program.state, program.batch)
    return found


def measure_convolutions(name: str, repeats: int) -> dict[str, Any]:
    """Milliseconds of each convolution of a network: ours, XLA's own, PyTorch's."""
    rows = []
    for (x_shape, kernel_shape, strides, pads), count in convolutions(name).items():
        settings = {'strides': strides, 'pads': pads, 'dilation': (1, 1)}
        out = conv_forms.output_sizes(x_shape[1:3], kernel_shape[:2], strides, pads, (1, 1))
        shapes = x_shape, kernel_shape, (x_shape[0], *out, kernel_shape[-1])
        x, kernel, g = (
            jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)
        )
        calls = {}
        for side, form in (('now', conv_forms.cpu_dense), ('plain', conv_forms.plain)):
            form = functools.partial(form, **settings)
            for what, function in {
                'forward': lambda x, kernel, g, f=form: f(x, kernel),
                'by x': lambda x, kernel, g, f=form: jax.vjp(lambda x: f(x, kernel), x)[1](g)[0],
                'by kernel': lambda x, kernel, g, f=form: jax.vjp(
                    lambda kernel: f(x, kernel), kernel
                )[1](g)[0],
            }.items():
                compiled = jax.jit(function).lower(x, kernel, g).compile()
                calls[f'{side} {what}'] = functools.partial(_call, compiled, x, kernel, g)
        if repeats:
            with contextlib.suppress(ImportError):
                calls |= _torch_convolution(x, kernel, g, strides, pads)
        row = {'x': x_shape, 'kernel': kernel_shape, 'strides': strides, 'count': count}
        rows.append({**row, **alternate(calls, repeats, calls=3)})
    return {'batch': NETWORKS[name][0], 'convolutions': rows}


def _call(compiled: Any, *arrays: jax.Array) -> None:
    jax.block_until_ready(compiled(*arrays))


def _torch_convolution(
    x: Any, kernel: Any, g: Any, strides: Sequence[int], pads: Sequence[Sequence[int]]
) -> dict[str, Callable[[], Any]]:
    import numpy as np
    import torch

    def tensor(array: Any, axes: Sequence[int]) -> torch.Tensor:
        made = torch.from_numpy(np.array(array).transpose(axes))
        return made.contiguous(memory_format=torch.channels_last)

    x, g, kernel = tensor(x, (0, 3, 1, 2)), tensor(g, (0, 3, 1, 2)), tensor(kernel, (3, 2, 0, 1))
    padding = [low for low, _ in pads]

    def backward(mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            g, x, kernel, None, strides, padding, [1, 1], False, [0, 0], 1, mask
        )

    return {
        'torch forward': lambda: torch.nn.functional.conv2d(x, kernel, None, strides, padding),
        'torch by x': lambda: backward([True, False, False]),
        'torch by kernel': lambda: backward([False, True, False]),
    }


MEASURES = {'step': measure_step, 'convolutions': measure_convolutions}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=MEASURES)
    parser.add_argument('names', nargs='*', metavar='NETWORK', help=', '.join(NETWORKS))
    parser.add_argument('--repeats', type=int, default=5, metavar='N')
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
    parser.add_argument('--setting', choices=SETTINGS, help='one of SETTINGS, in this process')
    options = parser.parse_args()
    if options.setting is not None:
        key = {'what': options.what, 'name': options.names[0], 'setting': options.setting}
        row = MEASURES[options.what](options.names[0], options.repeats)
        print(json.dumps({**key, **benchmark.environment(), **row}))
        return
    saved = options.json and options.json.is_file()
    rows = json.loads(options.json.read_text()) if saved else []
    have = {(r['what'], r['name'], r['setting'], r['versions']['jax']) for r in rows}
    given = os.environ.get('XLA_FLAGS', '')
    for name in options.names or NETWORKS:
        for setting, flags in SETTINGS.items():
            if options.repeats and (options.what, name, setting, jax.__version__) in have:
                continue
            command = [sys.executable, __file__, options.what, name, '--setting', setting]
            done = subprocess.run(
                [*command, '--repeats', str(options.repeats)],
                env={**os.environ, 'XLA_FLAGS': f'{given} {flags}'.strip()},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            row = json.loads(done.stdout.splitlines()[-1])
            print({k: row.get(k) for k in ('name', 'setting', 'others', 'median', 'gain')})
            if options.repeats and options.json:
                rows.append(row)
                options.json.write_text(json.dumps(rows, indent=1) + '\n')


if __name__ == '__main__':
    main()
