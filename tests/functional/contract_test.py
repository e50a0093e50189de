import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.functional import contract, cost
from tests import helpers


def traced(pattern, *shapes, dtype=jnp.float32, **options):
    """The shape, type and counts of a contraction."""
    structs = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    with cost.tally() as counts:
        y = jax.eval_shape(lambda a, b: contract(pattern, a, b, **options), *structs)
    return y.shape, y.dtype, counts


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16, np.float64])
def test_wide_sums_of_narrow_arrays(x64, dtype):
    """The product of rounded arrays, itself not rounded; float64 stays what it is."""
    a, b = (jnp.asarray(helpers.array(s), dtype) for s in ((2, 5, 300), (2, 7, 300)))
    got = jax.jit(lambda a, b: contract('...nd,...md->...nm', a, b))(a, b)
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    want = np.einsum('bnd,bmd->bnm', np.asarray(a, np.float64), np.asarray(b, np.float64))
    helpers.assert_close(got, want, 1e-12 if dtype == np.float64 else 1e-5)


def test_the_arrays_keep_their_type_in_the_program():
    text = jax.jit(lambda a, b: contract('...nd,...md->...nm', a, b)).lower(
        *2 * [jnp.zeros((2, 3, 4), jnp.bfloat16)]
    )
    (line,) = (s for s in text.as_text().splitlines() if 'dot_general' in s)
    assert '(tensor<2x3x4xbf16>, tensor<2x3x4xbf16>) -> tensor<2x3x3xf32>' in line


def test_leading_axes_are_free_and_broadcast():
    a, b = (helpers.array(s, dtype=np.float32) for s in ((2, 1, 5, 3), (4, 6, 3)))
    got = contract('...nd,...md->...nm', a, b)
    assert got.shape == (2, 4, 5, 6)
    helpers.assert_close(got, np.einsum('aznd,zmd->aznm', a.repeat(4, 1), b), 1e-6)
    assert contract('...nd,...md->...nm', a[0, 0], b[0]).shape == (5, 6)


@pytest.mark.parametrize(
    ('pattern', 'shapes', 'number'),
    [
        ('...nd,...md->...nm', ((5, 3), (7, 3)), 5 * 7 * 3),
        ('...nd,...md->...nm', ((2, 8, 5, 3), (2, 8, 7, 3)), 16 * 5 * 7 * 3),
        ('...nd,...md->...nm', ((2, 1, 5, 3), (8, 7, 3)), 16 * 5 * 7 * 3),
        ('...hwc,cgk->...hwgk', ((2, 4, 5, 6), (6, 3, 7)), 2 * 4 * 5 * 6 * 3 * 7),
        ('bhwi,bhwj->bij', ((2, 4, 5, 6), (2, 4, 5, 6)), 2 * 4 * 5 * 36),
        ('...n,...nd->...d', ((2, 5), (2, 5, 3)), 30),
        ('...nd,...d->...n', ((0, 5, 3), (0, 3)), 0),
        ('ii,i->i', ((4, 4), (4,)), 4),
    ],
)
def test_counts_are_the_product_of_the_letters(pattern, shapes, number):
    _, _, counts = traced(pattern, *shapes)
    assert counts == {'macs': 0, 'matmul': number}
    _, _, counts = traced(pattern, *shapes, count='macs')
    assert counts == {'macs': number, 'matmul': 0}
    _, _, counts = traced(pattern, *shapes, count=None)
    assert counts == {'macs': 0, 'matmul': 0}


def test_a_letter_of_length_one_broadcasts_and_counts_as_the_other():
    shape, _, counts = traced('...nd,...nd->...n', (5, 1), (5, 3))
    assert shape == (5,)
    assert counts['matmul'] == 15
    shape, _, counts = traced('...nd,...nd->...n', (5, 3), (5, 1))
    assert shape == (5,)
    assert counts['matmul'] == 15


def test_gradients(x64):
    a, b, g = (helpers.array(s) for s in ((2, 5, 3), (2, 7, 3), (2, 5, 7)))
    y, pull = jax.vjp(lambda a, b: contract('...nd,...md->...nm', a, b), a, b)
    helpers.assert_close(y, np.einsum('bnd,bmd->bnm', a, b), 1e-12)
    by_a, by_b = pull(jnp.asarray(g))
    helpers.assert_close(by_a, np.einsum('bnm,bmd->bnd', g, b), 1e-12)
    helpers.assert_close(by_b, np.einsum('bnm,bnd->bmd', g, a), 1e-12)


@pytest.mark.parametrize(
    ('pattern', 'shapes'),
    [
        ('...nd,...md->...nm', ((5, 3), (7, 4))),
        ('...nd,...md->...nm', ((2, 5, 3), (3, 7, 3))),
        ('...nd,...md->...nm', ((5, 3),)),
        ('...ndx,...md->...nm', ((5, 3), (7, 3))),
        ('nd,md->nm', ((2, 5, 3), (2, 7, 3))),
    ],
)
def test_what_does_not_fit_is_refused(pattern, shapes):
    with pytest.raises((ValueError, TypeError)):
        traced(pattern, *shapes)
