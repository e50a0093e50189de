import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from attention_jax.functional import cost
from attention_jax.modules import CrissCrossAttention, NonLocal
from tests import helpers

X = jnp.asarray(helpers.array((3, 4, 6, 8), dtype=np.float32))


class Two(nn.Module):
    """Mechanisms with 24 and 6 positions; the first with two maps."""

    @nn.compact
    def __call__(self, x):
        x = CrissCrossAttention(recurrence=2, name='cross')(x)
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return NonLocal(pool_size=1, name='pairs')(x)


def _queries(cross, pairs):
    return {'cross': {'positions': jnp.int32(cross)}, 'pairs': {'positions': jnp.int32(pairs)}}


def _variables():
    return jax.tree.map(jnp.asarray, helpers.random_variables(Two(), X, dtype=np.float32))


def _maps(variables, x):
    return Two().apply(variables, x, mutable=['attention_maps'])[1]['attention_maps']


def test_queries_are_an_input_of_a_jitted_function():
    """One function, with and without queries and with others: always the rows asked for."""
    traces = []

    @jax.jit
    def maps(variables, x):
        traces.append(x.shape)
        return _maps(variables, x)

    variables = _variables()
    whole = maps(variables, X)
    assert whole['cross']['pass_0'].shape == (3, 4, 6, 10)
    assert whole['pairs']['map'].shape == (3, 6, 6)
    for cross, pairs in (((5, 23), (0,)), ((1, 0), (4,)), ((7, 7), (5,))):
        rows = maps({**variables, 'attention_queries': _queries(cross, pairs)}, X)
        for name in ('pass_0', 'pass_1'):
            want = whole['cross'][name].reshape(3, 24, 10)[:, jnp.asarray(cross)]
            helpers.assert_close(rows['cross'][name], want, 1e-5)
        want = whole['pairs']['map'][:, jnp.asarray(pairs)]
        helpers.assert_close(rows['pairs']['map'], want, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, maps(variables, X), whole)
    assert len(traces) == 2


def test_each_example_its_own_queries():
    variables = _variables()
    cross, pairs = jnp.asarray([[5], [0], [23]]), jnp.asarray([[1], [2], [0]])

    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def maps(variables, queries, x):
        return _maps({**variables, 'attention_queries': queries}, x)

    whole = jax.jit(_maps)(variables, X)
    rows = jax.jit(maps)(variables, _queries(cross, pairs), X)
    for i in range(3):
        want = whole['cross']['pass_1'].reshape(3, 24, 10)[i, cross[i]]
        helpers.assert_close(rows['cross']['pass_1'][i], want, 1e-5)
        helpers.assert_close(rows['pairs']['map'][i], whole['pairs']['map'][i, pairs[i]], 1e-5)


def test_a_mechanism_says_how_many_positions_it_has():
    variables = _variables()
    assert 'attention_queries' not in variables
    both = ['attention_maps', 'attention_queries']
    _, found = jax.eval_shape(functools.partial(Two().apply, mutable=both), variables, X)
    shapes = jax.tree.map(lambda leaf: leaf.shape, found['attention_queries'])
    assert shapes == {'cross': {'positions': (24,)}, 'pairs': {'positions': (6,)}}


def test_a_picture_is_no_work_of_the_mechanism():
    counts = []
    for collections in ([], ['attention_maps']):
        with cost.tally() as found:
            jax.eval_shape(functools.partial(Two().apply, mutable=collections), _variables(), X)
        counts.append(found)
    assert counts[0] == counts[1]
    assert counts[0]['matmul'] > 0
