"""The process that compiles for devices that are not there; `analysis.compiled` starts it."""

import dataclasses
import functools
import json
import math
import pathlib
import sys
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from attention_jax.analysis.devices import CHIPS, first_line, parse_device, topology_devices
from attention_jax.analysis.hlo import batch_gathers, bytes_moved, collectives, read_program
from attention_jax.config import check, defaults, load_config
from attention_jax.models.costs import costs
from attention_jax.models.registry import model_entry
from attention_jax.modules.registry import create_attention
from attention_jax.tasks.task import open_source, task_entry
from attention_jax.training import sharding
from attention_jax.training.program import make_program

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


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
                if not last.resolve().is_relative_to(_PACKAGE):
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
    config = _config(job, device)
    check(config)
    description, note = _describe_data(config)
    mesh = sharding.make_mesh(-1, config.mesh.fsdp, topology_devices(device))
    if job['batch']:
        config.train.batch_size = job['batch'] * mesh.size
    batch = config.train.batch_size
    if batch % mesh.size:
        raise ValueError(
            f'train.batch_size {batch} of the config cannot be split over the {mesh.size} chips of '
            f'{device}: say how many images a chip takes, with batch'
        )
    program = make_program(config, description, mesh)
    state = program.state
    split = {x.size for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated}
    report = _compile(program.train_step, (state, program.batch), mesh, batch, split)

    counts = costs(program.task.model, program.inputs.shape)
    chip, _ = parse_device(device)
    report['memory'] |= {
        'state': _bytes_per_chip(state),
        'batch': _bytes_per_chip(program.batch),
        'chip': CHIPS[chip].memory,
    }
    seconds = report['bytes_off_chip'] / CHIPS[chip].bandwidth
    return {
        'model': _describe_model(job['model'], config),
        'device': device,
        'mesh': dict(mesh.shape),
        'dtype': config.train.compute_dtype,
        'batch_per_chip': batch // mesh.size,
        'image': list(program.inputs.shape[1:]),
        'num_classes': description.num_classes,
        'note': note,
        'parameters': counts['parameters'],
        'macs': counts['macs'] + counts['matmul'],
        **report,
        'seconds': seconds,
        'images_per_second': batch / seconds,
    }


def _config(job: Mapping[str, Any], device: str) -> ConfigDict:
    """The config of a file, or of a network alone, with what the job changes in it."""
    if '.py' in job['model']:
        config = load_config(job['model'])
    else:
        config = defaults()
        config.task, config.model.name = model_entry(job['model']).task, job['model']
        config.data.name = ''
        config.train.batch_size = 128 * math.prod(parse_device(device)[1])
    if job['attention']:
        config.model.attention = job['attention']
        config.model.attention_args = {}
        config.model.placement = ''
    changes = {
        'model.placement': job['placement'],
        'model.num_classes': job['num_classes'],
        'data.image_size': job['size'],
        'mesh.fsdp': job['fsdp'],
        'train.compute_dtype': job['dtype'],
    }
    config.update_from_flattened_dict({key: value for key, value in changes.items() if value})
    return config


def _describe_data(config: ConfigDict) -> tuple[Any, str]:
    """The data set's description, and a note where it is not the data set's own."""
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
        description = task_entry(config.task).description(
            name=config.data.name,
            image_shape=(*((size, size) if isinstance(size, int) else size), 3),
            num_classes=entry.num_classes,
        )
    if config.model.num_classes:
        description = dataclasses.replace(description, num_classes=config.model.num_classes)
    return description, note


def _describe_model(given: str, config: ConfigDict) -> str:
    attention = f' with {config.model.attention}' if config.model.attention else ''
    placement = f' at {config.model.placement}' if config.model.placement else ''
    name = config.model.name if given == config.model.name else f'{given}: {config.model.name}'
    return f'{name}{attention}{placement}'


def _module_report(job: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Compiles a mechanism's forward or VJP."""
    mesh = sharding.make_mesh(-1, 1, topology_devices(device))
    module = create_attention(job['name'], **job.get('arguments', {}))
    shape, train = tuple(job['shape']), job.get('train', True)
    x = jax.ShapeDtypeStruct(shape, job.get('dtype', 'bfloat16'))
    x = sharding.with_batch_sharding(mesh, x)
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
        y = sharding.with_batch_sharding(mesh, y)
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
        'collectives': [c._asdict() for c in sent],
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
