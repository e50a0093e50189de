"""The ResNets: counts of every named one, values and gradients against the PyTorch originals."""

import gzip
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import registry
from attention_jax.functional import cost
from attention_jax.interop import torch
from tests import helpers

FOLDER = helpers.REFERENCE / 'networks'
COUNTS = json.loads((FOLDER / 'counts.json').read_text())
STORED = sorted(p.stem for p in FOLDER.glob('*.npz'))
QUICK = ('cifar_se_resnet20',)


def counted(name, channels=3, **arguments):
    model = attention_jax.create_model(name, **arguments)
    size = registry.model_entry(name).input_size
    x = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    with cost.tally() as counts:
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)
    return sum(leaf.size for leaf in jax.tree.leaves(variables['params'])), counts


@pytest.mark.parametrize('name', COUNTS)
def test_counts(name):
    row = COUNTS[name]
    entry = registry.model_entry(name)
    assert (*entry.input_size, 3) == tuple(row['input'])
    assert entry.num_classes == row['num_classes']
    parameters, counts = counted(name)
    assert parameters == row['params']
    assert counts['macs'] == row['macs']
    assert counts['matmul'] == row['matmul']


def test_a_mechanism_at_its_authors_place_is_the_named_network():
    assert counted('resnet50', attention='gc')[0] == 28_078_773
    kernels = tuple({'kernel_size': k} for k in (3, 5, 5, 7))
    by_hand = counted('resnet50', attention='eca', placement='branch', attention_args=kernels)
    assert by_hand == counted('eca_resnet50')
    assert counted('eca_resnet50', kernel_size='adaptive')[0] == 25_557_032 + 86
    assert counted('eca_resnet50', attention='se') == counted('resnet50', attention='se')


def generator(name, seed):
    return np.random.RandomState(zlib.crc32(f'{seed}/{name}'.encode()))


def drawn(name, shape, seed):
    """A parameter or statistic from its name alone, as the stored values were made."""
    r, last = generator(name, seed), name.rpartition('.')[2]
    if last == 'running_mean':
        return 0.1 * r.standard_normal(shape)
    if last == 'running_var':
        return 0.5 + r.random_sample(shape)
    if len(shape) >= 2:
        return r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    if last == 'weight':
        return 0.5 + r.random_sample(shape)
    return 0.1 * r.standard_normal(shape)


def sample(array):
    flat = np.asarray(array).ravel()
    return flat[np.linspace(0, flat.size - 1, min(flat.size, 64)).round().astype(int)]


@pytest.mark.parametrize(
    'name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STORED]
)
def test_values_and_gradients(x64, name):
    stored = dict(np.load(FOLDER / f'{name}.npz'))
    meta = json.loads(str(stored.pop('meta')))
    names = json.loads(gzip.decompress((FOLDER / f'{name}.json.gz').read_bytes()))
    seed, buffers = meta['seed'], [n for n in names['buffers'] if 'num_batches' not in n]
    shapes = {**names['parameters'], **names['buffers']}
    state = {n: drawn(n, shapes[n], seed) for n in [*names['parameters'], *buffers]}
    arguments = {'num_classes': meta['outputs'][0][1]}
    model, variables, report = torch.from_state_dict(name, state, **arguments)
    x = np.moveaxis(generator('input', seed).standard_normal(meta['input']), 1, -1)
    cotangent = generator('cotangent/0', seed).standard_normal(meta['outputs'][0])
    for mode in ('eval', 'train'):
        part = helpers.prefixed(stored, f'{mode}/')
        if not part:
            continue
        out, changed, by_params, (by_x,) = helpers.value_and_gradients(
            model, variables, (x,), cotangent, mode == 'train'
        )
        helpers.assert_close(sample(out), part['output/0'], what=f'{mode}/output')
        helpers.assert_close(np.linalg.norm(out), part['output_norm/0'], what=f'{mode}/output_norm')
        nchw = np.moveaxis(np.asarray(by_x), -1, 1)
        largest = np.abs(part['grad_input']).max()
        np.testing.assert_allclose(sample(nchw), part['grad_input'], atol=1e-8 * largest, rtol=1e-7)
        gradients = torch.to_state_dict(
            name, {'params': by_params}, source=report.source, **arguments
        )
        norms = np.array([np.linalg.norm(gradients[n]) for n in names['parameters']])
        want = part['grad_norm']
        felt = want > 1e-9 * want.max()
        np.testing.assert_allclose(norms[felt], want[felt], rtol=1e-7)
        assert (norms[~felt] < 1e-8 * want.max()).all()
        if mode == 'train':
            after = torch.to_state_dict(name, changed, source=report.source, **arguments)
            got = np.array([np.linalg.norm(after[n]) for n in buffers])
            np.testing.assert_allclose(got, part['after_norm'], rtol=1e-7)


def test_stages_and_head():
    model = attention_jax.create_model('tiny_resnet', num_classes=0, attention='se')
    x = jnp.asarray(helpers.array((2, 16, 24, 1), dtype=np.float32))
    variables = model.init(jax.random.key(0), x)
    features, stages = model.apply(variables, x, return_stages=True)
    shapes = {name: stage.shape for name, stage in stages.items()}
    assert shapes == {
        'stem': (2, 16, 24, 16),
        'stage1': (2, 16, 24, 16),
        'stage2': (2, 8, 12, 32),
        'stage3': (2, 4, 6, 64),
        'pre_logits': (2, 64),
    }
    np.testing.assert_array_equal(features, stages['pre_logits'])


def test_zero_initialised_last_scale_starts_every_block_as_its_shortcut():
    model = attention_jax.create_model('tiny_resnet', zero_init_last=True)
    x = jnp.asarray(helpers.array((1, 8, 8, 3), dtype=np.float32))
    variables = model.init(jax.random.key(0), x)
    _, stages = model.apply(variables, x, return_stages=True)
    np.testing.assert_array_equal(stages['stem'], stages['stage1'])


@pytest.mark.parametrize(
    ('name', 'arguments', 'word'),
    [
        ('resnet51', {}, 'resnet50'),
        ('resnet50', {'attention': 'see'}, 'did you mean'),
        ('resnet50', {'attentoin': 'se'}, 'attention'),
        ('resnet50', {'attention': 'se', 'placement': 'here'}, 'placement'),
        ('resnet50', {'attention': 'se', 'placement': 'branch@5'}, 'stage 5'),
        ('resnet50', {'attention': 'se', 'placement': 'branch@1:3'}, 'block 3'),
        ('resnet50', {'attention': 'se', 'placement': 'branch@'}, 'cannot be read'),
        ('resnet50', {'attention': 'se', 'placement': 'expanded'}, 'MobileNetV2'),
        ('resnet50', {'attention': 'se', 'placement': 'conv2'}, 'convolution'),
        ('resnet18', {'attention': 'se', 'placement': 'mid'}, 'bottleneck'),
        ('resnet50', {'placement': 'branch'}, 'attention'),
        ('resnet50', {'attention': 'se', 'attention_args': ({},) * 3}, 'attention_args'),
        ('eca_resnet50', {'kernel_size': (3, 5)}, 'kernel_size'),
        ('resnet50', {'num_classes': -1}, 'num_classes'),
        ('resnet50', {'block': 'wide'}, 'block'),
        ('resnet50', {'stem': 'cnn'}, 'stem'),
        ('resnet50', {'stride_in': 'conv3'}, 'stride_in'),
        ('resnet50', {'shortcut': 'none'}, 'shortcut'),
    ],
)
def test_bad_arguments_are_named(name, arguments, word):
    with pytest.raises(ValueError, match=word):
        attention_jax.create_model(name, **arguments)


def test_images_smaller_than_the_stride_are_refused():
    model = attention_jax.create_model('resnet18')
    with pytest.raises(ValueError, match='32 x 32'):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 64, 3)))


def test_gradient_of_a_maximum_inside_a_network(x64):
    """XLA computes what a maximum is taken of more than once, and rounds it differently."""
    model = attention_jax.create_model('tiny_resnet', attention='cbam')
    x = helpers.array((4, 16, 16, 3))
    variables = helpers.random_variables(model, x)
    _, _, _, (by_x,) = helpers.value_and_gradients(model, variables, (x,), 1.0, False)
    assert np.isfinite(by_x).all()
