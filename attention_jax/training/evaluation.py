"""Evaluation: every example of a split once, in a run and by itself."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from attention_jax import data
from attention_jax.config import check as check_config
from attention_jax.interop.preprocessing import Preprocessing
from attention_jax.tasks import open_source
from attention_jax.training import checkpoints, sharding
from attention_jax.training.pretrained import preprocessing_of
from attention_jax.training.program import Program, make_program, use_compilation_cache
from attention_jax.training.progress import describe, say
from attention_jax.training.workdir import NETWORK_KEYS, check_classes, refuse_another_config


def evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, float]:
    """Evaluates the latest checkpoint in `workdir` on `data.test_split`; writes nothing.

    Args:
        config: as for `train`; what does not make the network may differ from the run's.
        workdir: work directory of a run.

    Returns:
        Name -> value, e.g. 'test/accuracy'.

    Raises:
        ValueError: the directory holds no checkpoint, or one that does not fit the config.
    """
    workdir = pathlib.Path(workdir)
    use_compilation_cache()
    check_config(config)
    refuse_another_config(config, workdir, NETWORK_KEYS)
    directory = checkpoints.existing(workdir)
    mesh = sharding.mesh_of(config)
    batches = open_test_batches(config, preprocessing_of(config, workdir))
    check_classes(workdir, batches.source.description)
    program = make_program(config, batches.source.description, mesh)
    with jax.set_mesh(mesh), checkpoints.open_manager(directory, read_only=True) as manager:
        step, variables = checkpoints.restore_variables(manager, mesh)
        results, _ = run_evaluation(program, variables, batches)
    for line in filter(None, (program.task.table(results), *batches.source.warnings())):
        say(line)
    say(f'{describe(results)}  at step {step}, {len(batches.source)} examples')
    return results


def open_test_batches(config: ConfigDict, preprocessing: Preprocessing | None) -> data.EvalBatches:
    """Opens `data.test_split`; the batches are this process's part of each."""
    return data.eval_batches(
        open_source(config, config.data.test_split, preprocessing),
        config.data,
        batch_size=config.train.batch_size,
        **sharding.this_process(),
    )


def run_evaluation(
    program: Program, variables: Mapping[str, Any], batches: data.EvalBatches
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns the task's results, `test/` before each name, and pictures of the first batch."""
    task = program.task
    measured, samples = [], {}
    before = None  # a batch late, so that batches do not pile up on the device
    for batch in batches:
        outputs = program.eval_step(variables, sharding.global_batch(program.mesh, batch))
        if before is None:
            first = batch
        else:
            measured.append(jax.device_get(before))
        before = outputs
    measured.append(jax.device_get(before))
    if jax.process_index() == 0:
        samples = task.samples(first, measured[0])
    return {f'test/{name}': value for name, value in task.results(measured).items()}, samples
