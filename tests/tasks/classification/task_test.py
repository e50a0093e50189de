import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import data
from attention_jax.tasks import create_task, open_source
from attention_jax.tasks.classification import metrics
from attention_jax.tasks.classification.loss import loss
from attention_jax.tasks.classification.source import Description
from configs import datasets
from tests import helpers

DESCRIPTION = Description(
    name='made up',
    image_shape=(8, 8, 3),
    num_classes=4,
    class_names=('a', 'b', 'c', 'd'),
    splits={'train': 5},
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.5),
    flip=False,
)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_inputs_are_normalised_by_channel():
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    task = create_task(datasets.get_config(), DESCRIPTION)
    expected = (image / 255 - np.array(DESCRIPTION.mean)) / np.array(DESCRIPTION.std)
    result = task.inputs({'image': jnp.asarray(image)})
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, atol=2e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_loss_is_smoothed_cross_entropy_in_float32(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 4))
    label = np.array([0, 3, 2, 1, 1])
    target = (1 - smoothing) * np.eye(4)[label] + smoothing / 4
    each = -(target * log_softmax(logits)).sum(-1)
    batch = {'label': jnp.asarray(label)}
    mean, sums = loss(jnp.asarray(logits), batch, label_smoothing=smoothing)
    np.testing.assert_allclose(mean, each.mean(), rtol=1e-6)
    np.testing.assert_allclose(sums['loss'], each.sum(), rtol=1e-6)
    assert sums['correct'] == (logits.argmax(-1) == label).sum()
    low, _ = loss(jnp.asarray(logits, jnp.bfloat16), batch, label_smoothing=smoothing)
    assert low.dtype == jnp.float32


def test_evaluation_counts_each_example_once_whatever_the_padding():
    rng = np.random.default_rng(1)
    logits, label = rng.normal(size=(5, 4)).astype(np.float32), np.array([0, 3, 2, 1, 1])
    whole = metrics.measure(logits, {'label': label, 'mask': np.ones(5)})
    padded_logits = np.concatenate([logits, np.full((3, 4), np.nan, np.float32)])
    padded = metrics.measure(
        padded_logits,
        {'label': np.concatenate([label, [0, 0, 0]]), 'mask': np.repeat([1.0, 0.0], [5, 3])},
    )
    assert padded['count'] == 5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, padded)
    means = metrics.metrics({'loss': 6.0, 'correct': 3, 'count': 4})
    assert means == {'loss': 1.5, 'accuracy': 0.75}
    twice = metrics.results([jax.device_get(padded)] * 2)
    assert twice == pytest.approx(metrics.metrics(jax.tree.map(float, padded)))


def test_abstract_batch_is_what_the_loader_gives():
    config = datasets.get_config()
    source = open_source(config, 'train[:13]', train=True)
    abstract = create_task(config, source.description).abstract_batch(6)
    assert helpers.shapes(abstract) == {
        'image': ((6, 32, 32, 1), jnp.uint8),
        'label': ((6,), jnp.int32),
    }
    batches = data.train_batches(source, config.data, batch_size=6, seed=0)
    assert helpers.shapes(next(batches)) == helpers.shapes(abstract)
    batches.close()
    evaluated = helpers.shapes(next(iter(data.eval_batches(source, config.data, batch_size=6))))
    assert evaluated == helpers.shapes(abstract) | {'mask': ((6,), jnp.float32)}


def test_unknown_task_is_refused():
    config = datasets.get_config()
    config.task = 'segmentation'
    with pytest.raises(ValueError, match="task 'segmentation' is unknown: use one of 'classif"):
        create_task(config, DESCRIPTION)
