import numpy as np
import pytest
from PIL import Image

from attention_jax.data.transforms import to_array
from attention_jax.tasks.classification import transforms


@pytest.mark.parametrize('channels', [1, 3])
def test_pad_crop_equals_reading_pixel_by_pixel(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (40, 5, 7, channels), dtype=np.uint8)
    offsets = rng.integers(0, 9, (40, 2))
    offsets[:4] = [(0, 0), (0, 8), (8, 0), (8, 8)]
    flips = rng.random(40) < 0.5
    expected = np.zeros_like(images)
    for n in range(40):
        for y in range(5):
            for x in range(7):
                row = y + offsets[n, 0] - 4
                column = (6 - x if flips[n] else x) + offsets[n, 1] - 4
                if 0 <= row < 5 and 0 <= column < 7:
                    expected[n, y, x] = images[n, row, column]
    before = images.copy()
    np.testing.assert_array_equal(transforms.pad_crop(images, offsets, flips), expected)
    np.testing.assert_array_equal(images, before)


@pytest.mark.parametrize(('height', 'width'), [(375, 500), (64, 64), (30, 400), (400, 30), (1, 1)])
def test_random_box_stays_inside_and_keeps_its_limits(height, width):
    rng = np.random.default_rng(1)
    boxes = np.array([transforms.random_box(height, width, rng) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    w, h = right - left, bottom - top
    assert (w > 0).all()
    assert (h > 0).all()
    if min(height, width) > 1:
        # Sides are rounded to pixels, so aspect and area may pass the limits by that much.
        assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
        assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all()
        assert ((w + 0.5) * (h + 0.5) >= 0.08 * height * width).all() or max(
            height / width, width / height
        ) > 4 / 3 / 0.08


def test_random_box_covers_its_range():
    rng = np.random.default_rng(2)
    boxes = np.array([transforms.random_box(300, 300, rng) for _ in range(4000)])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    area, aspect = w * h / 300**2, np.log(w / h)
    # Boxes that do not fit are drawn again, which thins out the largest only: below half of the
    # picture every area is equally likely.
    low, high = np.histogram(area, bins=[0.08, 0.29, 0.5])[0]
    assert abs(low - high) < 5 * np.sqrt(low + high)
    assert area.min() < 0.1
    assert area.max() > 0.9
    assert abs(aspect.mean()) < 0.02
    assert abs(aspect[area < 0.5].std() - 0.166) < 0.01
    # Where it lies: as often left as right, up as down.
    centre = (boxes[:, :2] + boxes[:, 2:]) / 600
    assert (abs(centre.mean(0) - 0.5) < 0.01).all()


def test_random_box_that_never_fits_is_central_with_the_nearest_aspect():
    assert transforms.random_box(10, 10_000, np.random.default_rng(0)) == (4993, 0, 5006, 10)


def test_resize_and_crop_takes_the_middle_of_the_shorter_side():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (100, 200))
    picture = Image.fromarray(ramp)
    crop = to_array(transforms.resize_and_crop(picture, (100, 100)))
    np.testing.assert_array_equal(crop[..., 0], ramp[:, 50:150])
    # 256 / 224: the shorter side becomes 32 for a crop of 28, and the crop spans 87.5 pixels.
    crop = to_array(transforms.resize_and_crop(picture, (28, 28), 256 / 224))
    assert crop.shape == (28, 28, 1)
    step = 100 / 32
    expected = (np.arange(18, 46) + 0.5) * step - 0.5
    np.testing.assert_allclose(crop[14, :, 0], expected, atol=0.51)


@pytest.mark.parametrize('shape', [(17, 31), (31, 17), (5, 5), (224, 225)])
def test_resize_and_crop_always_fills_the_size(shape):
    picture = Image.fromarray(np.full((*shape, 3), 7, np.uint8))
    for size in [(8, 8), (33, 20), (224, 224)]:
        for ratio in [1.0, 256 / 224]:
            array = to_array(transforms.resize_and_crop(picture, size, ratio))
            assert array.shape == (*size, 3)
            assert (array == 7).all()
