"""Networks against timm's, weights mapped: outputs, stages, and the gradients of a training step.

Needs the extra `parity`. Each network takes a minute or so; the test of one is chosen by
`pytest -m slow tests/parity/networks_test.py -k resnest14d`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.analysis import benchmark
from attention_jax.interop import torch as interop
from attention_jax.models.registry import list_models
from tests import helpers

REASON = "needs PyTorch and timm: pip install 'attention_jax[parity]'"
torch = pytest.importorskip('torch', reason=REASON)
if benchmark.load_forms().timm_layers() is None:
    pytest.skip(REASON, allow_module_level=True)
timm = pytest.importorskip('timm', reason=REASON)

NAMES = sorted(set(list_models()) & set(timm.list_models()))
SIZE = 128
# Of gradients, relative to the largest. The deep ResNeSts normalise two pooled vectors in each of
# their blocks, so that rounding grows with the gradient (to 2e8 in the stem of 101 layers).
TOLERANCE = {'resnest101e': 1e-5, 'resnest200e': 1e-5, 'resnest269e': 1e-5}
# With weights of any size these two are chaotic, and float32 says nothing of them: in float64,
# weights moved by half a unit in the last place of float32 move resnest200e's logits by 6e-4, and
# PyTorch's own float32 is off by 2e-4 there, by 0.15 in resnest269e. They keep timm's own random
# weights; only the running statistics are drawn.
TIMM_WEIGHTS = ('resnest200e', 'resnest269e')
pytestmark = pytest.mark.slow


def filled(name):
    """timm's network in float64, every array drawn from its name."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).double()
    state = {
        key: torch.from_numpy(np.asarray(helpers.drawn(key, tuple(value.shape))))
        if value.is_floating_point() and (name not in TIMM_WEIGHTS or 'running_' in key)
        else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def relative(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def channels_last(array):
    return np.moveaxis(array.detach().numpy(), 1, -1)


@pytest.mark.parametrize('name', NAMES)
def test_network(x64, name):
    theirs = filled(name)
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    model, variables, report = interop.from_state_dict(name, state, dropout_rate=0.0)
    x = helpers.generator('input').standard_normal((2, SIZE, SIZE, 3))
    image = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    rest = {k: v for k, v in variables.items() if k != 'params'}

    theirs.eval()
    with torch.no_grad():
        want = theirs(image)
        want_stages = theirs.forward_intermediates(image, intermediates_only=True)[-4:]
    evaluate = jax.jit(lambda v, x: model.apply(v, x, return_stages=True))
    logits, stages = evaluate(variables, x)
    assert relative(logits, want) < 1e-8
    ours = [stages[key] for key in sorted(stages) if key.startswith('stage')]
    if 'features' in stages:  # timm counts them to the last stage
        ours[-1] = stages['features']
    if len(ours) == 7:  # MobileNetV2: timm has the last of each resolution
        ours = [ours[i] for i in (1, 2, 4, 6)]
    for stage, want_stage in zip(ours, want_stages, strict=True):
        assert relative(stage, channels_last(want_stage)) < 1e-8

    single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (variables, x))
    half, _ = evaluate(*single)
    assert half.dtype == jnp.float32
    assert relative(half, want) < 1e-3

    cotangent = helpers.generator('cotangent/0').standard_normal(want.shape)
    theirs.train()
    for layer in theirs.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    theirs.drop_rate = 0.0  # of the networks that call the function
    (theirs(image) * torch.from_numpy(cotangent)).sum().backward()

    @jax.jit
    def gradients(params):
        def loss(params):
            out, _ = model.apply({'params': params, **rest}, x, train=True, mutable=['batch_stats'])
            return (out * cotangent).sum()

        return jax.grad(loss)(params)

    by_params = {'params': gradients(variables['params'])}
    mine = interop.to_state_dict(name, by_params, source=report.source)
    want_grads = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    assert set(mine) == set(want_grads)
    largest = max(np.abs(g).max() for g in want_grads.values())
    for key, want_grad in want_grads.items():
        bound = TOLERANCE.get(name, 1e-6) * largest
        assert np.abs(mine[key] - want_grad).max() < bound, key
