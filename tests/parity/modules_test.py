"""Our mechanisms against PyTorch modules whose weights they take over: timm's, and plain forms."""

import copy
import math
import zlib

import jax
import numpy as np
import pytest

from attention_jax.analysis import benchmark, mechanism_table
from attention_jax.interop.torch import from_state_dict, to_state_dict
from attention_jax.modules.registry import attention_entry, list_attention
from tests import helpers

torch = pytest.importorskip(
    'torch', reason="PyTorch is not installed: pip install 'attention_jax[parity]'"
)
forms = benchmark.load_forms()
norm = torch.nn.BatchNorm2d

CHANNELS = 160  # a sixteenth and an eighth of it are no multiples of timm's 8

# NAME/VARIANT of ours, and a word on what differs from it: timm's module as a function of
# `timm.layers` and the channels, and what ours is told beside the variant.
TIMM = {
    'se': (lambda t, c: t.SEModule(c, rd_divisor=1), {}),
    'se/timm': (lambda t, c: t.SEModule(c), {}),
    'se/timm_add_maxpool': (lambda t, c: t.SEModule(c, add_maxpool=True), {}),
    'se/timm_norm': (lambda t, c: t.SEModule(c, bias=False, norm_layer=norm), {}),
    'ese': (lambda t, c: t.EffectiveSEModule(c), {}),
    'ese/timm_add_maxpool': (lambda t, c: t.EffectiveSEModule(c, add_maxpool=True), {}),
    'ese/sigmoid': (lambda t, c: t.EffectiveSEModule(c, gate_layer='sigmoid'), {}),
    'eca': (lambda t, c: t.EcaModule(), {}),
    'eca/timm': (lambda t, c: t.EcaModule(c), {}),
    'eca/timm_circular': (lambda t, c: t.CecaModule(c), {}),
    # Its arrays do not tell the channels, and with them what the rules would give.
    'eca/timm_mlp': (
        lambda t, c: t.EcaModule(c, use_mlp=True),
        {'kernel_size': 5, 'hidden': 24},
    ),
    'cbam_channel/timm': (lambda t, c: t.cbam.ChannelAttn(c), {}),
    'cbam_channel/timm_light': (lambda t, c: t.cbam.LightChannelAttn(c), {}),
    'cbam_spatial/timm': (lambda t, c: t.cbam.SpatialAttn(), {}),
    'cbam_spatial/timm_light': (lambda t, c: t.cbam.LightSpatialAttn(), {}),
    'cbam/timm': (lambda t, c: t.cbam.CbamModule(c), {}),
    'cbam/timm_light': (lambda t, c: t.cbam.LightCbamModule(c), {}),
    'coordinate/timm': (lambda t, c: t.coord_attn.CoordAttn(c), {}),
    'coordinate/timm residual': (
        lambda t, c: t.coord_attn.CoordAttn(c, bias=True, act_layer=torch.nn.SiLU, has_skip=True),
        {'use_bias': True, 'activation': 'silu', 'residual': True},
    ),
    'gc/timm': (lambda t, c: t.GlobalContext(c), {}),
    'gc/timm both': (
        lambda t, c: t.GlobalContext(c, fuse_add=True),
        {'fusion': ('add', 'multiply')},
    ),
    'gc/timm average': (lambda t, c: t.GlobalContext(c, use_attn=False), {'pooling': 'average'}),
    'sk/timm': (lambda t, c: t.SelectiveKernel(c), {}),
    'sk/timm strides': (
        lambda t, c: t.SelectiveKernel(c, 2 * c, stride=2),
        {'features': 2 * CHANNELS, 'strides': 2},
    ),
    'sk': (
        lambda t, c: t.SelectiveKernel(c, groups=32, rd_channels=32, split_input=False),
        {},
    ),
    'split_attention/timm': (lambda t, c: t.SplitAttn(c, norm_layer=norm), {}),
    'split_attention/timm radix 1': (
        lambda t, c: t.SplitAttn(c, radix=1, norm_layer=norm),
        {'radix': 1},
    ),
    'split_attention/timm groups': (
        lambda t, c: t.SplitAttn(c, groups=2, radix=4, stride=2, norm_layer=norm),
        {'groups': 2, 'radix': 4, 'strides': 2},
    ),
    'non_local/timm': (lambda t, c: t.NonLocalAttn(c), {'hidden': 24}),
    'non_local/timm unscaled': (
        lambda t, c: t.NonLocalAttn(c, use_scale=False),
        {'hidden': 24, 'scale': None},
    ),
}


def randomize(module):
    """Gives every array random numbers: fresh modules have zeros that hide a difference."""
    for name, array in module.state_dict().items():
        if not array.is_floating_point():
            continue
        value = helpers.array(tuple(array.shape), zlib.crc32(name.encode()))
        if name.endswith('running_var'):
            value = 0.5 + value**2
        elif array.ndim > 1:
            value = value / math.sqrt(value[0].size)
        elif name.endswith('weight'):
            value = 1 + 0.3 * value
        array.copy_(torch.from_numpy(value))


def feature_map(shape, seed):
    """Normal numbers about means that differ, as a norm of the means needs them in float32."""
    return helpers.array(shape, seed) + helpers.array((*shape[:2], 1, 1), seed + 50)


def ours(array):
    """A tensor as our arrays are laid out."""
    array = array.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def assert_close(got, want, tolerance, what):
    """Equal up to `tolerance`, relative to the largest entry."""
    scale = np.abs(want).max()
    helpers.assert_close(got / scale, want / scale, tolerance, what)


def compare(name, arguments, module, shape, tolerance, inputs=1):
    """Compares outputs, gradients and new statistics with those of a module of random weights."""
    randomize(module)
    mine, variables, report = from_state_dict(name, module.state_dict(), **arguments)
    dtype = next(iter(module.state_dict().values())).dtype
    xs = [torch.from_numpy(feature_map(shape, i)).to(dtype) for i in range(inputs)]
    for train in (False, True):
        theirs = copy.deepcopy(module).train(train)
        leaves = [x.clone().requires_grad_() for x in xs]
        outputs = theirs(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [
            torch.from_numpy(helpers.array(tuple(y.shape), 9 + i)).to(dtype)
            for i, y in enumerate(outputs)
        ]
        torch.autograd.backward(outputs, cotangents)

        out, changed, by_params, by_inputs = helpers.value_and_gradients(
            mine, variables, tuple(map(ours, xs)), tuple(map(ours, cotangents)), train
        )
        mode = f'{name} {"train" if train else "eval"}'
        for got, want in zip(jax.tree.leaves(out), outputs, strict=True):
            assert_close(got, ours(want), tolerance, f'{mode}: output')
        for got, x in zip(jax.tree.leaves(by_inputs), leaves, strict=True):
            assert_close(got, ours(x.grad), tolerance, f'{mode}: gradient of the input')
        gradients = to_state_dict(name, {'params': by_params}, source=report.source, **arguments)
        want = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
        assert set(gradients) == set(want) - set(report.ignored)
        # Some are zero but for rounding, such as that of a bias before a norm.
        scale = max(np.abs(g).max() for g in want.values())
        for key, got in gradients.items():
            error = np.abs(got.reshape(want[key].shape) - want[key]).max() / scale
            assert error <= tolerance, f'{mode}: gradient of {key}: {error:.1e}'
        statistics = to_state_dict(name, changed, source=report.source, **arguments)
        buffers = dict(theirs.named_buffers())
        for key, got in statistics.items():
            assert_close(got, buffers[key].numpy(), tolerance, f'{mode}: {key}')
        counted = [key for key in buffers if not key.endswith('num_batches_tracked')]
        assert set(statistics) == set(counted)


def in_float64(name):
    """The tolerance: PyTorch's hard sigmoid takes a float32 sixth for its gradient."""
    return 1e-7 if name.partition('/')[0] == 'ese' else 1e-9


def compare_timm(case, dtype, tolerance):
    layers = forms.timm_layers()
    if not layers:
        pytest.skip("timm is not installed: pip install 'attention_jax[parity]'")
    build, further = TIMM[case]
    name, arguments = benchmark.variant(case.split()[0])
    module = build(layers, CHANNELS).to(dtype)
    compare(name, {**arguments, **further}, module, (8, CHANNELS, 7, 6), tolerance)


@pytest.mark.parametrize('case', TIMM)
def test_timm(case):
    compare_timm(case, torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('case', TIMM)
def test_timm_in_float64(x64, case):
    compare_timm(case, torch.float64, in_float64(case))


@pytest.mark.slow
@pytest.mark.parametrize('name', list_attention())
def test_plain_form(x64, name):
    """The authors' equations in PyTorch's layers: everything in float64."""
    if name not in forms.PLAIN:
        pytest.skip(f'benchmarks/torch_forms.py has no {name}')
    _, arguments = mechanism_table.example(name, (4, 16, 8, CHANNELS))
    if name == 'danet_head':
        arguments['dropout_rate'] = 0.0
    theirs = forms.PLAIN[name](CHANNELS, **arguments).double()
    maps = attention_entry(name).maps
    compare(name, arguments, theirs, (4, CHANNELS, 16, 8), in_float64(name), maps)
