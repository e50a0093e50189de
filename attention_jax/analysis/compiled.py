"""What a program needs on a device that is not there: compiled for it, and read.

XLA on a CPU machine compiles for TPUs (extra `compile`) and for NVIDIA GPUs (extra `cuda`), and the
result is the real program: whether it compiles, the bytes it moves, what it keeps, what it sends
between chips. None of it is a time, all of it is exact, with these limits:

- the body of a loop (`scan`, `map`) is counted once, whatever its length: `loops` tells of them;
- `flops` are counted before optimisation;
- on a TPU, arrays that the program keeps on the chip are not counted in `bytes_moved`; a Pallas
  kernel counts what it says of itself;
- on a GPU, XLA counts nothing, so every kernel is taken to read its operands and write its results
  once, also where it touches only a slice; and cuDNN attention is not chosen, because the choice is
  made by the machine that compiles.

The compiler needs settings that JAX reads when it is imported, and can take all memory and many
minutes, so it runs in a process of its own, `python -m attention_jax.analysis.compiled`, one for
any number of programs.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from attention_jax import checks
from attention_jax.analysis.devices import (
    CHIPS,
    GPU_SETTINGS,
    TPU_SETTINGS,
    first_line,
    parse_device,
    topology_devices,
)
from attention_jax.analysis.program import (
    batch_gathers,
    bytes_moved,
    collectives,
    read_program,
)
from attention_jax.config import check, defaults, load_config

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


# What a caller uses.


def inspect(
    model: str,
    *,
    device: str = 'v5e',
    attention: str | None = None,
    placement: str | None = None,
    batch: int | None = None,
    size: int | None = None,
    num_classes: int | None = None,
    dtype: str = 'bfloat16',
    fsdp: int | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Compiles the training step of a network or a config for a device.

    Args:
        model: registry name of a network, trained with SGD and momentum; or a config,
            'configs/resnet_gc.py:imagenet2012'. Where its data are not there, images and classes
            are those that the network is counted with.
        device: see `parse_device`.
        attention: registry name of a mechanism to put into it.
        placement: where, see `models.placement`.
        batch: images a chip; None is 128, or the config's batch over the chips.
        size: side of the images in pixels; None is the network's or the data set's.
        num_classes: None is the network's or the data set's.
        dtype: 'bfloat16' or 'float32', of the computation; parameters are float32.
        fsdp: number of parts that parameters are split into; None is 1, or the config's.
        timeout: seconds; None waits for ever.

    Returns:
        Numbers per chip, JSON types only: `bytes_moved`, `flops`, `memory` (bytes: state, batch,
        arguments, outputs, temporaries, program, total, chip), `collectives` (kind, what, count,
        bytes), `batch_gathers` (a line for each collective that gathers the batch), `loops`; of
        the network: `parameters`, `macs` (an image, forward); and what the chip's bandwidth makes
        of it: `seconds` that a step takes at the least, `images_per_second` of all chips at the
        most.

    Raises:
        ValueError: one of the arguments is wrong, what compiles for the device is not installed,
            the program does not fit the chip, or the time was not enough.
    """
    job = {
        'kind': 'step',
        'model': model,
        'attention': attention,
        'placement': placement,
        'batch': batch,
        'size': size,
        'num_classes': num_classes,
        'dtype': dtype,
        'fsdp': fsdp,
    }
    checks.choice('dtype', dtype, ('bfloat16', 'float32'))
    for name in ('batch', 'size', 'num_classes', 'fsdp'):
        if job[name] is not None:
            checks.at_least(name, job[name], 1)
    (report,) = _run([job], device, timeout)
    if 'error' in report:
        raise ValueError(report['error'])
    return report


def compile_modules(
    jobs: Sequence[Mapping[str, Any]], *, device: str = 'v5e', timeout: float | None = None
) -> list[dict[str, Any]]:
    """Compiles mechanisms alone for a device, all in one process.

    Args:
        jobs: for each program a dict: `name` (registry name), `shape` of its input over all chips,
            and, where they are not the defaults, `dtype` ('bfloat16'), `arguments` ({}), `train`
            (True: batch statistics), `vjp` (False: forward; True: gradients by parameters and
            inputs from a cotangent, with what of the forward they need), `inputs` (1: how many
            maps of that shape it takes).
        device: see `parse_device`; the batch is split over the chips, parameters are on each.
        timeout: seconds for all of them; None waits for ever.

    Returns:
        For each job a dict like that of `inspect`, with `passes` (bytes moved over the bytes of
        the input) instead of images; or with `error` alone, where it did not compile in time.

    Raises:
        ValueError: unknown device, or what compiles for it is not installed.
    """
    return _run([{'kind': 'module', **job} for job in jobs], device, timeout)


def passes(
    name: str,
    shape: Sequence[int] = (128, 56, 56, 256),
    dtype: str = 'bfloat16',
    device: str = 'v5e',
    **arguments: Any,
) -> dict[str, float]:
    """Counts how often a mechanism goes over its input: bytes moved over the input's bytes.

    A copy makes 2 passes: it reads the array and writes it. An array that fits the chip's own
    buffers (some tens of megabytes on a TPU) is copied there first, and that is counted too.

    Args:
        name: registry name of a mechanism.
        shape: of the input, `[b, h, w, c]`, over all chips.
        dtype: of the input and the computation.
        device: see `parse_device`.
        **arguments: of the mechanism.

    Returns:
        `forward` and `vjp`, see `compile_modules`.

    Raises:
        ValueError: it does not compile, or the arguments are wrong.
    """
    job = {'name': name, 'shape': list(shape), 'dtype': dtype, 'arguments': arguments}
    reports = compile_modules([job, {**job, 'vjp': True}], device=device)
    for report in reports:
        if 'error' in report:
            raise ValueError(report['error'])
    return {'forward': reports[0]['passes'], 'vjp': reports[1]['passes']}


def _run(
    jobs: Sequence[Mapping[str, Any]], device: str, timeout: float | None
) -> list[dict[str, Any]]:
    """Runs jobs in a process of their own, and returns a report for each."""
    chip, _ = parse_device(device)
    _check_installed(chip)
    settings = TPU_SETTINGS if CHIPS[chip].axes else GPU_SETTINGS
    environment = {**os.environ, **settings}
    for name, first, separator in (
        ('PYTHONPATH', str(_REPOSITORY), os.pathsep),
        ('XLA_FLAGS', settings.get('XLA_FLAGS'), ' '),
    ):
        environment[name] = separator.join(filter(None, (first, os.environ.get(name))))
    if not environment['XLA_FLAGS']:
        del environment['XLA_FLAGS']  # XLA takes an empty one for the name of a file
    # A program for another device is not read back from the cache of compiled programs.
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    with tempfile.TemporaryDirectory() as folder:
        request = pathlib.Path(folder, 'request.json')
        answers = pathlib.Path(folder, 'answers.jsonl')
        request.write_text(json.dumps({'device': device, 'jobs': jobs}))
        answers.touch()
        command = [sys.executable, '-m', 'attention_jax.analysis.compiled', request, answers]
        try:
            done = subprocess.run(
                command,
                env=environment,
                timeout=timeout,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors='replace',
                check=False,
            )
            failure = f'the compiler ended with status {done.returncode}: {done.stderr[-3000:]}'
            bug = done.returncode != 0
        except subprocess.TimeoutExpired:
            failure = f'not compiled for {device} in {timeout:g} s: give it a longer timeout'
            bug = False
        reports = [json.loads(line) for line in answers.read_text().splitlines()]
    if bug:
        raise RuntimeError(failure)
    return reports + [{'error': failure}] * (len(jobs) - len(reports))


def _check_installed(chip: str) -> None:
    """Raises a ValueError unless what compiles for the chip is installed."""
    if CHIPS[chip].axes and importlib.util.find_spec('libtpu') is None:
        raise ValueError(
            f'compiling for {chip} needs libtpu, which is not installed: '
            "pip install 'attention_jax[compile]'"
        )
    plugins = ('jax_cuda13_plugin', 'jax_cuda12_plugin')
    if not CHIPS[chip].axes and not any(map(importlib.util.find_spec, plugins)):
        raise ValueError(
            f"compiling for {chip} needs JAX's CUDA plugin, which is not installed: "
            "pip install 'attention_jax[cuda]'"
        )


# The process that compiles.


def main(request: str, answers: str) -> None:
    """Compiles what the file `request` asks for; writes a line of JSON for each to `answers`."""
    asked = json.loads(pathlib.Path(request).read_text())
    with open(answers, 'w', encoding='utf-8') as file:
        for job in asked['jobs']:
            build = {'step': _step_report, 'module': _module_report}[job['kind']]
            try:
                report = build(job, asked['device'])
            except ValueError as error:
                # One raised inside a library is a bug, and keeps its traceback.
                last = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
                if not last.resolve().is_relative_to(_REPOSITORY / 'attention_jax'):
                    raise
                report = {'error': ' '.join(str(error).split())}
            except jax.errors.JaxRuntimeError as error:
                report = {'error': _refusal(error, asked['device'])}
            print(json.dumps(report), file=file, flush=True)


def _refusal(error: Exception, device: str) -> str:
    """One line for what XLA did not compile."""
    line = first_line(error)
    if 'RESOURCE_EXHAUSTED' not in str(error):
        return f'XLA does not compile it for {device}: {line}'
    chip, _ = parse_device(device)
    memory = CHIPS[chip].memory / 2**30
    return f'does not fit the {memory:.0f} GiB of {chip}, use a smaller batch: {line}'


def _step_report(job: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Compiles a training step, the very one of `training.loop`."""
    # Here, because training itself stands on this package.
    from attention_jax.analysis import tables
    from attention_jax.tasks import create_task
    from attention_jax.training import sharding
    from attention_jax.training.optimizer import make_optimizer
    from attention_jax.training.state import abstract_state, make_init
    from attention_jax.training.step import jit_train_step, make_train_step

    config = _read_config(job) if '.py' in job['model'] else _plain_config(job, device)
    check(config)
    description, note = _describe_data(config)
    mesh = sharding.make_mesh(-1, config.mesh.fsdp, topology_devices(device))
    batch = job['batch'] * mesh.size if job['batch'] else config.train.batch_size
    if batch % mesh.size:
        raise ValueError(
            f'train.batch_size {batch} of the config cannot be split over the {mesh.size} chips of '
            f'{device}: say how many images a chip takes, with batch'
        )

    task = create_task(config, description)
    # The rate is a number that the program computes; which one changes no shape.
    optimizer = make_optimizer(config.optimizer, lambda step: jnp.float32(0.1))
    example = task.abstract_batch(batch)
    inputs = jax.eval_shape(task.inputs, example)
    ema = config.train.ema_decay > 0
    state = abstract_state(make_init(task.model, optimizer, inputs, ema=ema), mesh)
    step = make_train_step(task, optimizer, ema_decay=config.train.ema_decay)
    on_mesh = sharding.batch_sharding(mesh)
    example = {
        k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_mesh) for k, x in example.items()
    }
    split = {x.size for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated}
    report = _compile(jit_train_step(step, state, mesh), (state, example), mesh, batch, split)

    counts = tables.costs(task.model, (1, *inputs.shape[1:]))
    chip, _ = parse_device(device)
    report['memory'] |= {
        'state': _bytes_per_chip(state),
        'batch': _bytes_per_chip(example),
        'chip': CHIPS[chip].memory,
    }
    seconds = report['bytes_off_chip'] / CHIPS[chip].bandwidth
    return {
        'model': _describe_model(job['model'], config),
        'device': device,
        'mesh': dict(mesh.shape),
        'dtype': config.train.compute_dtype,
        'batch_per_chip': batch // mesh.size,
        'image': list(inputs.shape[1:]),
        'num_classes': description.num_classes,
        'note': note,
        'parameters': counts['parameters'],
        'macs': counts['macs'] + counts['matmul'],
        **report,
        'seconds': seconds,
        'images_per_second': batch / seconds,
    }


def _read_config(job: Mapping[str, Any]) -> Any:
    """The config of a file, with what the job changes in it."""
    config = load_config(job['model'])
    if job['attention']:
        config.model.attention = job['attention']
        config.model.attention_args = {}
        config.model.placement = ''
    if job['placement']:
        config.model.placement = job['placement']
    if job['num_classes']:
        config.model.num_classes = job['num_classes']
    if job['size']:
        config.data.image_size = job['size']
    if job['fsdp']:
        config.mesh.fsdp = job['fsdp']
    config.train.compute_dtype = job['dtype']
    return config


def _plain_config(job: Mapping[str, Any], device: str) -> Any:
    """The config of a network alone: SGD with momentum."""
    from attention_jax.models.registry import model_entry

    config = defaults()
    config.task = 'detection' if model_entry(job['model']).family == 'yolo' else 'classification'
    config.model.name = job['model']
    config.model.num_classes = job['num_classes']
    config.model.attention = job['attention'] or ''
    config.model.placement = job['placement'] or ''
    config.data.name = ''
    config.data.image_size = job['size']
    config.train.batch_size = 128 * math.prod(parse_device(device)[1])
    config.train.compute_dtype = job['dtype']
    config.mesh.fsdp = job['fsdp'] or 1
    return config


def _describe_data(config: Any) -> tuple[Any, str]:
    """The data set's description, and a note where it is not the data set's own."""
    from attention_jax.models.registry import model_entry
    from attention_jax.tasks import open_source
    from attention_jax.tasks.classification.source import Description

    entry = model_entry(config.model.name)
    description, note = None, ''
    if config.data.name:
        if config.data.name != 'digits':
            config.data.cache = False  # nothing is read but what the data set says of itself
        try:
            description = open_source(config, config.data.split).description
        except ValueError:
            note = f'data set {config.data.name} is not here: images as the network is counted with'
    if description is None:
        size = config.data.image_size or entry.input_size
        description = Description(
            name=config.data.name or '',
            image_shape=(*((size, size) if isinstance(size, int) else size), 3),
            num_classes=entry.num_classes,
            class_names=(),
            splits={},
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            flip=True,
        )
    if config.model.num_classes:
        description = dataclasses.replace(description, num_classes=config.model.num_classes)
    return description, note


def _describe_model(given: str, config: Any) -> str:
    attention = f' with {config.model.attention}' if config.model.attention else ''
    placement = f' at {config.model.placement}' if config.model.placement else ''
    name = config.model.name if given == config.model.name else f'{given}: {config.model.name}'
    return f'{name}{attention}{placement}'


def _module_report(job: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Compiles a mechanism's forward or VJP."""
    from attention_jax.modules.registry import create_attention
    from attention_jax.training import sharding

    mesh = sharding.make_mesh(-1, 1, topology_devices(device))
    module = create_attention(job['name'], **job.get('arguments', {}))
    shape, train = tuple(job['shape']), job.get('train', True)
    x = jax.ShapeDtypeStruct(
        shape, job.get('dtype', 'bfloat16'), sharding=sharding.batch_sharding(mesh)
    )
    xs = (x,) * job.get('inputs', 1)
    variables = dict(jax.eval_shape(module.init, jax.random.key(0), *xs))
    variables = sharding.with_sharding(mesh, variables)
    params = variables.pop('params', {})

    def forward(params: Any, rest: Any, xs: Sequence[jax.Array]) -> Any:
        rngs = {'dropout': jax.random.key(0)}
        variables = {'params': params, **rest}
        return module.apply(variables, *xs, train=train, mutable=list(rest), rngs=rngs)

    def vjp(params: Any, rest: Any, xs: Sequence[jax.Array], cotangent: Any) -> Any:
        run = functools.partial(jax.vjp, has_aux=True)
        _, backward, rest = run(lambda params, xs: forward(params, rest, xs), params, xs)
        return backward(cotangent), rest

    if job.get('vjp', False):
        with jax.set_mesh(mesh):
            y, _ = jax.eval_shape(forward, params, variables, xs)
        y = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding.batch_sharding(mesh)
            ),
            y,
        )
        program, arguments = jax.jit(vjp), (params, variables, xs, y)
    else:
        program, arguments = jax.jit(forward), (params, variables, xs)
    report = _compile(program, arguments, mesh, shape[0])
    return {
        'name': job['name'],
        'program': 'vjp' if job.get('vjp', False) else 'forward',
        'device': device,
        **report,
        'passes': report['bytes_moved'] / _bytes_per_chip(x),
    }


def _compile(
    program: Any, arguments: Sequence[Any], mesh: Mesh, batch: int, split: Collection[int] = ()
) -> dict[str, Any]:
    """Compiles a jitted function and returns what its program says, per chip.

    Args:
        program: the jitted function.
        arguments: shapes, types and shardings.
        mesh: to compile for.
        batch: size of the global batch.
        split: numbers of entries of the parameters that are split over the mesh.
    """
    with jax.set_mesh(mesh):
        lowered = program.lower(*arguments)
        started = time.perf_counter()
        compiled = lowered.compile()
    seconds = time.perf_counter() - started
    instructions = read_program(compiled.as_text())
    moved, off_chip = bytes_moved(instructions)
    cost = compiled.cost_analysis() or {}
    moved = cost.get('bytes accessed', moved)
    sizes = compiled.memory_analysis()
    memory = {
        'arguments': sizes.argument_size_in_bytes,
        'outputs': sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        'temporaries': sizes.temp_size_in_bytes,
        'program': sizes.generated_code_size_in_bytes,
    }
    sent = collectives(instructions)
    parameters = {x.size for x in jax.tree.leaves(arguments[0])}
    return {
        'bytes_moved': int(moved),
        'bytes_off_chip': int(min(moved, off_chip)),
        'flops': int(cost.get('flops', 0)),
        'memory': {**memory, 'total': sum(memory.values())},
        'collectives': [dataclasses.asdict(c) for c in sent],
        'batch_gathers': batch_gathers(sent, batch, mesh.size, split=split, parameters=parameters),
        'loops': sum(i.opcode == 'while' for i in instructions),
        'compile_seconds': seconds,
    }


def _bytes_per_chip(tree: Any) -> int:
    """Bytes of the arrays of an abstract tree that one chip holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
