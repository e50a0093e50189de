"""A task of a user's: how much ink a handwritten digit has. The package does not know it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from attention_jax import data, tasks
from attention_jax.config import load_config
from attention_jax.training import checkpoints, evaluate, load, metrics, sharding, train


@dataclasses.dataclass(frozen=True, eq=False)
class Digits(data.Examples):
    images: np.ndarray  # uint8 [n, 8, 8, 1]

    def __len__(self):
        return len(self.images)

    def example(self, index):
        image = self.images[index]
        return {'image': image, 'ink': np.float32(image.mean() / 255)}


def open_split(config, split, preprocessing=None, *, train=False):
    from sklearn.datasets import load_digits

    images = np.uint8(load_digits().images * (255 / 16))[..., None]
    parts = {'train': images[:1500], 'test': images[1500:]}
    return Digits(data.Description(config.data.name, (8, 8, 1)), split, parts[split])


def create(config, description):
    def loss(outputs, batch):
        squares = jnp.square(outputs[:, 0].astype(jnp.float32) - batch['ink'])
        return squares.mean(), {'loss': squares.sum(), 'count': jnp.int32(squares.size)}

    def measure(outputs, batch):
        close = jnp.abs(outputs[:, 0] - batch['ink']) < 0.05
        return {'close': jnp.where(batch['mask'] > 0, close, 0).sum(), 'count': batch['mask'].sum()}

    return tasks.Task(
        model=tasks.build_model(config, 1),
        example={
            'image': jax.ShapeDtypeStruct(tuple(description.image_shape), jnp.uint8),
            'ink': jax.ShapeDtypeStruct((), jnp.float32),
        },
        inputs=lambda batch: batch['image'].astype(config.train.compute_dtype) / 255,
        loss=loss,
        measure=measure,
        results=lambda measured: tasks.means(tasks.add_up(measured)),
        best='close',
    )


tasks.register_task('ink', open_split, create)


def get_config() -> ConfigDict:
    from configs import datasets

    config = datasets.get_config('digits')
    config.task = 'ink'
    config.optimizer.learning_rate = 0.01
    config.schedule.warmup_epochs = 0.0
    config.train.update({'steps': 30, 'batch_size': 32, 'checkpoint_every': 10, 'log_every': 5})
    return config


# The tests.


def last_state(workdir: pathlib.Path) -> list[np.ndarray]:
    mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
    with checkpoints.open_manager(workdir / 'checkpoints', read_only=True) as manager:
        _, tree = checkpoints.restore_tree(manager, mesh)
    tree['rng'] = jax.random.key_data(tree['rng'])
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def losses(workdir: pathlib.Path) -> list[float]:
    return [row['train/loss'] for row in metrics.read_rows(workdir / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('finished')
    return workdir, train(load_config(__file__), workdir)


def test_it_learns_and_evaluates(finished):
    workdir, summary = finished
    assert losses(workdir)[-1] < losses(workdir)[0] / 2
    assert summary['best'] == {'step': 30, 'test/close': summary['test/close']}
    assert evaluate(get_config(), workdir) == {'test/close': summary['test/close']}


def test_every_example_counts_once(finished):
    workdir, summary = finished
    model, variables, config = load(workdir)
    source = tasks.open_source(config, 'test')
    outputs = model.apply(variables, source.images.astype(np.float32) / 255)[:, 0]
    close = abs(outputs - source.images.mean((1, 2, 3)) / 255) < 0.05
    assert len(source) % 32
    assert summary['test/close'] == pytest.approx(float(close.mean()), abs=1.5 / len(source))


def test_a_crash_changes_no_bit(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    write = metrics.MetricsWriter.write

    def crash(self, row):
        write(self, row)
        if row['step'] == 15:
            raise RuntimeError('stands for a kill')

    with monkeypatch.context() as patch:
        patch.setattr(metrics.MetricsWriter, 'write', crash)
        with pytest.raises(RuntimeError, match='stands for a kill'):
            train(get_config(), tmp_path)
    train(get_config(), tmp_path)
    assert losses(workdir) == losses(tmp_path)
    for one, other in zip(last_state(workdir), last_state(tmp_path), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_it_is_inspected():
    pytest.importorskip('libtpu')
    from attention_jax.analysis.compiled import inspect

    report = inspect(__file__, device='v5e', batch=32)
    assert report['image'] == [8, 8, 1]
    assert report['memory']['total'] > 0
