import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_jax.tasks.detection.average_precision import average_precision

NAMES = ('cat', 'dog', 'cow')


def truth(boxes=(), classes=None, ignore=None):
    n = len(boxes)
    return {
        'boxes': np.asarray(boxes, np.float32).reshape(n, 4),
        'classes': np.zeros(n, np.int32) if classes is None else np.asarray(classes, np.int32),
        'ignore': np.zeros(n, bool) if ignore is None else np.asarray(ignore, bool),
        'shape': np.array([100, 120], np.int32),
    }


def found(boxes=(), scores=(), classes=None):
    picture = truth(boxes, classes)
    return {
        'boxes': picture['boxes'],
        'scores': np.asarray(scores, np.float32),
        'classes': picture['classes'],
    }


def random_truths(seed=0, pictures=12):
    rng = np.random.default_rng(seed)
    truths = []
    for _ in range(pictures):
        n = rng.integers(0, 6)
        low = rng.uniform(0, 60, (n, 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 40, (n, 2))], 1)
        truths.append(truth(boxes, rng.integers(0, 3, n), rng.random(n) < 0.2))
    return truths


def perfect(truths):
    return [found(t['boxes'], np.linspace(0.9, 0.1, len(t['boxes'])), t['classes']) for t in truths]


def test_perfect_is_one_and_empty_is_zero(capsys):
    truths = random_truths()
    names = ('AP50', 'AP', 'AP50_voc', 'AP50/cat', 'AP50/dog', 'AP50/cow')
    assert average_precision(perfect(truths), truths, NAMES) == dict.fromkeys(names, 1.0)
    nothing = [found()] * len(truths)
    assert average_precision(nothing, truths, NAMES) == dict.fromkeys(names, 0.0)
    one = [truth([(10, 10, 20, 20)])]
    assert average_precision(perfect(one), one, NAMES) == dict.fromkeys(names[:4], 1.0)
    assert capsys.readouterr().out == ''


# Side 10, moved to the right by 2: IoU 80 / 120 = 0.667; by 4: 60 / 140 = 0.43.
A, B, C, D = ((x, 10, x + 10, 20) for x in (0, 25, 50, 75))
TRUTHS = [truth([A, B]), truth([A, B]), truth()]
RIGHT, LOOSE, MISSED = B, (2, 10, 12, 20), (4, 10, 14, 20)


def test_by_hand():
    """Four boxes; by falling score: right, false, right at 0.667, false, right. One is missed."""
    detections = [
        found([RIGHT, LOOSE, MISSED], [0.9, 0.7, 0.6]),
        found([A], [0.5]),
        found([D], [0.8]),  # in the picture without boxes
    ]
    # Right at 1, 3, 5: precisions 1, 2/3, 3/5, which rise nowhere later.
    result = average_precision(detections, TRUTHS, NAMES)
    assert result['AP50_voc'] == pytest.approx((1 + 2 / 3 + 3 / 5) / 4, abs=1e-12)
    # 101 recalls: 0 to 0.25 are 26, to 0.5 and to 0.75 25 more each, and those above are 0.
    ap50 = (26 * 1 + 25 * 2 / 3 + 25 * 3 / 5) / 101
    assert result['AP50'] == result['AP50/cat'] == pytest.approx(ap50, abs=1e-12)
    # The four IoUs 0.5, ..., 0.65 know the loose one; to the six above it is false.
    tight = (26 * 1 + 25 * 2 / 5) / 101
    assert result['AP'] == pytest.approx(0.4 * ap50 + 0.6 * tight, abs=1e-12)
    assert set(result) == {'AP50', 'AP', 'AP50_voc', 'AP50/cat'}


def test_false_detections_in_a_picture_without_boxes_count():
    right = [found([A, B], [0.9, 0.8]), found([A, B], [0.7, 0.6]), found()]
    assert average_precision(right, TRUTHS, NAMES)['AP50_voc'] == 1.0
    right[2] = found([A], [0.95])
    result = average_precision(right, TRUTHS, NAMES)
    assert result['AP50_voc'] == result['AP50'] == pytest.approx(4 / 5)


def test_each_box_is_found_once():
    truths = [truth([A, B])]
    twice = [found([A, A, B], [0.9, 0.8, 0.7])]
    result = average_precision(twice, truths, NAMES)
    assert result['AP50_voc'] == pytest.approx((1 + 2 / 3) / 2)
    assert result['AP50'] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_ignored_boxes_are_neither_asked_for_nor_false():
    truths = [truth([A, B, C], ignore=[False, True, True])]
    result = average_precision([found([B, B, A], [0.9, 0.8, 0.7])], truths, NAMES)
    assert (result['AP50'], result['AP'], result['AP50_voc']) == (1.0, 1.0, 1.0)
    result = average_precision([found([D, A], [0.8, 0.7])], truths, NAMES)
    assert result['AP50'] == result['AP50_voc'] == 0.5


def test_another_class_is_another_box():
    truths = [truth([A, B], [0, 1])]
    result = average_precision([found([A, B], [0.9, 0.8], [1, 1])], truths, NAMES)
    assert result['AP50/cat'] == 0.0
    assert result['AP50/dog'] == result['AP50'] * 2 == result['AP50_voc'] * 2 == 0.5


def test_a_class_without_boxes_to_find_is_left_out():
    truths = [truth([A, B, C], [0, 1, 2], [False, True, False])]
    detections = [found([A, D, D], [0.9, 0.8, 0.7], [0, 1, 2])]
    result = average_precision(detections, truths, NAMES)
    assert result == {'AP50': 0.5, 'AP': 0.5, 'AP50_voc': 0.5, 'AP50/cat': 1.0, 'AP50/cow': 0.0}
    for nothing in ([truth()], [truth([B], [1], [True])], []):
        result = average_precision([found()] * len(nothing), nothing, NAMES)
        assert set(result) == {'AP50', 'AP', 'AP50_voc'}
        assert all(math.isnan(value) for value in result.values())


def slow_voc(detections, truths, count):
    """One detection after the other, one box after the other; the area as a sum of steps."""
    areas = []
    for c in range(count):
        total = sum(
            label == c and not ignore
            for t in truths
            for label, ignore in zip(t['classes'], t['ignore'], strict=True)
        )
        if not total:
            continue
        every = [
            (float(score), picture, box)
            for picture, d in enumerate(detections)
            for box, score, label in zip(d['boxes'], d['scores'], d['classes'], strict=True)
            if label == c
        ]
        every.sort(key=lambda entry: -entry[0])
        taken, points, right, false = set(), [(0.0, 0.0)], 0, 0
        for _, picture, box in every:
            t, top, which = truths[picture], 0.0, None
            for i, other in enumerate(t['boxes']):
                x1, y1 = max(box[0], other[0]), max(box[1], other[1])
                x2, y2 = min(box[2], other[2]), min(box[3], other[3])
                both = float(max(x2 - x1, 0)) * float(max(y2 - y1, 0))
                sides = [float(b[2] - b[0]) * float(b[3] - b[1]) for b in (box, other)]
                if t['classes'][i] == c and both and both / (sum(sides) - both) > top:
                    top, which = both / (sum(sides) - both), i
            if top >= 0.5 and t['ignore'][which]:
                continue
            if top >= 0.5 and (picture, which) not in taken:
                taken.add((picture, which))
                right += 1
            else:
                false += 1
            points.append((right / total, right / (right + false)))
        steps = itertools.pairwise(points)
        areas.append(
            sum(
                (recall - before) * max(p for r, p in points if r >= recall)
                for (before, _), (recall, _) in steps
            )
        )
    return sum(areas) / len(areas) if areas else math.nan


# Corners on a coarse grid and few scores: equal boxes, equal scores and an IoU of exactly 0.5.
BOX = st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 3)] * 2).map(
    lambda b: (10 * b[0], 10 * b[1], 10 * (b[0] + b[2]), 10 * (b[1] + b[3]))
)
TRUTH = st.lists(st.tuples(BOX, st.integers(0, 1), st.booleans()), max_size=4)
FOUND = st.lists(st.tuples(BOX, st.sampled_from([0.25, 0.5, 0.75]), st.integers(0, 1)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TRUTH, FOUND), min_size=1, max_size=3))
def test_voc_against_a_slow_reading(pictures):
    columns = [(list(zip(*t, strict=True)), list(zip(*f, strict=True))) for t, f in pictures]
    truths = [truth(*t) for t, _ in columns]
    detections = [found(*f) for _, f in columns]
    got = average_precision(detections, truths, NAMES)['AP50_voc']
    np.testing.assert_allclose(got, slow_voc(detections, truths, 3), atol=1e-9)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match='detections must have one entry a picture of truths, 2'):
        average_precision([found()], [truth()] * 2, NAMES)
    with pytest.raises(ValueError, match=r'classes of detections must be 0 to 2.*got 3 to 3'):
        average_precision([found([A], [0.5], [3])], [truth()], NAMES)
    with pytest.raises(ValueError, match=r'classes of truths must be 0 to 2.*got -1'):
        average_precision([found()], [truth([A], [-1])], NAMES)
