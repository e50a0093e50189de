"""Opening of data sets with boxes: `digit_scenes`, Pascal VOC and COCO folders, TFDS."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from attention_jax.data import prepared, settings, transforms
from attention_jax.tasks.detection import annotations, scenes
from attention_jax.tasks.detection.annotations import Annotation, Notes

SCENES = 'digit_scenes'
_BLOCK = 256  # records read at a time
_BROKEN = 'pictures that do not decode, grey without boxes in training, not evaluated'
_OTHER_SIZE = (
    'pictures of another size than their annotation says, grey without boxes in training, '
    'not evaluated'
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A split as it was opened: see `source.Source`; and the most boxes that a picture has."""

    class_names: Sequence[str]
    splits: Mapping[str, int]
    example: Callable[[int], tuple[Image.Image | None, Annotation]]
    annotation: Callable[[int], Annotation]
    count: int
    in_memory: bool
    most_boxes: int


def open_data(config: Any, split: str, notes: Notes, *, train: bool) -> Opened:
    """Opens a split of `config.data.name`; see `source.open_split`.

    Args:
        config: the whole config.
        split: as there.
        notes: counts what is bad in the data.
        train: whether the split is trained on.

    Raises:
        ValueError: as there.
    """
    name = getattr(config.data, 'name', None)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"data.name {name!r} must be 'digit_scenes', 'voc:PATH', 'coco:PATH' or the name of a "
            'TFDS data set with boxes'
        )
    opening = {'voc': _voc, 'coco': _coco}
    kind, _, path = name.partition(':')
    if kind in opening and not path:
        raise ValueError(
            f"data.name {name!r} has no PATH: give a folder, '{kind}:PATH', or a TFDS name with "
            f"its configuration, '{kind}/...'"
        )
    if name == SCENES:
        settings.cache_setting(config.data)  # always in memory; only a wrong value matters
        return _scenes(split, notes)
    if kind in opening:
        return opening[kind](config, name, path, split, notes)
    if pathlib.Path(name).expanduser().is_dir() and not path:
        raise ValueError(f"data.name {name!r} is a folder: write 'voc:{name}' or 'coco:{name}'")
    return _tfds(config, name, split, notes, train=train)


def _scenes(split: str, notes: Notes) -> Opened:
    ranges = settings.split_ranges(SCENES, split, scenes.COUNTS)
    pictures, found = [], []
    for key, low, high in ranges:
        images, boxes, classes = scenes.draw(key)
        pictures.extend(images[low:high])
        for i in range(low, high):
            found.append(
                annotations.checked(
                    f'{key} scene {i}',
                    '',
                    (scenes.SIZE, scenes.SIZE),
                    boxes[i],
                    classes[i],
                    np.zeros(len(classes[i]), bool),
                    notes,
                )
            )
    example = functools.partial(_held, pictures, found)
    return Opened(
        scenes.CLASS_NAMES,
        scenes.COUNTS,
        example,
        functools.partial(operator.getitem, found),
        len(found),
        True,
        _most_boxes(found),
    )


def _voc(config: Any, name: str, path: str, split: str, notes: Notes) -> Opened:
    whole = pathlib.Path(path).expanduser().is_dir()
    parts = [path] if whole else path.split('+')
    folders = [pathlib.Path(part).expanduser() for part in parts]
    lists: dict[str, list[tuple[pathlib.Path, str]]] = {}
    for folder in folders:
        for key, pictures in annotations.voc_splits(name, folder).items():
            lists.setdefault(key, []).extend((folder, picture) for picture in pictures)
    splits = {key: len(pictures) for key, pictures in lists.items()}
    ranges = settings.split_ranges(name, split, splits)
    chosen = dict.fromkeys(item for key, low, high in ranges for item in lists[key][low:high])
    class_names = annotations.voc_classes(name, folders)
    found = []
    for folder in dict.fromkeys(folders):
        pictures = [picture for where, picture in chosen if where == folder]
        found += annotations.voc(folder, pictures, class_names, notes)
    return _from_files(config, name, split, class_names, splits, found, notes)


def _coco(config: Any, name: str, path: str, split: str, notes: Notes) -> Opened:
    folder = pathlib.Path(path).expanduser()
    files = annotations.coco_files(name, folder)
    parts = [part.split('[')[0].strip() for part in str(split).split('+')]
    unknown = [part for part in parts if part not in files]
    if unknown:
        raise ValueError(
            f'data.split {split!r}: {name!r} has no {unknown[0]!r}; it has {", ".join(files)}: '
            'choose by data.split and data.test_split'
        )
    documents = {part: annotations.coco_document(name, files[part]) for part in parts}
    categories = [annotations.coco_categories(name, d) for d in documents.values()]
    if any(c != categories[0] for c in categories):
        raise ValueError(f'data.split {split!r} of {name!r}: its parts differ in categories')
    splits = {part: len(document['images']) for part, document in documents.items()}
    found = []
    for key, low, high in settings.split_ranges(name, split, splits):
        found += annotations.coco(
            folder / key, documents[key], slice(low, high), list(categories[0]), notes
        )
    return _from_files(config, name, split, tuple(categories[0].values()), splits, found, notes)


def _from_files(
    config: Any,
    name: str,
    split: str,
    class_names: Sequence[str],
    splits: Mapping[str, int],
    found: list[Annotation],
    notes: Notes,
) -> Opened:
    if not found:
        reasons = '; '.join(notes.lines())
        raise ValueError(f'data.split {split!r} of {name!r} has no picture left: {reasons}')
    example = functools.partial(_from_file, found, notes)
    cache = settings.cache_setting(config.data)
    if cache is None:
        cache = 3 * sum(h * w for h, w in (a.shape for a in found)) < settings.CACHE_LIMIT
    if cache:
        # Threads, because decoding photos lets go of Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pictures = list(pool.map(functools.partial(_decoded, example), range(len(found))))
        example = functools.partial(_held, pictures, found)
    annotation = functools.partial(operator.getitem, found)
    return Opened(class_names, splits, example, annotation, len(found), cache, _most_boxes(found))


def _tfds(config: Any, name: str, split: str, notes: Notes, *, train: bool) -> Opened:
    """A prepared TFDS data set; its annotations are read with the pictures, when asked for."""
    import tensorflow_datasets as tfds

    builder = prepared.open_builder(name, getattr(config.data, 'data_dir', None), SCENES)
    image, label, ignored = _objects(name, builder.info.features)
    splits = {key: info.num_examples for key, info in builder.info.splits.items()}
    settings.split_ranges(name, split, splits)
    encoded = isinstance(image, tfds.features.Image)
    with prepared.quiet():
        records = builder.as_data_source(
            split=split, decoders={'image': tfds.decode.SkipDecoding()} if encoded else None
        )
    example = functools.partial(_from_record, records, label.num_classes, ignored, notes)
    # Cut the truth of no picture that is evaluated: every record is read once for that.
    most = 0 if train else _most_objects(records)
    cache = bool(settings.cache_setting(config.data))
    if cache:
        examples = [example(i) for i in range(len(records))]
        pictures = [None if p is None else transforms.to_array(p) for p, _ in examples]
        example = functools.partial(_held, pictures, [found for _, found in examples])
    annotation = functools.partial(_second, example)
    names = tuple(label.names)
    return Opened(names, splits, example, annotation, len(records), cache, most)


def _objects(name: str, features: Any) -> tuple[Any, Any, str | None]:
    """The features `image` and label of `objects`, and which of its keys means `ignore`."""
    import tensorflow_datasets as tfds

    keys = list(features.keys()) if hasattr(features, 'keys') else [type(features).__name__]
    objects = getattr(features['objects'], 'feature', None) if 'objects' in keys else None
    inner = list(objects.keys()) if hasattr(objects, 'keys') else []
    if 'image' not in keys or not {'bbox', 'label'} <= set(inner):
        raise ValueError(
            f'data.name {name!r} has the features {", ".join(keys)}; detection needs '
            "'image' and 'objects' with 'bbox' and 'label'"
        )
    label = objects['label']
    if not isinstance(label, tfds.features.ClassLabel) or not label.num_classes:
        raise ValueError(
            f'data.name {name!r}: the label of its objects is a {type(label).__name__}, and '
            'detection needs a ClassLabel'
        )
    ignored = next((key for key in ('is_difficult', 'is_crowd') if key in inner), None)
    return features['image'], label, ignored


def _most_objects(records: Any) -> int:
    most = 0
    for start in range(0, len(records), _BLOCK):
        block = records.__getitems__(list(range(start, min(start + _BLOCK, len(records)))))
        most = max(most, *(len(record['objects']['label']) for record in block))
    return most


def _held(
    pictures: Sequence[np.ndarray | None], found: Sequence[Annotation], index: int
) -> tuple[Image.Image | None, Annotation]:
    """An example whose picture is in memory."""
    pixels = pictures[index]
    return None if pixels is None else transforms.to_picture(pixels, 3), found[index]


def _from_file(
    found: Sequence[Annotation], notes: Notes, index: int
) -> tuple[Image.Image | None, Annotation]:
    """An example whose picture is in a file."""
    annotation = found[index]
    try:
        with Image.open(annotation.path) as file:
            picture = transforms.convert(file)
    except annotations.BROKEN:
        notes.add(_BROKEN, annotation.name)
        return None, annotation
    if (picture.height, picture.width) != annotation.shape:
        notes.add(_OTHER_SIZE, annotation.name)
        return None, annotation
    return picture, annotation


def _from_record(
    records: Any, num_classes: int, ignored: str | None, notes: Notes, index: int
) -> tuple[Image.Image | None, Annotation]:
    """An example of a TFDS record; its boxes are (y1, x1, y2, x2) over the picture's sides."""
    name, record = f'example {index}', records[index]
    objects = record['objects']
    try:
        picture = transforms.to_picture(record['image'], 3)
        h, w = picture.height, picture.width
    except annotations.BROKEN:
        notes.add(_BROKEN, name)
        nothing = np.zeros(0)
        return None, annotations.checked(name, '', (1, 1), nothing, nothing, nothing, notes)
    classes = np.asarray(objects['label'], np.int32)
    corners = np.asarray(objects['bbox'], np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]
    found = annotations.checked(
        name,
        '',
        (h, w),
        corners * [w, h, w, h],
        np.where(classes < num_classes, classes, -1),
        objects[ignored] if ignored else np.zeros(len(classes), bool),
        notes,
    )
    return picture, found


def _decoded(
    example: Callable[[int], tuple[Image.Image | None, Annotation]], index: int
) -> np.ndarray | None:
    picture, _ = example(index)
    return None if picture is None else transforms.to_array(picture)


def _second(
    example: Callable[[int], tuple[Image.Image | None, Annotation]], index: int
) -> Annotation:
    return example(index)[1]


def _most_boxes(found: Sequence[Annotation]) -> int:
    return max((len(a.classes) for a in found), default=0)
