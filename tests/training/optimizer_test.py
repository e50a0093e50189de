import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from attention_jax.config import defaults
from attention_jax.training.optimizer import decay_mask, make_optimizer, make_schedule
from tests import helpers

PARAMS = {
    'conv': {'kernel': jnp.full((2, 2), 2.0), 'bias': jnp.full((3,), 2.0)},
    'norm': {'scale': jnp.full((3,), 2.0)},
    'heads': {'bias': jnp.full((2, 3), 2.0)},
}


def make(rate: float = 0.1, **changes: object) -> optax.GradientTransformation:
    config = defaults().optimizer
    config.update(changes)
    return make_optimizer(config, lambda step: rate)


def run(optimizer: optax.GradientTransformation, gradients: list[float]) -> list[float]:
    """Values of a parameter that starts at 1 and gets these gradients."""
    params, values = {'kernel': jnp.ones((1, 1))}, []
    state = optimizer.init(params)
    for gradient in gradients:
        grads = {'kernel': jnp.full((1, 1), gradient)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        values.append(params['kernel'].item())
    return values


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_is_pytorchs(nesterov):
    # torch.optim.SGD: g += decay * w; m = 0.9 m + g; w -= rate * (g + 0.9 m, or m)
    weight, momentum, expected = 1.0, 0.0, []
    for gradient in (0.5, -1.0, 2.0):
        gradient += 0.01 * weight
        momentum = 0.9 * momentum + gradient
        weight -= 0.1 * (gradient + 0.9 * momentum if nesterov else momentum)
        expected.append(weight)
    values = run(make(weight_decay=0.01, nesterov=nesterov), [0.5, -1.0, 2.0])
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_adamw_decays_apart_from_the_gradient():
    optimizer = make(name='adamw', momentum=0.9, weight_decay=0.5)
    # The first step of Adam is the gradient's sign; 0.1 * 0.5 * 1 comes from the decay.
    np.testing.assert_allclose(run(optimizer, [3.0]), [1 - 0.1 - 0.05], rtol=1e-5)


def test_clipping_comes_before_decay():
    values = run(make(clip_norm=1.0, momentum=0.0, weight_decay=0.5), [10.0])
    np.testing.assert_allclose(values, [1 - 0.1 * (1 + 0.5)], rtol=1e-6)


def test_what_is_frozen_stays_and_does_not_count_in_the_norm():
    optimizer = make(frozen=('norm', 'heads'), clip_norm=7.0, momentum=0.0, weight_decay=0.5)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 7.0 / 7**0.5), PARAMS)  # norm of conv's: 7
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    for name, update in updates.items():
        wanted = -0.1 * (7.0 / 7**0.5 + 0.5 * 2) if name == 'conv' else 0.0
        for leaf in jax.tree.leaves(update):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match=r"frozen has 'head', .* use some of conv, norm, heads"):
        make(frozen=('head',)).init(PARAMS)


def test_accumulated_gradients_are_averaged():
    values = run(make(accumulate=2, weight_decay=0.0), [1.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(values, [1, 0.8, 0.8, 0.8 - 0.1 * (0.9 * 2 + 6)], rtol=1e-6)


def test_mask_leaves_out_norms_and_biases():
    assert decay_mask(PARAMS) == {
        'conv': {'kernel': True, 'bias': False},
        'norm': {'scale': False},
        'heads': {'bias': False},
    }


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
@pytest.mark.parametrize('mask', ['none', 'norms_and_biases'])
def test_what_decays(name, mask):
    optimizer = make(name=name, decay_mask=mask, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    moved = jax.tree.map(lambda u: bool((u != 0).any()), updates)
    everything = jax.tree.map(lambda u: True, PARAMS)
    assert moved == (everything if mask == 'none' else decay_mask(PARAMS))


def schedule(steps: int = 100, steps_per_epoch: float = 10, **changes: object) -> list[float]:
    config = defaults().schedule
    config.update(changes)
    rate = make_schedule(config, 0.4, steps=steps, steps_per_epoch=steps_per_epoch)
    return [float(rate(step)) for step in range(steps)]


def test_cosine_with_warm_up():
    rates = schedule(name='cosine', warmup_epochs=2.0)
    np.testing.assert_allclose(rates[:21:5], [0, 0.1, 0.2, 0.3, 0.4], atol=1e-7)
    # 20 + 40 of the 80 steps after the warm-up: half; 20 + 60: (1 + cos 135 degrees) / 2
    np.testing.assert_allclose([rates[60], rates[80]], [0.2, 0.4 * 0.14644661], rtol=1e-5)
    assert rates[99] < 3e-4


def test_steps_fall_at_fractions_of_the_whole_run():
    rates = schedule(name='steps', boundaries=(0.5, 0.75), factor=0.1)
    expected = np.repeat([0.4, 0.04, 0.004], [50, 25, 25])
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    # The recipe keeps its form when the run is shorter, and warm-up does not move a boundary.
    rates = schedule(20, name='steps', boundaries=(0.5, 0.75), factor=0.1, warmup_epochs=0.4)
    expected = [0, 0.1, 0.2, 0.3] + [0.4] * 6 + [0.04] * 5 + [0.004] * 5
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_exponential_falls_after_each_epoch():
    rates = schedule(name='exponential', factor=0.5)
    np.testing.assert_allclose(rates, np.repeat(0.4 * 0.5 ** np.arange(10.0), 10), rtol=1e-6)
    # An epoch need not be a whole number of updates, and warm-up does not move its end.
    rates = schedule(9, steps_per_epoch=2.5, name='exponential', factor=0.5, warmup_epochs=0.8)
    expected = [0, 0.2, 0.4, 0.2, 0.2, 0.1, 0.1, 0.1, 0.05]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_constant():
    np.testing.assert_allclose(schedule(name='constant'), [0.4] * 100, rtol=1e-6)


def test_warm_up_must_be_shorter_than_the_run():
    message = 'warmup_epochs 10.0 must be shorter than the run of 10 epochs'
    with pytest.raises(ValueError, match=message):
        schedule(warmup_epochs=10.0)


def test_yolo_schedule_is_its_authors(x64):
    # Rates in each epoch, of github.com/bubbliiiing/yolov4-tiny-pytorch (commit 1bbb2f28).
    path = helpers.REFERENCE / 'detection' / 'schedule.json'
    for name, run in json.loads(path.read_text()).items():
        config = defaults().schedule
        config.name = 'yolo'
        rate, epochs = run['learning_rate'], run['epochs']
        schedule = make_schedule(config, rate, steps=7 * epochs, steps_per_epoch=7)
        for step in (0, 6):
            rates = [float(schedule(7 * epoch + step)) for epoch in range(epochs)]
            np.testing.assert_allclose(rates, run['values'], rtol=1e-12, err_msg=name)
