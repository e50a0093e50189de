import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import functional


def test_nearest_repeats():
    x = jnp.arange(12.0).reshape(1, 2, 3, 2)
    want = np.repeat(np.repeat(x, 3, 1), 3, 2)
    np.testing.assert_array_equal(functional.upsample(x, 3), want)
    np.testing.assert_array_equal(functional.upsample(x, 1), x)


def test_bilinear_is_pytorchs():
    """Corners not aligned: a row of 0, 4 enlarged by 4, as PyTorch gives it."""
    x = jnp.asarray([0.0, 4.0]).reshape(1, 1, 2, 1)
    row = functional.upsample(x, 4, 'bilinear')[0, 0, :, 0]
    np.testing.assert_allclose(row, [0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4], atol=1e-6)


@pytest.mark.parametrize(
    ('arguments', 'word'), [((0,), 'factor'), ((2, 'cubic'), 'method'), ((2,), r'x must be')]
)
def test_bad_arguments_are_named(arguments, word):
    x = jnp.zeros((2, 2) if word == r'x must be' else (2, 2, 2))
    with pytest.raises(ValueError, match=word):
        functional.upsample(x, *arguments)
