import functools

import jax
import jax.numpy as jnp
import pytest

import attention_jax
from attention_jax.modules.static import Static


def _network(reduction):
    # Arguments are a dict: the network has no hash of its own.
    args = {'reduction': reduction}
    return attention_jax.create_model('tiny_resnet', attention='se', attention_args=args)


def test_equal_by_value():
    with pytest.raises(TypeError, match='unhashable'):
        hash(_network(4))
    assert Static(_network(4)) == Static(_network(4))
    assert hash(Static(_network(4))) == hash(Static(_network(4)))
    assert Static(_network(4)) != Static(_network(8))
    assert Static(_network(4)) != _network(4)


def test_a_program_a_module():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(static, x):
        traces.append(static)
        return x

    for reduction in (4, 8, 4):
        run(Static(_network(reduction)), jnp.ones(2))
    assert len(traces) == 2
