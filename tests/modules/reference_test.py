"""Every mechanism against its authors' outputs, gradients, statistics and maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax.interop import torch
from tests import helpers

REGISTERED = set(attention_jax.list_attention())
STORED = [p for p in helpers.reference_cases() if p.parent.name in REGISTERED]
SHARED = [
    p
    for p in helpers.reference_cases(
        folder=helpers.REFERENCE.parents[1].parent / 'shared' / 'reference'
    )
    if p.parent.name in REGISTERED
]

# Called with a map and a sequence of maps.
TAKES_A_SEQUENCE = ('cross_layer_non_local',)

# One case a mechanism for the quick tests; the slow ones run them all.
FIRST = {path.parent: path for path in reversed(STORED)}.values()


def identity(path):
    return f'{path.parent.name}/{path.stem}'


def channel_last(array, layout):
    return np.moveaxis(array, 1, -1) if layout.startswith('NC') and array.ndim > 2 else array


def compare(path):
    meta, arrays = helpers.load_case(path)
    name, arguments = meta['mechanism'], meta['arguments']
    state = helpers.prefixed(arrays, 'state/')
    module, variables, report = torch.from_state_dict(name, state, strict=False, **arguments)
    unused = set(report.unused) - set(meta.get('unused', ()))
    assert not report.missing, report
    assert not report.mismatched, report
    assert not unused, report

    inputs = tuple(channel_last(x, meta['layout']) for x in helpers.inputs_of(arrays))
    if name in TAKES_A_SEQUENCE:
        inputs = inputs[0], inputs[1:]
    cotangent = tuple(
        channel_last(g, meta['layout']) for g in helpers.inputs_of(arrays, 'cotangent')
    )
    for mode in ('eval', 'train'):
        part = helpers.prefixed(arrays, f'{mode}/')
        if not part:
            continue
        out, changed, by_params, by_inputs = helpers.value_and_gradients(
            module, variables, inputs, cotangent, mode == 'train'
        )
        outputs = out if isinstance(out, tuple) else (out,)
        for got, want in zip(outputs, helpers.inputs_of(part, 'output'), strict=True):
            helpers.assert_close(got, channel_last(want, meta['layout']), what=f'{mode}/output')
        for i, got in enumerate(jax.tree.leaves(by_inputs), 1):
            key = 'grad_input' if i == 1 else f'grad_input{i}'
            helpers.assert_close(got, channel_last(part[key], meta['layout']), what=f'{mode}/{key}')
        gradients = torch.to_state_dict(
            name, {'params': by_params}, source=report.source, **arguments
        )
        for key, want in helpers.prefixed(part, 'grad/').items():
            if key in report.unused:
                continue
            got = gradients[key]
            helpers.assert_close(got.reshape(want.shape), want, what=f'{mode}/grad/{key}')
        after = helpers.prefixed(part, 'after/')
        if after:
            buffers = torch.to_state_dict(name, changed, source=report.source, **arguments)
            for key, want in after.items():
                if not key.endswith('num_batches_tracked'):
                    helpers.assert_close(
                        buffers[key].reshape(want.shape), want, what=f'{mode}/after/{key}'
                    )
        maps = {k: v for k, v in part.items() if k == 'map' or k.startswith('map/')}
        if mode == 'eval' and maps:
            _, sown = module.apply(variables, *inputs, mutable=['attention_maps'])
            got_maps = jax.tree.leaves(sown['attention_maps'])
            assert len(got_maps) >= len(maps)
            for key, want in maps.items():
                # By size and value: names and axes of length 1 differ between sources. A gate of
                # every entry has its channels last, as x.
                entries = channel_last(want, meta['layout'])
                errors = [
                    np.abs(g - entries).max()
                    if g.shape == inputs[0].shape
                    else np.abs(np.asarray(g).reshape(want.shape) - want).max()
                    for g in got_maps
                    if g.size == want.size
                ]
                assert errors, f'{key}: no map of {want.size} entries'
                assert min(errors) <= 1e-9 * max(1, np.abs(want).max()), f'{mode}/{key}: {errors}'
    assert all(y.dtype == jnp.float64 for y in outputs)


@pytest.mark.parametrize(
    'path',
    [p if p in FIRST else pytest.param(p, marks=pytest.mark.slow) for p in STORED],
    ids=identity,
)
def test_stored_case(x64, path):
    compare(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    'path', [p for p in SHARED if identity(p) not in {identity(s) for s in STORED}], ids=identity
)
def test_further_case(x64, path):
    compare(path)


@pytest.mark.parametrize('path', STORED, ids=identity)
def test_names_survive_a_round_trip(path):
    meta, arrays = helpers.load_case(path)
    state = helpers.prefixed(arrays, 'state/')
    _, variables, report = torch.from_state_dict(
        meta['mechanism'], state, strict=False, **meta['arguments']
    )
    back = torch.to_state_dict(
        meta['mechanism'], variables, source=report.source, **meta['arguments']
    )
    for key, value in back.items():
        assert value.dtype == state[key].dtype
        np.testing.assert_array_equal(value.reshape(state[key].shape), state[key])
    assert set(back) == {
        k
        for k in state
        if not k.endswith('num_batches_tracked') and k not in (*report.unused, *report.ignored)
    }
