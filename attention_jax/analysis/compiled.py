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
minutes, so it runs in a process of its own, `python -m attention_jax.analysis.compiler`, one for
any number of programs.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from attention_jax import checks
from attention_jax.analysis.devices import CHIPS, GPU_SETTINGS, TPU_SETTINGS, parse_device

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


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
        command = [sys.executable, '-m', 'attention_jax.analysis.compiler', request, answers]
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
