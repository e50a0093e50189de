"""Boxes from files: Pascal VOC folders and COCO JSON. What is bad is left out and counted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import tempfile
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

# What Pillow raises for a file that is not a picture, or is not a whole one.
BROKEN = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)
# What ElementTree raises for a file that is not XML, or is in an encoding that it does not know.
_NO_XML = (ET.ParseError, ValueError, LookupError)


@dataclasses.dataclass(frozen=True, eq=False)
class Annotation:
    """What is known of one picture.

    Attributes:
        name: of the picture, for messages.
        path: of its file; '' if it has none.
        shape: (h, w) in pixels, as stored.
        boxes: float64 [m, 4], (x1, y1, x2, y2) in its pixels, inside it, of some area.
        classes: int32 [m].
        ignore: bool [m]: neither asked for nor counted as false (VOC's difficult, COCO's crowd).
    """

    name: str
    path: str
    shape: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    ignore: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Boxes and classes as the transforms take them, [m, 5]."""
        return np.concatenate([self.boxes, self.classes[:, None]], axis=1)


class Notes:
    """Counts what was wrong, each thing once, however often and in whichever process it is met.

    A copy in another process writes what it meets into a folder that the original reads.
    """

    def __init__(self) -> None:
        # Dicts as ordered sets: adding the same place twice, from any thread, changes nothing.
        self._places: dict[str, dict[tuple[str, int], None]] = {}
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._file: pathlib.Path | None = None  # of a copy

    def add(self, what: str, picture: str, number: int = 0) -> None:
        """Counts `what` at a picture, or at the box `number` of it."""
        places = self._places.setdefault(what, {})
        if self._file and (picture, number) not in places:
            with self._file.open('a', encoding='utf-8') as file:
                file.write(json.dumps([what, picture, number]) + '\n')
        places[picture, number] = None

    def lines(self) -> list[str]:
        """'boxes of no area, left out: 2 (the first in NAME)', one a kind."""
        for path in sorted(pathlib.Path(self._copies.name).iterdir()) if self._copies else ():
            for line in path.read_text(encoding='utf-8').splitlines():
                self.add(*json.loads(line))
        return [
            f'{what}: {len(places):,} (the first in {next(iter(places))[0]})'
            for what, places in self._places.items()
        ]

    def __getstate__(self) -> pathlib.Path:
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix='attention_jax-notes-')
        return pathlib.Path(self._copies.name)

    def __setstate__(self, folder: pathlib.Path) -> None:
        Notes.__init__(self)
        self._file = folder / f'{os.getpid()}-{uuid.uuid4().hex}.jsonl'


def checked(
    name: str,
    path: str,
    shape: tuple[int, int],
    boxes: Sequence[Sequence[float]] | np.ndarray,
    classes: Sequence[int] | np.ndarray,
    ignore: Sequence[bool] | np.ndarray,
    notes: Notes,
) -> Annotation:
    """An annotation of the boxes that are good, cut at the borders of the picture.

    `boxes` [m, 4] are as written, `classes` [m] have -1 for one that the list does not have, the
    rest is as in `Annotation`. What is left out or changed is counted in `notes`.
    """
    h, w = shape
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    classes = np.asarray(classes, np.int32).reshape(-1)
    ignore = np.asarray(ignore, bool).reshape(-1)
    inside = boxes.clip(0, [w, h, w, h])
    sides, left = boxes[:, 2:] - boxes[:, :2], inside[:, 2:] - inside[:, :2]
    wrong = (  # the first that holds is what is said
        ('boxes of an unknown class, left out', classes < 0),
        ('boxes that are not four numbers, left out', ~np.isfinite(boxes).all(1)),
        ('inverted boxes, left out', (sides < 0).any(1)),
        ('boxes of no area, left out', (sides == 0).any(1)),
        ('boxes outside the picture, left out', (left <= 0).any(1)),
        ('boxes in 0 to 1 instead of pixels, left out', (inside[:, 2:] <= 1).all(1)),
    )
    good = np.ones(len(boxes), bool)
    for what, bad in wrong:
        for number in np.flatnonzero(good & bad):
            notes.add(what, name, int(number))
        good &= ~bad
    beyond = np.abs(np.where(good[:, None], boxes - inside, 0)).max(1, initial=0) > 1
    for number in np.flatnonzero(beyond):
        notes.add('boxes that reached out of the picture, cut at its border', name, int(number))
    return Annotation(name, path, shape, inside[good], classes[good], ignore[good])


def voc_splits(setting: str, folder: pathlib.Path) -> dict[str, list[str]]:
    """The splits of a Pascal VOC folder: ImageSets/Main/SPLIT.txt, a picture's name a line.

    Lists of a single class (a name and 1, 0 or -1 a line) are not splits.

    Raises:
        ValueError: the folder is not one of Pascal VOC.
    """
    needed = ('Annotations', 'JPEGImages', 'ImageSets/Main')
    missing = [part for part in needed if not (folder / part).is_dir()]
    if missing:
        found = 'there' if folder.is_dir() else 'not a folder'
        raise ValueError(
            f'data.name {setting!r}: {str(folder)!r} is {found}, and a Pascal VOC folder has '
            f'{", ".join(needed)}; missing: {", ".join(missing)}'
        )
    splits = {}
    for path in sorted((folder / 'ImageSets' / 'Main').glob('*.txt')):
        names = _lines(setting, path)
        columns = [name.split() for name in names]
        if not names or not all(len(c) == 2 and c[1] in ('-1', '0', '1') for c in columns):
            splits[path.stem] = list(dict.fromkeys(names))
    if not splits:
        raise ValueError(
            f'data.name {setting!r}: {str(folder / "ImageSets" / "Main")!r} holds no list of '
            'pictures, such as train.txt with a name a line'
        )
    return splits


def voc_classes(setting: str, folders: Sequence[pathlib.Path]) -> tuple[str, ...]:
    """The class names: of classes.txt if a folder has one, else of all annotations, sorted.

    Raises:
        ValueError: none, or a name twice; or the folders list different ones.
    """
    lists = [
        _lines(setting, path)
        for path in (folder / 'classes.txt' for folder in folders)
        if path.is_file()
    ]
    if lists:
        if any(names != lists[0] for names in lists):
            raise ValueError(f'data.name {setting!r}: the classes.txt of its folders differ')
        if not lists[0] or len(set(lists[0])) < len(lists[0]):
            raise ValueError(
                f'data.name {setting!r}: classes.txt must have a class a line, each once'
            )
        return tuple(lists[0])
    found = set()
    for path in (path for folder in folders for path in folder.glob('Annotations/*.xml')):
        with contextlib.suppress(*_NO_XML):  # said when its split is read
            found.update(_name(item) for item in ET.parse(path).getroot().findall('object'))
    found.discard('')
    if not found:
        raise ValueError(f'data.name {setting!r}: no object in any of its Annotations/*.xml')
    return tuple(sorted(found))


def voc(
    folder: pathlib.Path, names: Sequence[str], class_names: Sequence[str], notes: Notes
) -> list[Annotation]:
    """Reads the annotations of named pictures; the sizes are those of the picture files.

    Coordinates are taken as they are written, as most code does that is compared with: VOC's own
    count pixels from 1, so that its boxes lie half a pixel off. Names may have an ending.
    """
    kinds = Image.registered_extensions()  # what else lies beside a picture is none
    files = {
        path.stem: path
        for path in sorted((folder / 'JPEGImages').iterdir())
        if path.suffix.lower() in kinds
    }
    numbers = {name: i for i, name in enumerate(class_names)}
    annotations = []
    for listed in names:
        ending = pathlib.PurePath(listed).suffix.lower() in kinds
        name = pathlib.PurePath(listed).stem if ending and listed not in files else listed
        path, written = files.get(name), folder / 'Annotations' / f'{name}.xml'
        if path is None:
            notes.add('pictures that are not there, left out', name)
            continue
        try:
            with Image.open(path) as picture:
                shape = (picture.height, picture.width)
        except BROKEN:
            notes.add('pictures that cannot be opened, left out', name)
            continue
        try:
            root = ET.parse(written).getroot()
        except OSError:
            notes.add('pictures without annotation file, left out', name)
            continue
        except _NO_XML:
            notes.add('pictures whose annotation does not parse, left out', name)
            continue
        sides = tuple(_number(root.findtext(f'size/{key}')) for key in ('height', 'width'))
        if min(sides) > 0 and sides != shape:
            notes.add('annotations of another size than the stored picture has', name)
        items = root.findall('object')
        annotations.append(
            checked(
                name,
                str(path),
                shape,
                [_corners(item) for item in items],
                [numbers.get(_name(item), -1) for item in items],
                [item.findtext('difficult', '0').strip() == '1' for item in items],
                notes,
            )
        )
    return annotations


def _lines(setting: str, path: pathlib.Path) -> list[str]:
    """The lines of a text file that hold something."""
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'data.name {setting!r}: {str(path)!r} is not UTF-8: {error}') from None
    return [line.strip() for line in lines if line.strip()]


def _name(item: ET.Element) -> str:
    return item.findtext('name', '').strip()


def _corners(item: ET.Element) -> list[float]:
    """The four numbers of an object's box; NaN for what is not one."""
    return [_number(item.findtext(f'bndbox/{key}')) for key in ('xmin', 'ymin', 'xmax', 'ymax')]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float('nan')


def coco_files(setting: str, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The splits of a COCO folder: annotations/instances_SPLIT.json, pictures in SPLIT/.

    Raises:
        ValueError: there are none.
    """
    files = sorted((folder / 'annotations').glob('instances_*.json'))
    if not files:
        found = 'there' if folder.is_dir() else 'not a folder'
        raise ValueError(
            f'data.name {setting!r}: {str(folder)!r} is {found}, and a COCO folder has '
            'annotations/instances_SPLIT.json and the pictures in SPLIT/'
        )
    return {path.stem.removeprefix('instances_'): path for path in files}


def coco_document(setting: str, path: pathlib.Path) -> Mapping[str, Any]:
    """A file instances_SPLIT.json, with the lists that are needed.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f'data.name {setting!r}: {str(path)!r} is not JSON: {error}') from None
    keys = ('images', 'annotations', 'categories')
    held = document if isinstance(document, dict) else {}
    missing = [key for key in keys if not isinstance(held.get(key), list)]
    if missing:
        raise ValueError(
            f'data.name {setting!r}: {str(path)!r} has no list {", ".join(missing)}; COCO has '
            f'{", ".join(keys)}'
        )
    return document


def coco_categories(setting: str, document: Mapping[str, Any]) -> dict[int, str]:
    """{category id: name}, by rising id, which is the order of the classes.

    Raises:
        ValueError: none, one without id or name, or a name twice.
    """
    try:
        names = {int(c['id']): str(c['name']) for c in document['categories']}
    except (KeyError, TypeError, ValueError):
        names = {}
    if not names or len(set(names.values())) < len(document['categories']):
        raise ValueError(
            f"data.name {setting!r}: 'categories' must be objects with an id and a name, each once"
        )
    return dict(sorted(names.items()))


def coco(
    folder: pathlib.Path,
    document: Mapping[str, Any],
    chosen: slice,
    categories: Sequence[int],
    notes: Notes,
) -> list[Annotation]:
    """Reads annotations of the `chosen` images; the sizes are those that are written.

    `categories` are the ids in the order of the classes.
    """
    numbers = {category: i for i, category in enumerate(categories)}
    of_image: dict[int | str, list[Mapping[str, Any]]] = {
        _id(image.get('id')): [] for image in document['images'] if isinstance(image, dict)
    }
    for number, item in enumerate(document['annotations']):
        own = of_image.get(_id(item.get('image_id'))) if isinstance(item, dict) else None
        if own is None:
            notes.add('annotations of no picture, left out', folder.name, number)
        else:
            own.append(item)
    annotations = []
    for number, image in enumerate(document['images'][chosen]):
        if not isinstance(image, dict):
            notes.add('pictures without name, left out', folder.name, number)
            continue
        name = str(image.get('file_name'))
        h, w = (_number(image.get(key)) for key in ('height', 'width'))
        if not (folder / name).is_file():
            notes.add('pictures that are not there, left out', name)
            continue
        if not (1 <= h < math.inf and 1 <= w < math.inf):
            notes.add('pictures without width and height, left out', name)
            continue
        own = of_image[_id(image.get('id'))]
        annotations.append(
            checked(
                name,
                str(folder / name),
                (int(h), int(w)),
                [_coco_corners(item.get('bbox')) for item in own],
                [numbers.get(_id(item.get('category_id')), -1) for item in own],
                [item.get('iscrowd') == 1 for item in own],
                notes,
            )
        )
    return annotations


def _id(value: Any) -> int | str:
    """An id as a key: a number and its text are the same one."""
    text = str(value)
    return int(text) if text.isdecimal() else text


def _coco_corners(bbox: Any) -> list[float]:
    """(x, y, w, h) as corners; NaN for what is not four numbers."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        return [float('nan')] * 4
    x, y, w, h = map(_number, bbox)
    return [x, y, x + w, y + h]
