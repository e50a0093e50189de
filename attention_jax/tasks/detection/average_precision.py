"""Average precision of detected boxes: COCO's by pycocotools, and Pascal VOC's."""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Boxes = Mapping[str, Any]

_VOC_IOU = 0.5  # with a true box, from which on a detection has found it


def average_precision(
    detections: Sequence[Boxes], truths: Sequence[Boxes], class_names: Sequence[str]
) -> dict[str, float]:
    """Measures how well boxes were found, over whole pictures.

    COCO's numbers are those of pycocotools: precision at 101 recalls, at most 100 detections of a
    class in a picture; an ignored box is a crowd there. VOC's is the area under the interpolated
    precision over all recalls at an IoU of 0.5: each detection, by falling score, goes to the box
    of its class that it covers best, which is found once; on an ignored box it counts for nothing.
    Its IoU takes boxes as continuous (the development kit adds 1 to each side). Means are over the
    classes that have a box to find; a picture without boxes counts by what is detected in it.

    Source: cocodataset/cocoapi PythonAPI; Everingham et al., "The Pascal Visual Object Classes
    Challenge: A Retrospective", IJCV 2015, with the area of VOC 2010 and later.

    Args:
        detections: for each picture 'boxes' `[d, 4]` (x1, y1, x2, y2) in pixels, 'scores' `[d]` and
            'classes' `[d]`, numbers from 0; without padding.
        truths: for each picture 'boxes' `[m, 4]` and 'classes' `[m]` as above, 'ignore' `[m]`, true
            for boxes neither asked for nor counted as false, and 'shape' (height, width).
        class_names: name of each class.

    Returns:
        'AP50' and 'AP' (the mean over IoUs of 0.5 to 0.95) of COCO, 'AP50_voc', and COCO's
        'AP50/NAME' of each class that has a box to find. nan where no class has one.

    Raises:
        ValueError: not one entry of each a picture, or a class without a name.
    """
    if len(detections) != len(truths):
        raise ValueError(
            f'detections must have one entry a picture of truths, {len(truths)}; got '
            f'{len(detections)}'
        )
    count = len(class_names)
    for name, pictures in (('detections', detections), ('truths', truths)):
        classes = _joined(pictures, 'classes', np.int64)
        if classes.size and not 0 <= classes.min() <= classes.max() < count:
            raise ValueError(
                f'classes of {name} must be 0 to {count - 1}, as class_names has {count}; got '
                f'{classes.min()} to {classes.max()}'
            )
    ignored = _joined(truths, 'ignore', bool)
    wanted = _joined(truths, 'classes', np.int64)[~ignored]
    asked = np.unique(wanted)
    if not asked.size:
        return dict.fromkeys(('AP50', 'AP', 'AP50_voc'), math.nan)
    coco = _coco(detections, truths, count)[:, asked]
    voc = [_area(*curve) for curve in _voc_matches(detections, truths, asked)]
    return {
        'AP50': _mean(coco[0]),
        'AP': _mean(coco),
        'AP50_voc': _mean(voc),
        **{f'AP50/{class_names[c]}': _mean(value) for c, value in zip(asked, coco[0], strict=True)},
    }


def _mean(values: Any) -> float:
    # pycocotools adds 2e-16 to what it divides by: of one box, found, it makes 1 - 2e-16.
    return round(float(np.mean(values)), 12)


def _joined(pictures: Sequence[Boxes], key: str, dtype: Any) -> np.ndarray:
    """One array over all pictures, empty where there are none."""
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(p[key], dtype) for p in pictures)])


def _boxes(picture: Boxes) -> np.ndarray:
    return np.asarray(picture['boxes'], np.float64).reshape(-1, 4)


# COCO.


def _coco(detections: Sequence[Boxes], truths: Sequence[Boxes], count: int) -> np.ndarray:
    """Average precision at each of ten IoUs for each class `[10, count]`; -1: no box to find."""
    from pycocotools.cocoeval import COCOeval

    images = [
        {'id': i, 'height': int(t['shape'][0]), 'width': int(t['shape'][1])}
        for i, t in enumerate(truths)
    ]
    # It tells its progress by printing.
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(
            _dataset(images, truths, count), _dataset(images, detections, count), 'bbox'
        )
        evaluation.params.maxDets = [100]
        evaluation.params.areaRng = [[0, 1e10]]  # its range 'all'; it takes four by itself
        evaluation.params.areaRngLbl = ['all']
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval['precision'][..., 0, 0].mean(1)


def _dataset(images: Sequence[Mapping[str, int]], pictures: Sequence[Boxes], count: int) -> Any:
    from pycocotools.coco import COCO

    annotations = []
    for image, picture in zip(images, pictures, strict=True):
        boxes = _boxes(picture)
        n = len(boxes)
        corners, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
        annotations += [
            {
                'id': len(annotations) + 1 + i,  # 0 would mean that nothing was matched
                'image_id': image['id'],
                'category_id': int(category),
                'bbox': [*corner, *side],
                'area': side[0] * side[1],
                'iscrowd': int(ignore),
                'score': float(score),
            }
            for i, (category, corner, side, ignore, score) in enumerate(
                zip(
                    np.asarray(picture['classes']),
                    corners.tolist(),
                    sides.tolist(),
                    picture.get('ignore', [False] * n),
                    picture.get('scores', [1.0] * n),
                    strict=True,
                )
            )
        ]
    dataset = COCO()
    dataset.dataset = {
        'images': list(images),
        'categories': [{'id': c} for c in range(count)],
        'annotations': annotations,
    }
    dataset.createIndex()
    return dataset


# Pascal VOC.


def _voc_matches(
    detections: Sequence[Boxes], truths: Sequence[Boxes], asked: np.ndarray
) -> Iterable[tuple[np.ndarray, int]]:
    """For each class asked for: which detections are right, by falling score, and its boxes."""
    best, overlap, start = [np.zeros(0, np.int64)], [np.zeros(0)], 0
    for found, truth in zip(detections, truths, strict=True):
        same = np.equal.outer(np.asarray(found['classes']), np.asarray(truth['classes']))
        # One more box that nothing covers, for pictures without any.
        iou = np.pad(np.where(same, _iou(_boxes(found), _boxes(truth)), 0), ((0, 0), (0, 1)))
        best.append(iou.argmax(1) + start)
        overlap.append(iou.max(1))
        start += iou.shape[1]
    best, hit = np.concatenate(best), np.concatenate(overlap) >= _VOC_IOU
    ignored = np.concatenate([[*t['ignore'], False] for t in truths]).astype(bool)
    order = np.argsort(-_joined(detections, 'scores', np.float64), kind='stable')
    order = order[~(hit & ignored[best])[order]]  # on an ignored box: neither right nor false
    right = np.zeros(len(order), bool)
    hits = np.flatnonzero(hit[order])
    right[hits[np.unique(best[order][hits], return_index=True)[1]]] = True  # each box once
    classes = _joined(detections, 'classes', np.int64)[order]
    wanted = _joined(truths, 'classes', np.int64)[~_joined(truths, 'ignore', bool)]
    for c in asked:
        yield right[classes == c], int((wanted == c).sum())


def _area(right: np.ndarray, boxes: int) -> float:
    """Area under the interpolated precision; recall grows by 1 / boxes at each right detection."""
    precision = right.cumsum() / np.arange(1, len(right) + 1)
    highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return highest_from_here[right].sum() / boxes


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of boxes `[d, 4]` and `[m, 4]` (x1, y1, x2, y2): `[d, m]`."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), -1)
    area_a, area_b = (np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), -1) for x in (a, b))
    return both / np.maximum(area_a[:, None] + area_b - both, np.finfo(np.float64).tiny)
