"""Whole runs: resumed to the same bits, stopped, finished, refused."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from attention_jax.training import checkpoints, evaluate, load, loop, metrics, sharding, train

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def state_of(workdir: pathlib.Path) -> tuple[int, list[np.ndarray]]:
    """The newest checkpoint's step, and every array of its state on one device."""
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    with checkpoints.open_manager(workdir / 'checkpoints', read_only=True) as manager:
        step, tree = checkpoints.restore_tree(manager, mesh)
    tree['rng'] = jax.random.key_data(tree['rng'])
    return step, [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_same_run(a: pathlib.Path, b: pathlib.Path) -> None:
    (step_a, state_a), (step_b, state_b) = state_of(a), state_of(b)
    assert step_a == step_b
    for x, y in zip(state_a, state_b, strict=True):
        np.testing.assert_array_equal(x, y)
    timing = ('wall_time', 'images_per_second', 'data_wait')
    rows = [
        [{k: v for k, v in row.items() if k not in timing} for row in metrics.read_rows(path)]
        for path in (a / 'metrics.jsonl', b / 'metrics.jsonl')
    ]
    assert rows[0] == rows[1]


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, pathlib.Path, dict[str, Any]]:
    """An unbroken run of the fixture `config`."""
    config = make_config()
    workdir = tmp_path_factory.mktemp('finished')
    return config, workdir, train(config, workdir)


def make_config(**settings: Any) -> Any:
    from configs import datasets

    config = datasets.get_config('digits')
    config.train.update(
        {'steps': 6, 'batch_size': 16, 'checkpoint_every': 5, 'log_every': 2, **settings}
    )
    config.schedule.warmup_epochs = 0.0
    config.data.test_split = 'test[:40]'
    config.mesh.fsdp = 2
    return config


def test_work_directory(finished):
    _, workdir, summary = finished
    names = {p.name for p in workdir.iterdir()}
    texts = {'config.json', 'parameters.txt', 'metrics.jsonl', 'summary.json'}
    assert names >= {'checkpoints', *texts}
    assert any(name.startswith('events.out.tfevents.') for name in names)
    rows = metrics.read_rows(workdir / 'metrics.jsonl')
    assert [row['step'] for row in rows] == [2, 4, 6]
    assert json.loads((workdir / 'summary.json').read_text()) == summary
    for name in ('test/accuracy', 'test/loss'):
        assert summary[name] == rows[-1][name]
    assert summary['best'] == {
        'step': 6,
        'test/accuracy': rows[-1]['test/accuracy'],
        'test/loss': rows[-1]['test/loss'],
    }
    assert (summary['steps'], summary['devices']['count']) == (6, 8)
    stored = json.loads((workdir / 'config.json').read_text())
    assert stored['train']['steps'] == 6
    assert stored['dataset']['image_shape'] == [32, 32, 1]


def test_a_finished_run_is_not_repeated(finished, capsys):
    config, workdir, summary = finished
    assert train(config, workdir) == summary
    assert 'holds the finished run' in capsys.readouterr().out


def test_evaluation_alone_gives_the_same(finished):
    config, workdir, summary = finished
    before = sorted(p.name for p in workdir.rglob('*'))
    results = evaluate(config, workdir)
    assert results['test/accuracy'] == summary['test/accuracy']
    np.testing.assert_allclose(results['test/loss'], summary['test/loss'], rtol=1e-6)
    assert sorted(p.name for p in workdir.rglob('*')) == before


def test_load_gives_the_network_and_its_variables(finished):
    _, workdir, summary = finished
    model, variables, config = load(workdir)
    logits = model.apply(variables, np.zeros((1, *config.dataset.image_shape), np.float32))
    assert logits.shape == (1, 10)
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    assert count == summary['parameters']


def test_another_config_is_refused_with_the_difference(finished):
    _, workdir, _ = finished
    with pytest.raises(
        ValueError, match=r'train.steps is 6 there and 7 here.*Choose another with --workdir'
    ):
        train(make_config(steps=7), workdir)
    config = make_config()
    config.model.attention = 'se'
    with pytest.raises(ValueError, match=r'model.attention is "" there and "se" here'):
        evaluate(config, workdir)


class CrashError(Exception):
    """Stands for a kill."""


# Step 4 is before the first checkpoint; from that of step 5 half a row of metrics is restored.
@pytest.mark.parametrize('step', [4, 6])
def test_a_crash_changes_no_bit(finished, tmp_path, monkeypatch, step):
    config, unbroken, _ = finished
    write = metrics.MetricsWriter.write

    def crash(self, row):
        write(self, row)
        if row['step'] == step:
            raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, 'write', crash)
        with pytest.raises(CrashError):
            train(config, tmp_path)
    assert not (tmp_path / 'summary.json').exists()
    train(config, tmp_path)
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(finished, tmp_path, monkeypatch, number):
    config, unbroken, _ = finished
    update = loop.ProgressLine.update

    def interrupt(self, row, seconds_left):
        update(self, row, seconds_left)
        if row['step'] == 2:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.ProgressLine, 'update', interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    assert state_of(tmp_path)[0] == 3  # which no setting would have saved
    train(config, tmp_path)
    assert_same_run(unbroken, tmp_path)


def test_killed_between_the_last_checkpoint_and_the_summary(finished, tmp_path, monkeypatch):
    config, unbroken, summary = finished

    def crash(*arguments):
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(metrics, 'environment', crash)
        with pytest.raises(CrashError):
            train(config, tmp_path)
    again = train(config, tmp_path)
    assert again['test/accuracy'] == summary['test/accuracy']
    assert_same_run(unbroken, tmp_path)


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    config = make_config(checkpoint_every=1)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match=r'not finite at step 2.*checkpoints/1\. Try'):
        train(config, tmp_path)
    assert state_of(tmp_path)[0] == 1


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('batch_size', 0, 'train.batch_size must be at least 1, got 0'),
        ('batch_size', 12, 'train.batch_size 12 must be divisible by the 8 devices: use 8 or 16'),
        ('batch_size', 1600, 'train.batch_size 1600 is larger than the split'),
        ('compute_dtype', 'float16', "train.compute_dtype 'float16' is unknown"),
        ('label_smoothing', 1.0, 'train.label_smoothing must be in 0 to 1, 1 excluded'),
        ('eval_every', 0, 'train.eval_every must be at least 1, got 0'),
        ('checkpoint_every', -1, 'train.checkpoint_every must be at least 0, got -1'),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(**{key: value}), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_evaluation_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='holds no checkpoint: train first'):
        evaluate(make_config(), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


SMALL = ['--config.model.arguments.width=0.125', '--config.data.image_size=64']


def start(workdir: pathlib.Path, devices: int, study: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, REPOSITORY / 'train.py', '--config', REPOSITORY / f'configs/{study}.py',
        '--workdir', workdir, '--config.train.steps=24', '--config.train.batch_size=16',
        '--config.train.checkpoint_every=3', '--config.train.log_every=1',
        '--config.schedule.warmup_epochs=0', '--config.data.test_split=test[:40]',
        *(SMALL if study == 'yolov4_tiny' else []),
    ]  # fmt: skip
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    }
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('devices', 'study'), [(1, 'resnet'), (8, 'resnet'), (1, 'yolov4_tiny'), (8, 'yolov4_tiny')]
)
def test_kill_9_at_a_random_step_changes_no_bit(tmp_path, devices, study):
    unbroken, killed = tmp_path / 'unbroken', tmp_path / 'killed'
    assert start(unbroken, devices, study).wait() == 0
    for _ in range(2):
        process, last = start(killed, devices, study), random.randrange(1, 24)
        while process.poll() is None:
            rows = metrics.read_rows(killed / 'metrics.jsonl')
            if rows and rows[-1]['step'] >= last:
                process.kill()
            time.sleep(0.01)
        process.wait()
    assert start(killed, devices, study).wait() == 0
    assert_same_run(unbroken, killed)
    rows = metrics.read_rows(killed / 'metrics.jsonl')
    assert [row['step'] for row in rows] == list(range(1, 25))
    load(killed)  # on one of this process's devices
