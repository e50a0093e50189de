import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.functional import branch_mean, branch_softmax
from tests import helpers


def test_two_branches_are_one_sigmoid():
    branches = jnp.asarray(helpers.array((2, 3, 4, 5, 6), dtype=np.float32))
    logits = jnp.asarray(helpers.array((3, 2, 6), 1, np.float32))
    out, weights = branch_softmax(list(branches), logits)
    first = jax.nn.sigmoid(logits[:, 0] - logits[:, 1])
    np.testing.assert_allclose(weights, jnp.stack([first, 1 - first], 1), atol=1e-6)
    gate = first[:, None, None]
    np.testing.assert_allclose(out, gate * branches[0] + (1 - gate) * branches[1], atol=1e-6)
    np.testing.assert_allclose(branch_mean(list(branches)), branches.sum(0).mean((1, 2)), atol=1e-6)


def test_types_and_large_logits():
    branches = [jnp.ones((2, 2, 3), jnp.bfloat16)] * 3
    out, weights = branch_softmax(branches, jnp.full((3, 3), 1e30, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(out, 1)


def test_logits_must_fit():
    with pytest.raises(ValueError, match='logits'):
        branch_softmax([jnp.ones((2, 2, 3))] * 2, jnp.ones((3, 3)))
