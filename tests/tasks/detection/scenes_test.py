import hashlib

import numpy as np
import pytest

from attention_jax.tasks.detection import scenes


@pytest.fixture(scope='module')
def test_scenes():
    return scenes.draw('test')


def test_the_same_for_everybody(test_scenes):
    images, boxes, classes = test_scenes
    assert images.shape == (250, 128, 128, 3)
    assert images.dtype == np.uint8
    content = [images, np.concatenate(boxes), np.concatenate(classes)]
    digest = hashlib.sha256(b''.join(part.tobytes() for part in content)).hexdigest()
    assert digest == 'b8430cbc0d7484bc59b83e90f897b6339306f1baae0989d99bdeddfd857e2650'


def test_numbers_sizes_and_overlaps(test_scenes):
    _, boxes, classes = test_scenes
    counts = np.array([len(b) for b in boxes])
    assert 0 < (counts == 0).sum() < 20  # a few scenes show nothing
    assert counts.max() == 8
    every = np.concatenate(boxes)
    assert every.min() >= 0
    assert every.max() <= 128
    longer = (every[:, 2:] - every[:, :2]).max(1)
    assert (longer.min(), longer.max()) == (12, 56)
    assert np.bincount(np.concatenate(classes), minlength=10).min() > 50
    overlapping = 0
    for here in boxes:
        low = np.maximum(here[:, None, :2], here[None, :, :2])
        high = np.minimum(here[:, None, 2:], here[None, :, 2:])
        common = (high - low).clip(0).prod(-1)
        area = (here[:, 2:] - here[:, :2]).prod(-1)
        iou = common / (area[:, None] + area[None] - common)
        np.fill_diagonal(iou, 0)
        overlapping += (iou > 0).any()
        assert iou.max(initial=0) <= 1 / 7 + 1e-6
    assert overlapping > 50


def test_boxes_are_tight_around_what_is_drawn(monkeypatch):
    # On a ground of one colour every other pixel belongs to a digit.
    monkeypatch.setattr(
        scenes, '_ground', lambda rng: (np.full((128, 128, 3), 200), bool(rng.randint(2)) or True)
    )
    monkeypatch.setattr(scenes, '_COVERED', 0.0)
    monkeypatch.setitem(scenes.COUNTS, 'test', 30)
    images, boxes, _ = scenes.draw('test')
    for image, here in zip(images, boxes, strict=True):
        ink = (image != 200).any(-1)
        inside = np.zeros_like(ink)
        for left, top, right, bottom in here.astype(int):
            part = ink[top:bottom, left:right]
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()
            inside[top:bottom, left:right] = True
        assert not (ink & ~inside).any()


def test_digits_are_those_of_their_split():
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, train_labels = scenes._digits('train')
    test, test_labels = scenes._digits('test')
    assert (len(train), len(test)) == (1438, 359)
    np.testing.assert_array_equal(test_labels, digits.target[4::5])
    np.testing.assert_array_equal(train_labels[:4], digits.target[:4])
    whole = digits.images[4]
    rows, columns = np.nonzero(whole >= 4)
    expected = whole[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    np.testing.assert_array_equal(test[0], np.where(expected < 4, 0, expected))


@pytest.mark.parametrize(('inputs', 'outputs'), [(8, 56), (5, 12), (2, 128), (1, 3)])
def test_enlarging_is_bilinear(inputs, outputs):
    image = np.random.default_rng(0).integers(0, 17, (inputs, inputs)) * 1000
    place = ((np.arange(outputs) + 0.5) * inputs / outputs - 0.5).clip(0, inputs - 1)
    rows = np.stack([np.interp(place, np.arange(inputs), column) for column in image.T], 1)
    expected = np.stack([np.interp(place, np.arange(inputs), row) for row in rows])
    got = scenes._enlarge(image, (outputs, outputs))
    assert np.abs(got + 0.5 - expected).max() <= 0.5 + 1e-6
