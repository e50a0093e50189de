import numpy as np
import pytest
from PIL import Image

from attention_jax.tasks.detection import transforms
from attention_jax.tasks.detection.transforms import Placement


def photo(h, w, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((w, h), Image.Resampling.BICUBIC)


def marked(h, w, box, color=(255, 0, 0)):
    """A black picture with a bright box, and that box as a row."""
    pixels = np.zeros((h, w, 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = color
    return Image.fromarray(pixels), np.array([[*box, 3.0]])


def extent(canvas, color=0):
    """Where the bright box is seen: more than half of its brightness, in pixels."""
    image = np.asarray(canvas).astype(int)
    seen = (image[..., color] > 128) & (image.sum(-1) < 330)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@pytest.mark.parametrize(
    'shape', [(480, 640), (334, 500), (500, 334), (640, 480), (100, 900), (31, 17), (1, 999)]
)
@pytest.mark.parametrize('size', [(416, 416), (320, 416)])
def test_letterbox(shape, size):
    picture = photo(*shape)
    got = np.asarray(transforms.letterbox(picture, size))
    # The rule of the repository, word by word.
    (h, w), (ih, iw) = size, shape
    scale = min(w / iw, h / ih)
    nw, nh = max(1, int(iw * scale)), max(1, int(ih * scale))
    canvas = Image.new('RGB', (w, h), (128, 128, 128))
    canvas.paste(picture.resize((nw, nh), Image.Resampling.BICUBIC), ((w - nw) // 2, (h - nh) // 2))
    np.testing.assert_array_equal(got, np.asarray(canvas))
    back = transforms.undo_letterbox(got, shape)
    assert back.shape == (*shape, 3)
    if shape == (480, 640):
        assert np.abs(back.astype(int) - np.asarray(picture)).mean() < 2


def test_paste_resizes_what_is_seen_as_part_of_the_whole():
    picture = photo(90, 120)
    rng = np.random.default_rng(3)
    for _ in range(30):
        w, h = rng.integers(3, 200, 2)
        place = Placement(int(rng.integers(-150, 60)), int(rng.integers(-150, 60)), int(w), int(h))
        region = (10, 5, 50, 64) if rng.random() < 0.5 else None
        got = Image.new('RGB', (64, 64), transforms.GREY)
        transforms.paste(got, picture, place, region)
        whole = Image.new('RGB', (64, 64), transforms.GREY)
        whole.paste(picture.resize((place.width, place.height), 3), (place.left, place.top))
        if region:
            limited = Image.new('RGB', (64, 64), transforms.GREY)
            limited.paste(whole.crop(region), region[:2])
            whole = limited
        difference = np.abs(np.asarray(got).astype(int) - np.asarray(whole))
        # Pillow takes the box in float32, and rounds after each of two passes.
        assert difference.max() <= 2
        assert difference.mean() < 0.05


def test_random_placement_keeps_its_limits():
    rng = np.random.default_rng(0)
    places = [transforms.random_placement((300, 400), (416, 352), rng) for _ in range(3000)]
    left, top, w, h = np.array(places).T
    # Aspect 4/3 * U(0.7, 1.3) / U(0.7, 1.3); the side that counts is 0.25 to 2 of the canvas.
    aspect = w / h
    assert 4 / 3 * 0.7 / 1.3 * 0.97 < aspect.min() < 0.8
    assert 2.2 < aspect.max() < 4 / 3 * 1.3 / 0.7 * 1.03
    wide = aspect >= 1.02
    assert 352 / 4 - 1 <= w[wide].min() < 100
    assert 690 < w[wide].max() <= 704
    high = aspect < 0.98
    assert 416 / 4 - 1 <= h[high].min() < 130
    assert 790 < h[high].max() <= 832
    # Inside the canvas where it fits, else covering it.
    for place, side, canvas in ((left, w, 352), (top, h, 416)):
        assert (np.minimum(0, canvas - side) <= place).all()
        assert (place <= np.maximum(0, canvas - side)).all()
        assert (place > 5).any()
        assert (place < -5).any()


def test_boxes_go_with_the_picture():
    picture, boxes = marked(60, 80, (20, 30, 50, 45))
    rng = np.random.default_rng(5)
    kept = 0
    for _ in range(60):
        canvas, got = transforms.random_scale(picture, boxes, (96, 128), rng)
        assert canvas.size == (128, 96)
        assert got.shape[0] <= 1
        if len(got):
            kept += 1
            assert np.abs(got[0, :4] - extent(canvas)).max() <= 1.6
            assert got[0, 4] == 3
    assert kept > 30


def test_flip_only_where_allowed():
    picture, boxes = marked(64, 64, (0, 10, 8, 50))
    sides = {True: set(), False: set()}
    for flip, seen in sides.items():
        rng = np.random.default_rng(0)
        for _ in range(40):
            _, got = transforms.random_scale(
                picture, boxes, (64, 64), rng, flip=flip, scale=(0.9, 0.9)
            )
            seen.update(box[0] + box[2] > 64 for box in got)
    assert sides == {True: {True, False}, False: {False}}


def test_cut_drops_what_has_a_side_of_at_most_a_pixel():
    boxes = np.array(
        [[-5, 5, 10, 20, 0], [-5, 5, 1, 20, 1], [-5, 5, 1.1, 20, 2], [70, 0, 90, 9, 3.0]]
    )
    got = transforms.cut(boxes, (0, 0, 64, 64))
    np.testing.assert_allclose(got, [[0, 5, 10, 20, 0], [0, 5, 1.1, 20, 2]])


def test_mosaic():
    examples = []
    for color in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]:
        examples.append(marked(64, 96, (0, 0, 96, 64), color))
    rng = np.random.default_rng(1)
    for _ in range(40):
        canvas, boxes = transforms.mosaic(examples, (100, 120), rng)
        image = np.asarray(canvas).astype(int)
        assert len(boxes) == 4
        # All meet at one point, drawn from the middle.
        x, y = boxes[0, 2:4]
        assert 0.3 * 120 - 1 <= x <= 0.7 * 120
        assert 0.3 * 100 - 1 <= y <= 0.7 * 100
        np.testing.assert_allclose(boxes[1, [2, 1]], (x, y))
        np.testing.assert_allclose(boxes[2, [0, 1]], (x, y))
        np.testing.assert_allclose(boxes[3, [0, 3]], (x, y))
        # Each fills its box; the rest is grey.
        left = np.ones(image.shape[:2], bool)
        for box, (picture, _) in zip(boxes, examples, strict=True):
            x1, y1, x2, y2 = box[:4].round().astype(int)
            assert (image[y1:y2, x1:x2] == np.asarray(picture)[0, 0]).all()
            left[y1:y2, x1:x2] = False
        assert (image[left] == 128).all()


def test_mosaic_boxes_go_with_their_pictures():
    examples = [marked(64, 96, (30, 20, 60, 50)) for _ in range(4)]
    rng = np.random.default_rng(2)
    for _ in range(20):
        canvas, boxes = transforms.mosaic(examples, (200, 200), rng)
        image = np.asarray(canvas)
        for x1, y1, x2, y2 in boxes[:, :4].round().astype(int):
            inner = image[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
            assert (inner[..., 0] > 200).all()
        red = ((image[..., 0] > 200) & (image[..., 1] < 50)).sum()
        areas = (boxes[:, 2:4] - boxes[:, :2]).prod(1).sum()
        assert abs(red - areas) < 0.15 * areas + 60


def test_mixup_is_the_mean():
    one, other = marked(8, 8, (0, 0, 4, 4)), marked(8, 8, (4, 4, 8, 8))
    picture, boxes = transforms.mixup(one, other)
    expected = (np.asarray(one[0]).astype(int) + np.asarray(other[0])) / 2
    assert np.abs(np.asarray(picture) - expected).max() <= 0.5
    np.testing.assert_array_equal(boxes[:, :4], [[0, 0, 4, 4], [4, 4, 8, 8]])


def test_colors():
    import colorsys

    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    factors = 1 + np.random.default_rng(7).uniform(-1, 1, 3) * transforms.GAINS
    got = transforms.random_colors(Image.fromarray(pixels), np.random.default_rng(7))
    close = []
    for before, after in zip(pixels.reshape(-1, 3), np.asarray(got).reshape(-1, 3), strict=True):
        h, s, v = np.array(colorsys.rgb_to_hsv(*before / 255)) * factors
        want = np.array(colorsys.hsv_to_rgb(h % 1, min(s, 1), min(v, 1))) * 255
        close.append(np.abs(want - after).max())
    assert np.median(close) < 4  # Pillow's hue, saturation and value are whole numbers
    assert np.mean(np.array(close) < 12) > 0.99
    same = transforms.random_colors(Image.fromarray(pixels), np.random.default_rng(0), (0, 0, 0))
    assert np.abs(np.asarray(same).astype(int) - pixels).max() <= 6  # hue has 255 steps


def test_relative():
    boxes = np.array([[10, 20, 30, 60, 4.0]])
    np.testing.assert_allclose(transforms.relative(boxes, (100, 200)), [[0.1, 0.4, 0.1, 0.4]])
    assert transforms.relative(np.zeros((0, 5)), (100, 200)).shape == (0, 4)
