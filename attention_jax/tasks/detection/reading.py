"""Where pictures with boxes come from: `digit_scenes`, Pascal VOC and COCO folders, TFDS."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from attention_jax.data import prepared, settings, transforms
from attention_jax.tasks.detection import annotations, scenes
from attention_jax.tasks.detection.annotations import Annotation, Notes, checked

SCENES = 'digit_scenes'
_BROKEN = 'pictures that do not decode, grey without boxes in training, not evaluated'
_OTHER_SIZE = (
    'pictures of another size than their annotation says, grey without boxes in training, '
    'not evaluated'
)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A split as it was opened.

    Attributes:
        class_names: one a class.
        splits: {name: number of pictures}; of a COCO folder, those that were opened.
        pictures: `Files`, `Records` or `Held`: by position the picture in RGB as it is stored, or
            None if it does not decode, and its annotation.
        most_boxes: that an evaluated picture has.
    """

    class_names: Sequence[str]
    splits: Mapping[str, int]
    pictures: Any
    most_boxes: int


def open_data(config: Any, split: str, notes: Notes, *, train: bool) -> Opened:
    """Opens a split of `config.data.name`, see `source.open_split`; counts in `notes` what is bad.

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
    cache = settings.cache(config.data)
    if name == SCENES:
        return _scenes(split, notes)
    if kind in opening:
        class_names, splits, found = opening[kind](name, path, split, notes)
        if not found:
            reasons = '; '.join(notes.lines())
            raise ValueError(f'data.split {split!r} of {name!r} has no picture left: {reasons}')
        if cache is None:
            cache = 3 * sum(h * w for h, w in (a.shape for a in found)) < settings.CACHE_LIMIT
        files = Files(found, notes)
        return Opened(class_names, splits, _held(files) if cache else files, _most_boxes(found))
    if pathlib.Path(name).expanduser().is_dir() and not path:
        raise ValueError(f"data.name {name!r} is a folder: write 'voc:{name}' or 'coco:{name}'")
    return _tfds(config.data, name, split, notes, train=train, cache=bool(cache))


@dataclasses.dataclass(frozen=True, eq=False)
class _Annotated:
    """Pictures whose annotations are known without them."""

    found: Sequence[Annotation]

    def __len__(self) -> int:
        return len(self.found)

    def annotation(self, index: int) -> Annotation:
        """The annotation alone."""
        return self.found[index]


@dataclasses.dataclass(frozen=True, eq=False)
class Files(_Annotated):
    """Pictures in files, decoded when asked for."""

    notes: Notes

    in_memory = False

    def __getitem__(self, index: int) -> tuple[Image.Image | None, Annotation]:
        annotation = self.found[index]
        try:
            with Image.open(annotation.path) as file:
                picture = transforms.convert(file)
        except annotations.BROKEN:
            self.notes.add(_BROKEN, annotation.name)
            return None, annotation
        if (picture.height, picture.width) != annotation.shape:
            self.notes.add(_OTHER_SIZE, annotation.name)
            return None, annotation
        return picture, annotation


@dataclasses.dataclass(frozen=True, eq=False)
class Held(_Annotated):
    """Pictures in memory, uint8 [h, w, 3] or None."""

    pixels: Sequence[np.ndarray | None]

    in_memory = True

    def __getitem__(self, index: int) -> tuple[Image.Image | None, Annotation]:
        pixels = self.pixels[index]
        return None if pixels is None else transforms.to_picture(pixels, 3), self.found[index]


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Records of TFDS; their boxes are (y1, x1, y2, x2) over the picture's sides."""

    records: Any
    num_classes: int
    ignored: str | None  # the key that marks an object as neither asked for nor false
    notes: Notes

    in_memory = False

    def __len__(self) -> int:
        return len(self.records)

    def annotation(self, index: int) -> Annotation:
        """The annotation alone."""
        return self[index][1]

    def __getitem__(self, index: int) -> tuple[Image.Image | None, Annotation]:
        name, record = f'example {index}', self.records[index]
        objects = record['objects']
        try:
            picture = transforms.to_picture(record['image'], 3)
            h, w = picture.height, picture.width
        except annotations.BROKEN:
            self.notes.add(_BROKEN, name)
            nothing = np.zeros(0)
            return None, checked(name, '', (1, 1), nothing, nothing, nothing, self.notes)
        classes = np.asarray(objects['label'], np.int32)
        corners = np.asarray(objects['bbox'], np.float64).reshape(-1, 4)[:, [1, 0, 3, 2]]
        found = checked(
            name,
            '',
            (h, w),
            corners * [w, h, w, h],
            np.where(classes < self.num_classes, classes, -1),
            objects[self.ignored] if self.ignored else np.zeros(len(classes), bool),
            self.notes,
        )
        return picture, found


def _held(pictures: Files | Records) -> Held:
    """The same in memory. Decoded in threads: decoding photos lets go of Python's lock."""

    def decoded(index: int) -> tuple[Annotation, np.ndarray | None]:
        picture, found = pictures[index]
        return found, None if picture is None else transforms.to_array(picture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return Held(*zip(*pool.map(decoded, range(len(pictures))), strict=True))


def _scenes(split: str, notes: Notes) -> Opened:
    pictures, found = [], []
    for key, low, high in settings.split_ranges(SCENES, split, scenes.COUNTS):
        images, boxes, classes = scenes.draw(key)
        pictures.extend(images[low:high])
        for i in range(low, high):
            shape, ignore = images[i].shape[:2], np.zeros(len(classes[i]), bool)
            name = f'{key} scene {i}'
            found.append(checked(name, '', shape, boxes[i], classes[i], ignore, notes))
    return Opened(scenes.CLASS_NAMES, scenes.COUNTS, Held(found, pictures), _most_boxes(found))


def _voc(
    name: str, path: str, split: str, notes: Notes
) -> tuple[Sequence[str], Mapping[str, int], list[Annotation]]:
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
    return class_names, splits, found


def _coco(
    name: str, path: str, split: str, notes: Notes
) -> tuple[Sequence[str], Mapping[str, int], list[Annotation]]:
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
    return tuple(categories[0].values()), splits, found


def _tfds(
    data_config: Any, name: str, split: str, notes: Notes, *, train: bool, cache: bool
) -> Opened:
    """A prepared TFDS data set; its annotations are read with the pictures, when asked for."""
    builder = prepared.open_builder(name, getattr(data_config, 'data_dir', None), SCENES)
    label, ignored = _objects(name, builder.info.features)
    splits = {key: info.num_examples for key, info in builder.info.splits.items()}
    settings.split_ranges(name, split, splits)
    records = prepared.records(builder, split)
    # Cut the truth of no picture that is evaluated: every record is read once for that.
    counts = [] if train else (len(r['objects']['label']) for r in prepared.read_all(records))
    most = max(counts, default=0)
    pictures = Records(records, label.num_classes, ignored, notes)
    return Opened(tuple(label.names), splits, _held(pictures) if cache else pictures, most)


def _objects(name: str, features: Any) -> tuple[Any, str | None]:
    """The label of `objects`, and which of their keys means `ignore`."""
    keys = prepared.feature_names(features)
    objects = getattr(features['objects'], 'feature', None) if 'objects' in keys else None
    inner = list(objects.keys()) if hasattr(objects, 'keys') else []
    if 'image' not in keys or not {'bbox', 'label'} <= set(inner):
        raise ValueError(
            f'data.name {name!r} has the features {", ".join(keys)}; detection needs '
            "'image' and 'objects' with 'bbox' and 'label'"
        )
    prepared.check_label(name, 'the label of its objects', objects['label'], 'detection')
    return objects['label'], next((k for k in ('is_difficult', 'is_crowd') if k in inner), None)


def _most_boxes(found: Sequence[Annotation]) -> int:
    return max((len(a.classes) for a in found), default=0)
