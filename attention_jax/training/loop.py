"""The training loop: everything about a run that is not a pure function."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from attention_jax import data
from attention_jax.analysis.tables import parameter_table
from attention_jax.config import check as check_config
from attention_jax.interop import pretrained
from attention_jax.interop.preprocessing import Preprocessing, from_dataset
from attention_jax.tasks import Task, create_task, open_source
from attention_jax.training import checkpoints, metrics, sharding
from attention_jax.training.optimizer import make_optimizer, make_schedule
from attention_jax.training.progress import ProgressLine, overall
from attention_jax.training.state import (
    abstract_state,
    create_state,
    make_init,
    parameter_count,
    start_from,
)
from attention_jax.training.step import (
    jit_eval_step,
    jit_train_step,
    make_eval_step,
    make_train_step,
)
from attention_jax.training.workdir import (
    NETWORK_KEYS,
    check_classes,
    check_same_classes,
    read_config,
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
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch_size(batch_size, mesh)
    preprocessing = preprocessing_of(config, workdir)
    source = open_source(config, config.data.split, preprocessing, train=True)
    test_source = open_source(config, config.data.test_split, preprocessing)
    check_classes(workdir, source.description)
    check_same_classes(source, test_source)
    batches = data.train_batches(
        source, config.data, batch_size=batch_size, seed=config.train.seed, **this_process()
    )
    test_batches = data.eval_batches(
        test_source, config.data, batch_size=batch_size, **this_process()
    )
    steps_per_epoch = len(source) / batch_size
    steps = data.number_of_steps(config.train, len(source))
    epochs = steps / steps_per_epoch
    every = config.train.eval_every
    eval_steps = {round(k * every * steps_per_epoch) for k in range(1, int(epochs / every) + 1)}

    # Network, optimiser, and the shapes of the state.
    task = create_task(config, source.description)
    schedule = make_schedule(
        config.schedule,
        config.optimizer.learning_rate,
        steps=math.ceil(steps / config.optimizer.accumulate),
        steps_per_epoch=steps_per_epoch / config.optimizer.accumulate,
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    inputs = jax.eval_shape(task.inputs, task.abstract_batch(batch_size))
    init = make_init(task.model, optimizer, inputs, ema=config.train.ema_decay > 0)
    abstract = abstract_state(init, mesh)

    @functools.cache
    def weights() -> tuple[dict[str, Any], Any]:
        example = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), inputs.dtype)
        return pretrained.load_variables(
            config.model.name,
            task.model,
            config.model.pretrained,
            example,
            seed=config.train.seed,
        )

    if config.model.pretrained and not any((workdir / 'checkpoints').glob('[0-9]*')):
        weights()  # refused now, if at all; a run that goes on needs them no more

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
        restored = checkpoints.restore(manager, abstract)
        step = 0 if restored is None else int(restored[0].step)
        table = parameter_table(task.model, (1, *inputs.shape[1:]))
        if restored is None:
            say(table)
        write_description(workdir, config, source.description, table)
        writer = metrics.MetricsWriter(workdir, step)
        stack.callback(writer.close)
        progress = stack.enter_context(ProgressLine(steps, step))
        if restored is None:
            with progress.working('Initialising'):
                state = create_state(init, abstract, config.train.seed)
                if config.model.pretrained:
                    variables, report = weights()
                    state = start_from(state, abstract, variables)
                    progress.say(f'Starting from {config.model.pretrained}: {report}')
            saved = {'position': batches.get_state(), 'window': {}, 'seconds': 0.0}
        else:
            state, saved = restored
            batches.set_state(saved['position'])
            progress.say(f'Going on from step {step} of {steps}')

        with progress.working(f'Compiling for {describe_devices(mesh)}'):
            example = task.abstract_batch(batch_size)
            train_step = make_train_step(task, optimizer, ema_decay=config.train.ema_decay)
            train_step = jit_train_step(train_step, abstract, mesh)
            train_step = train_step.lower(abstract, example).compile()
            eval_step = jit_eval_step(make_eval_step(task), mesh)

        # The loop. A step is dispatched, the next batch is made while it runs, and the numbers of
        # the step before are fetched: the device never waits for Python.
        window = Window(**saved['window'])  # what was trained on since the last row
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
                results, samples = run_evaluation(
                    task, eval_step, state.variables, test_batches, mesh
                )
                writer.write_pictures(step, samples)
            if logging:
                rate = float(schedule((step - 1) // config.optimizer.accumulate))
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
                window = Window()
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
            results, _ = run_evaluation(task, eval_step, state.variables, test_batches, mesh)
        best = manager.best_step()
        summary = {
            **results,
            'best': {'step': best, **manager.metrics(best)},
            'steps': steps,
            'seconds': seconds_before + time.perf_counter() - started,
            'images_per_second': images / seconds_training if images else None,
            'parameters': parameter_count(abstract.params),
            **metrics.environment(),
        }
        metrics.write_text(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
        seconds = summary['seconds']
        print_table(task, results, (source, test_source), progress.say)
        progress.say(f'{describe(results)}  after {steps} steps, {seconds:.0f} s: {workdir}')
    return summary


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
    directory = workdir / 'checkpoints'
    if not directory.is_dir():
        raise ValueError(f'workdir {workdir} holds no checkpoint: train first')
    batch_size = config.train.batch_size
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch_size(batch_size, mesh)
    source = open_source(config, config.data.test_split, preprocessing_of(config, workdir))
    check_classes(workdir, source.description)
    batches = data.eval_batches(source, config.data, batch_size=batch_size, **this_process())
    task = create_task(config, source.description)
    with (
        jax.set_mesh(mesh),
        checkpoints.open_manager(directory, read_only=True) as manager,
    ):
        step, variables = checkpoints.restore_variables(manager, mesh)
        eval_step = jit_eval_step(make_eval_step(task), mesh)
        results, _ = run_evaluation(task, eval_step, variables, batches, mesh)
    print_table(task, results, (source,), say)
    say(f'{describe(results)}  at step {step}, {len(source)} examples')
    return results


def preprocessing_of(config: ConfigDict, workdir: pathlib.Path) -> Preprocessing | None:
    """Returns the preprocessing of `model.pretrained`, or None for the dataset's own.

    A run that goes on has it in its work directory and does not look for the weights.
    """
    if not config.model.pretrained or config.data.preprocessing == 'dataset':
        return None
    if (workdir / 'config.json').is_file():
        return from_dataset(read_config(workdir).dataset)
    return pretrained.read_preprocessing(config.model.name, config.model.pretrained)


@dataclasses.dataclass
class Window:
    """What happened since the last row of metrics: the task's sums, time, and time without data."""

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    grad_norm: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0

    def add(self, sums: Mapping[str, float], grad_norm: float) -> None:
        """Adds one step's numbers."""
        self.steps += 1
        self.sums = {k: self.sums.get(k, 0) + v for k, v in sums.items()}
        self.grad_norm = grad_norm


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


def run_evaluation(
    task: Task, eval_step: Any, variables: Any, batches: Any, mesh: jax.sharding.Mesh
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns the task's results, `test/` before each name, and pictures of the first batch.

    Every example counts once.
    """
    measured, samples = [], {}
    before = None  # a batch late, so that batches do not pile up on the device
    for batch in batches:
        outputs = eval_step(variables, sharding.global_batch(mesh, batch))
        if before is None:
            first = batch
        else:
            measured.append(jax.device_get(before))
        before = outputs
    measured.append(jax.device_get(before))
    if jax.process_index() == 0:
        samples = task.samples(first, measured[0])
    return {f'test/{name}': value for name, value in task.results(measured).items()}, samples


def print_table(
    task: Task,
    results: Mapping[str, float],
    sources: Sequence[data.Examples],
    say: Callable[[str], None],
) -> None:
    """Prints the task's table, and what the sources left out."""
    table = task.table(results)
    for line in (*([table] if table else []), *(w for s in sources for w in s.warnings())):
        say(line)


def describe_devices(mesh: jax.sharding.Mesh) -> str:
    """Returns e.g. '8 cpu devices (data 4, fsdp 2)'."""
    device = mesh.devices.flat[0]
    shape = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
    return f'{mesh.size} x {device.device_kind} ({shape})'


def describe(results: Mapping[str, float]) -> str:
    """Returns e.g. 'test/loss 0.0312  test/accuracy 0.9916'."""
    return '  '.join(f'{name} {value:.4f}' for name, value in overall(results).items())


def this_process() -> dict[str, int]:
    """Returns which part of each batch is this process's."""
    return {'process_index': jax.process_index(), 'process_count': jax.process_count()}


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless JAX was told where already."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = pathlib.Path.home() / '.cache' / 'attention_jax' / 'xla'
        jax.config.update('jax_compilation_cache_dir', str(folder))


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Gives a list that the first SIGINT or SIGTERM is put into; the second one ends at once.

    Of several processes all must get the signal, as a cluster sends it: they save together.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # signals come to the main thread, and only it may handle them
        return

    def handle(number: int, frame: object) -> None:
        if caught:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(number)
        print('Stopping after this step; once more to stop at once', file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)
