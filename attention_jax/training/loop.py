"""The training loop: everything about a run that is not a pure function."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from attention_jax import data, files
from attention_jax.config import check as check_config
from attention_jax.models.costs import parameter_table
from attention_jax.tasks import open_source
from attention_jax.training import checkpoints, metrics, sharding
from attention_jax.training.evaluation import open_test_batches, run_evaluation
from attention_jax.training.pretrained import preprocessing_of, start_variables
from attention_jax.training.program import Length, make_program, use_compilation_cache
from attention_jax.training.progress import ProgressLine, describe, say
from attention_jax.training.signals import stop_signals
from attention_jax.training.state import create_state, start_from
from attention_jax.training.workdir import (
    check_classes,
    check_same_classes,
    refuse_another_config,
    write_description,
)


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """Trains until the end of the run, going on from the latest checkpoint in `workdir`.

    Args:
        config: `get_config()` of a file in configs/.
        workdir: made if it is missing. A finished run of the same config is not repeated.

    Returns:
        What summary.json holds: test/accuracy, test/loss, best, steps, seconds, images_per_second,
        parameters, versions, devices, git_revision.

    Raises:
        ValueError: the config asks for what cannot be, `workdir` belongs to another config, or its
            checkpoint does not fit. Nothing was written.
        FloatingPointError: the loss or the gradient is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint of the last step was saved.
    """
    started = time.perf_counter()
    workdir = pathlib.Path(workdir)
    use_compilation_cache()

    # Everything that the config can get wrong comes before anything is written.
    check_config(config)
    refuse_another_config(config, workdir)
    if (workdir / 'summary.json').is_file():
        summary = json.loads((workdir / 'summary.json').read_text())
        say(f'{workdir} holds the finished run:\n{json.dumps(summary, indent=2)}')
        return summary

    # Data.
    batch_size = config.train.batch_size
    mesh = sharding.mesh_of(config)
    preprocessing = preprocessing_of(config, workdir)
    source = open_source(config, config.data.split, preprocessing, train=True)
    test_batches = open_test_batches(config, preprocessing)
    check_classes(workdir, source.description)
    check_same_classes(source, test_batches.source)
    batches = data.train_batches(
        source,
        config.data,
        batch_size=batch_size,
        seed=config.train.seed,
        **sharding.this_process(),
    )
    steps = data.number_of_steps(config.train, len(source))
    steps_per_epoch = len(source) / batch_size
    every = config.train.eval_every
    evaluations = int(steps / steps_per_epoch / every)
    eval_steps = {round(k * every * steps_per_epoch) for k in range(1, evaluations + 1)}

    # Network, optimiser, and the shapes of the state.
    program = make_program(config, source.description, mesh, Length(steps, steps_per_epoch))
    task = program.task
    start = functools.cache(lambda: start_variables(config, task.model, program.inputs))
    if config.model.pretrained and not any((workdir / 'checkpoints').glob('[0-9]*')):
        start()  # refused now, if at all; a run that goes on needs the weights no more

    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        stack.enter_context(jax.set_mesh(mesh))

        # State: restored, or new. A checkpoint that does not fit is refused before the work
        # directory changes.
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
        manager = stack.enter_context(
            checkpoints.open_manager(workdir / 'checkpoints', f'test/{task.best}')
        )
        restored = checkpoints.restore(manager, program.state)
        step = 0 if restored is None else int(restored[0].step)
        table = parameter_table(task.model, program.inputs.shape)
        if restored is None:
            say(table)
        write_description(workdir, config, source.description, table)
        writer = metrics.MetricsWriter(workdir, step)
        stack.callback(writer.close)
        progress = stack.enter_context(ProgressLine(steps, step))
        if restored is None:
            with progress.working('Initialising'):
                state = create_state(program.init, program.state, config.train.seed)
                if config.model.pretrained:
                    variables, report = start()
                    state = start_from(state, program.state, variables)
                    progress.say(f'Starting from {config.model.pretrained}: {report}')
            saved = {'position': batches.get_state(), 'window': {}, 'seconds': 0.0}
        else:
            state, saved = restored
            batches.set_state(saved['position'])
            progress.say(f'Going on from step {step} of {steps}')

        with progress.working(f'Compiling for {sharding.describe(mesh)}'):
            train_step = program.train_step.lower(program.state, program.batch).compile()

        # The loop. A step is dispatched, the next batch is made while it runs, and the numbers of
        # the step before are fetched: the device never waits for Python.
        window = metrics.Window(**saved['window'])  # what was trained on since the last row
        seconds_before = saved['seconds']
        images, seconds_training = 0, 0.0
        pending: tuple[int, Any] | None = None
        results: dict[str, float] = {}
        stop = stack.enter_context(stop_signals())
        position = batches.get_state()
        batch = sharding.global_batch(mesh, next(batches)) if step < steps else None
        while step < steps:
            tick = time.perf_counter()
            state, outputs = train_step(state, batch)
            step += 1
            position = batches.get_state()
            if step < steps:
                wait = time.perf_counter()
                batch = sharding.global_batch(mesh, next(batches))
                # Only where the device had finished before the batch was there did it wait.
                if outputs['grad_norm'].is_ready():
                    window.wait += time.perf_counter() - wait
            if pending is not None:
                window.add(*fetch(*pending, manager))
            pending = (step, outputs)

            stopping = bool(stop) and step < steps
            evaluating = step == steps or step in eval_steps
            every = config.train.checkpoint_every
            saving = evaluating or stopping or (every > 0 and step % every == 0)
            logging = evaluating or step % config.train.log_every == 0
            if logging or saving:
                window.add(*fetch(*pending, manager))
                pending = None
            images += batch_size
            window.seconds += time.perf_counter() - tick
            seconds_training += time.perf_counter() - tick

            if evaluating:
                results, samples = run_evaluation(program, state.variables, test_batches)
                writer.write_pictures(step, samples)
            if logging:
                rate = float(program.schedule((step - 1) // config.optimizer.accumulate))
                row = {
                    'step': step,
                    'epoch': step / steps_per_epoch,
                    'wall_time': time.time(),
                    **{f'train/{k}': v for k, v in task.metrics(window.sums).items()},
                    **(results if evaluating else {}),
                    'learning_rate': rate,
                    'grad_norm': window.grad_norm,
                    'images_per_second': window.steps * batch_size / window.seconds,
                    'data_wait': min(window.wait / window.seconds, 1.0),
                }
                writer.write(row)
                progress.update(row, (steps - step) * window.seconds / window.steps)
                window = metrics.Window()
            if saving:
                saved = {
                    'position': position,
                    'window': dataclasses.asdict(window),
                    'seconds': seconds_before + time.perf_counter() - started,
                }
                checkpoints.save(manager, step, state, saved, results if evaluating else None)
            if stopping:
                manager.wait_until_finished()
                progress.say(f'Stopped after step {step}, which is saved; the same command goes on')
                raise KeyboardInterrupt(signal.Signals(stop[0]).name)

        manager.wait_until_finished()
        if not results:  # all steps were done before, and the run was killed before its summary
            results, _ = run_evaluation(program, state.variables, test_batches)
        best = manager.best_step()
        summary = {
            **results,
            'best': {'step': best, **manager.metrics(best)},
            'steps': steps,
            'seconds': seconds_before + time.perf_counter() - started,
            'images_per_second': images / seconds_training if images else None,
            'parameters': sum(x.size for x in jax.tree.leaves(program.state.params)),
            **metrics.environment(),
        }
        if jax.process_index() == 0:
            files.write_json(workdir / 'summary.json', summary)
        seconds = summary['seconds']
        warnings = [*source.warnings(), *test_batches.source.warnings()]
        for line in filter(None, (task.table(results), *warnings)):
            progress.say(line)
        progress.say(f'{describe(results)}  after {steps} steps, {seconds:.0f} s: {workdir}')
    return summary


def fetch(step: int, outputs: Any, manager: Any) -> tuple[dict[str, float], float]:
    """Returns the numbers of a step, once they are there.

    Raises:
        FloatingPointError: one of them is not finite.
    """
    outputs = jax.device_get(outputs)
    sums = {name: value.item() for name, value in outputs['sums'].items()}
    grad_norm = float(outputs['grad_norm'])
    if not all(map(math.isfinite, (grad_norm, *sums.values()))):
        manager.wait_until_finished()
        last = manager.latest_step()
        good = f'{manager.directory}/{last}' if last is not None else 'there is none'
        raise FloatingPointError(
            f'not finite at step {step}: {describe(sums)}  gradient norm {grad_norm:.4g}. '
            f'Last good checkpoint: {good}. Try a lower optimizer.learning_rate, '
            'optimizer.clip_norm or schedule.warmup_epochs'
        )
    return sums, grad_norm
