import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax import CrossLayerNonLocal
from attention_jax.interop import torch
from tests import helpers

# What `contract_test.py` expects.
CONTRACT = {'cross_layer_non_local': {'counts': (33_280, 732_168_192)}}

X, LARGE, SMALL = (2, 3, 4, 16), (2, 5, 4, 6), (2, 2, 2, 10)


def reading(layout='released', scale=None, residual=True, train=False):
    """The equations in plain arrays."""

    def read(xp, variables, x, others):
        params = variables['params']
        b, h, w, _ = x.shape
        others = others if isinstance(others, tuple) else (others,)

        def dense(y, name):
            y = y.reshape(b, -1, y.shape[-1]) @ params[name]['kernel']
            return y + params[name]['bias'][None, None] if 'bias' in params[name] else y

        q = dense(x, 'query')
        d = q.shape[-1]
        out = x if residual else 0 * x
        for r, other in enumerate(others):
            k, v = dense(other, f'key_{r}'), dense(other, f'value_{r}')
            a = xp.exp((d**-0.5 if scale is None else scale) * xp.einsum('bnd,bmd->bnm', q, k))
            y = xp.einsum('bnm,bmd->bnd', a / a.sum(-1, keepdims=True), v)
            if layout == 'released':
                y = xp.moveaxis(y.reshape(b, d, h, w), 1, -1)
            z = dense(y, 'out' if 'out' in params else f'out_{r}').reshape(x.shape)
            if f'norm_{r}' in params:
                z = helpers.normalize(xp, variables, (f'norm_{r}',), z, train)
            out = out + z
        return out

    return read


@pytest.mark.parametrize(
    ('arguments', 'options', 'shapes'),
    [
        ({}, {}, (LARGE, SMALL)),
        ({'layout': 'positions', 'share_output': False}, {'layout': 'positions'}, (SMALL, LARGE)),
        (
            {'normalization': None, 'residual': False, 'use_bias': True, 'hidden': 3},
            {'residual': False},
            (LARGE,),
        ),
        ({'scale': 0.3, 'chunk_size': 5}, {'scale': 0.3}, (LARGE,)),
    ],
    ids=['released', 'positions', 'bare', 'scale'],
)
def test_equation(x64, arguments, options, shapes):
    others = tuple(helpers.array(shape, i) for i, shape in enumerate(shapes, 1))
    helpers.check(CrossLayerNonLocal(**arguments), reading(**options), helpers.array(X), others)


def test_equation_in_training(x64):
    others = helpers.array(LARGE, 1), helpers.array(SMALL, 2)
    helpers.check(CrossLayerNonLocal(), reading(train=True), helpers.array(X), others, train=True)


def test_one_map_is_a_sequence_of_one():
    x, other = (jnp.asarray(helpers.array(s, dtype=np.float32)) for s in (X, SMALL))
    module = CrossLayerNonLocal()
    variables = helpers.random_variables(module, x, other, dtype=np.float32)
    np.testing.assert_array_equal(
        module.apply(variables, x, other), module.apply(variables, x, others=[other])
    )
    np.testing.assert_array_equal(
        module.apply(module.init(jax.random.key(0), x, other), x, other), x
    )


@pytest.mark.parametrize('layout', ['released', 'positions'])
def test_only_positions_follow_a_permutation(layout):
    x, other = (jnp.asarray(helpers.array(s, dtype=np.float32)) for s in (X, SMALL))
    order = np.random.default_rng(0).permutation(12)
    module = CrossLayerNonLocal(layout=layout)
    variables = jax.tree.map(
        jnp.asarray, helpers.random_variables(module, x, other, dtype=np.float32)
    )
    shuffled = x.reshape(2, 12, 16)[:, order].reshape(x.shape)
    moved = module.apply(variables, shuffled, other).reshape(2, 12, 16)
    stayed = module.apply(variables, x, other).reshape(2, 12, 16)[:, order]
    assert (np.abs(moved - stayed).max() < 1e-5) == (layout == 'positions')


def test_maps():
    x, *others = (jnp.asarray(helpers.array(s, dtype=np.float32)) for s in (X, LARGE, SMALL))
    module = CrossLayerNonLocal()
    variables = module.init(jax.random.key(0), x, others)
    maps = attention_jax.attention_maps(module, variables, x, others, queries=(3, 7))
    assert {k: v.shape for k, v in maps.items()} == {'map_0': (2, 2, 20), 'map_1': (2, 2, 4)}


def test_weights_say_the_channels_of_the_responses():
    path = helpers.REFERENCE / 'cross_layer_non_local' / 'released.npz'
    meta, arrays = helpers.load_case(path)
    state = helpers.prefixed(arrays, 'state/')
    module, variables, report = torch.from_state_dict(
        'cross_layer_non_local', state, **meta['arguments']
    )
    assert report.faults == 0
    x, *others = (np.moveaxis(y, 1, -1) for y in helpers.inputs_of(arrays))
    jax.eval_shape(module.apply, variables, x, others)
    none = {k: v for k, v in state.items() if not k.startswith('p')}
    with pytest.raises(ValueError, match='accepts no input'):
        torch.from_state_dict('cross_layer_non_local', none, **meta['arguments'])


def test_it_has_no_place_in_a_backbone():
    with pytest.raises(ValueError, match='no place inside a backbone'):
        attention_jax.create_model('tiny_resnet', attention='cross_layer_non_local').init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )


@pytest.mark.parametrize(
    ('arguments', 'others', 'word'),
    [
        ({'layout': 'transposed'}, (SMALL,), 'layout'),
        ({'normalization': 'layer'}, (SMALL,), 'normalization'),
        ({'scale': 'width'}, (SMALL,), 'scale'),
        ({'reduction': 17}, (SMALL,), 'reduction 17'),
        ({'hidden': 0}, (SMALL,), 'hidden'),
        ({'chunk_size': 0}, (SMALL,), 'chunk_size'),
        ({}, (), 'others must hold at least one'),
        ({}, (SMALL, (3, 2, 2, 10)), 'others must be maps'),
        ({}, ((2, 2, 10),), 'others must be maps'),
        ({}, ((2, 0, 2, 10),), 'others must have no empty axis'),
    ],
)
def test_bad_arguments_are_named(arguments, others, word):
    with pytest.raises(ValueError, match=word):
        CrossLayerNonLocal(**arguments).init(
            jax.random.key(0), jnp.zeros(X), [jnp.zeros(shape) for shape in others]
        )
