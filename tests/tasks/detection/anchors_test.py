import numpy as np
import pytest

from attention_jax.tasks.detection import anchors


def test_three_groups_are_found_as_medians_sorted_by_area():
    rng = np.random.default_rng(0)
    groups = [(100, 20), (10, 12), (40, 44)]
    sizes = np.concatenate([np.array(g) * rng.uniform(0.9, 1.1, (31, 2)) for g in groups])
    expected = [np.median(sizes[31 * i : 31 * (i + 1)], axis=0) for i in (1, 2, 0)]
    found = anchors.kmeans(rng.permutation(sizes), 3, seed=1)
    np.testing.assert_allclose(found, sorted(expected, key=np.prod))
    np.testing.assert_array_equal(anchors.kmeans(sizes, 3, seed=1), anchors.kmeans(sizes, 3, 1))


def test_overlap_is_that_of_boxes_with_one_centre():
    got = anchors.overlap(np.array([[4.0, 2.0], [2.0, 2.0]]), np.array([[2.0, 4.0]]))
    np.testing.assert_allclose(got, [[4 / 12], [4 / 8]])


def test_many_equal_sizes():
    sizes = np.repeat([[8.0, 8.0], [9.0, 30.0]], 500, axis=0)
    np.testing.assert_array_equal(anchors.kmeans(sizes, 2), [[8, 8], [9, 30]])


@pytest.mark.parametrize(
    ('sizes', 'k', 'words'),
    [
        (np.ones((5, 3)), 2, r'sizes must be \[n, 2\]'),
        (np.array([[1.0, 0.0]]), 1, 'sizes must be positive'),
        (np.ones((5, 2)), 2, 'k 2 must be from 1 to .* 1'),
        (np.ones((5, 2)), 0, 'k 0 must be'),
    ],
)
def test_errors(sizes, k, words):
    with pytest.raises(ValueError, match=words):
        anchors.kmeans(sizes, k)
