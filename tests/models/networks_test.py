"""Every network: its counts, and values and gradients against the PyTorch originals."""

import gzip
import json
import re

import jax
import numpy as np
import pytest

import attention_jax
from attention_jax.interop import torch
from attention_jax.models.registry import model_entry
from tests import helpers

FOLDER = helpers.REFERENCE / 'networks'
COUNTS = json.loads((FOLDER / 'counts.json').read_text())
STORED = sorted(p.stem for p in FOLDER.glob('*.npz'))
QUICK = ('cifar_se_resnet20',)


# GSoP's code centres covariances by a product with a square matrix, which its counts include and
# which nothing needs: that of the channels over 784, 784, 196, 196 positions, of the cells over 128
# channels in each stage, and of Net2's head over 196 positions.
CENTRING = {
    'channel': 128 * (784**2 + 784**2 + 196**2 + 196**2),
    'position': 4 * 64 * 128**2,
    'net2': 128 * (784**2 + 784**2 + 196**2) + 256 * 196**2,
}


def centring(name):
    if not name.startswith('gsop'):
        return 0
    if name.startswith('gsop_net2'):
        return CENTRING['net2']
    if name.endswith('position'):
        return CENTRING['position']
    fused = name.endswith(('average', 'concat', 'max'))
    return CENTRING['channel'] + (CENTRING['position'] if fused else 0)


DEEP = re.compile(r'.*(101|152|154|200|269|_100|_140).*')  # a second and more each


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=pytest.mark.slow) if DEEP.fullmatch(n) else n for n in COUNTS]
)
def test_counts(name):
    row = COUNTS[name]
    entry = model_entry(name)
    assert (*entry.input_size, 3) == tuple(row['input'])
    assert entry.num_classes == (row['num_classes'] or 0)
    model = attention_jax.create_model(name, num_classes=row['num_classes'])
    parameters, macs, matmul = helpers.counted(model, (1, *row['input']))
    assert (parameters, macs) == (row['params'], row['macs'])
    assert matmul == row['matmul'] - centring(name)


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
    state = {n: helpers.drawn(n, shapes[n], seed) for n in [*names['parameters'], *buffers]}
    if 'yolo' in name:
        arguments = {'num_classes': COUNTS[name]['num_classes']}
    else:
        arguments = {'num_classes': meta['outputs'][0][1], 'dropout_rate': 0.0}
    model, variables, report = torch.from_state_dict(name, state, **arguments)
    x = np.moveaxis(helpers.generator('input', seed).standard_normal(meta['input']), 1, -1)
    # Channels last; one array, or a list of the outputs of a network that has several.
    cotangents = [
        np.moveaxis(helpers.generator(f'cotangent/{i}', seed).standard_normal(shape), 1, -1)
        for i, shape in enumerate(meta['outputs'])
    ]
    # The stored training call of timm's legacy networks had its dropout on.
    for mode in ('eval',) if name.startswith('legacy') else ('eval', 'train'):
        part = helpers.prefixed(stored, f'{mode}/')
        if not part:
            continue
        out, changed, by_params, (by_x,) = helpers.value_and_gradients(
            model, variables, (x,), cotangents, mode == 'train'
        )
        for i, output in enumerate(jax.tree.leaves(out)):
            what, nchw = f'{mode}/output/{i}', np.moveaxis(output, -1, 1)
            helpers.assert_close(sample(nchw), part[f'output/{i}'], what=what)
            helpers.assert_close(np.linalg.norm(nchw), part[f'output_norm/{i}'], what=what)
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
