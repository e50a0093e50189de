"""Pictures with boxes: `digit_scenes`, Pascal VOC folders, COCO folders and TFDS."""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from attention_jax.data import annotations, box_transforms, prepared, scenes, sources, transforms
from attention_jax.data.annotations import Annotation, Notes

AUGMENTATIONS = ('none', 'random_scale')
_DEFAULT_SIZE = 416
_BLOCK = 256  # records read at a time
_BROKEN = 'pictures that do not decode, grey without boxes in training, not evaluated'
_OTHER_SIZE = (
    'pictures of another size than their annotation says, grey without boxes in training, '
    'not evaluated'
)
_SCENES = 'digit_scenes'


@dataclasses.dataclass(frozen=True)
class Description:
    """What a data set holds.

    Attributes:
        name: as in `data.name`.
        image_shape: (h, w, 3) of the pictures in a batch.
        num_classes: classes are 0 .. num_classes - 1.
        class_names: one a class.
        splits: {name: number of pictures}; of a COCO folder, those that were opened.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    splits: dict[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One split, example by example; see `attention_jax.data.loader.Examples`.

    Attributes:
        description: of the whole data set.
        split: what was asked for, such as 'train[:90%]'.
        example: from an index, the picture in RGB as it is stored, or None if it does not decode,
            and its annotation.
        annotation: from an index, its annotation alone.
        count: number of examples.
        in_memory: the decoded pictures are held.
        augment: one of `AUGMENTATIONS`, for training.
        max_boxes: of a training example; the largest are kept.
        eval_boxes: of an evaluation example; at least as many as any picture has.
        notes: what was wrong with the data so far.
        flip: whether pictures may be mirrored.
        gains: see `box_transforms.random_colors`.
        scale: see `box_transforms.random_placement`.
        mosaic: probability that an example is made of four pictures.
        mixup: probability that such a one is mixed with one more.
        mosaic_until: number of examples of the run after which there is neither.
    """

    description: Description
    split: str
    example: Callable[[int], tuple[Image.Image | None, Annotation]]
    annotation: Callable[[int], Annotation]
    count: int
    in_memory: bool
    augment: str
    max_boxes: int
    eval_boxes: int
    notes: Notes
    flip: bool = True
    gains: tuple[float, float, float] = box_transforms.GAINS
    scale: tuple[float, float] = box_transforms.SCALE
    mosaic: float = 0.0
    mixup: float = 0.0
    mosaic_until: float = 0.0

    in_batches: ClassVar[bool] = False
    by_position: ClassVar[bool] = True

    def __len__(self) -> int:
        """Number of examples."""
        return self.count

    def warnings(self) -> list[str]:
        """What was left out of the data so far and why, counted, a line each.

        What other processes (`data.workers`) find while they decode is not in it.
        """
        where = f'{self.description.name}, {self.split}'
        return [f'{where}: {line}' for line in self.notes.lines()]

    def box_sizes(self) -> np.ndarray:
        """Sizes of all boxes but the ignored ones, (w, h) in pixels of the letterboxed picture."""
        sizes = [np.zeros((0, 2))]
        for number in range(len(self)):
            found = self.annotation(number)
            boxes = self._letterboxed(found.shape, _rows(found)[~found.ignore])
            sizes.append(boxes[:, 2:4] - boxes[:, :2])
        return np.concatenate(sizes)

    def train_example(
        self, index: tuple[int, int], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """An augmented example.

        Args:
            index: (examples before it in the run, index of the picture).
            rng: of its draws.

        Returns:
            'image' uint8 [h, w, 3]; 'boxes' float32 [max_boxes, 4], (cx, cy, w, h) over its sides;
            'classes' int32 [max_boxes], -1 for padding, whose boxes are 0.
        """
        position, number = index
        size = self.description.image_shape[:2]
        if self.augment == 'none':
            picture, boxes = self._asked_for(number)
            boxes = self._letterboxed((picture.height, picture.width), boxes)
            canvas = box_transforms.letterbox(picture, size)
        elif position < self.mosaic_until and rng.random() < self.mosaic:
            canvas, boxes = self._mosaic(number, rng)
            if rng.random() < self.mixup:
                one_more = self._random_scale(int(rng.integers(len(self))), rng)
                canvas, boxes = box_transforms.mixup((canvas, boxes), one_more)
        else:
            canvas, boxes = self._random_scale(number, rng)
        if len(boxes) > self.max_boxes:
            self.notes.add(
                f'pictures of more than {self.max_boxes} boxes (detection.max_boxes), the largest '
                'kept',
                self.annotation(number).name,
            )
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            largest = np.argsort(-areas, kind='stable')[: self.max_boxes]
            boxes = boxes[np.sort(largest)]
        return {
            'image': transforms.to_array(canvas),
            'boxes': _padded(box_transforms.relative(boxes, size), self.max_boxes, 0),
            'classes': _padded(boxes[:, 4].astype(np.int32), self.max_boxes, -1),
        }

    def eval_example(self, position: int) -> dict[str, np.ndarray]:
        """The letterboxed picture with all its boxes.

        Args:
            position: of the picture; from the length on it is padding.

        Returns:
            'image' uint8 [h, w, 3]; 'boxes' float32 [eval_boxes, 4], (cx, cy, w, h) over the sides
            of the photo, not of the letterboxed picture; 'classes' int32 [eval_boxes], -1 for
            padding; 'ignore' bool [eval_boxes]; 'shape' int32 [2], (h, w) of the photo; 'mask'
            float32 [], 0 for padding and for a picture that does not decode, whose image is black
            and which has no boxes.
        """
        size = self.description.image_shape[:2]
        picture, found = self.example(position) if position < len(self) else (None, None)
        if picture is None:
            image, shape = np.zeros(self.description.image_shape, np.uint8), size
            boxes, ignore = np.zeros((0, 5)), np.zeros(0, bool)
        else:
            image = transforms.to_array(box_transforms.letterbox(picture, size))
            shape, ignore = found.shape, found.ignore
            boxes = _rows(found)
        return {
            'image': image,
            'boxes': _padded(box_transforms.relative(boxes, shape), self.eval_boxes, 0),
            'classes': _padded(boxes[:, 4].astype(np.int32), self.eval_boxes, -1),
            'ignore': _padded(ignore, self.eval_boxes, False),
            'shape': np.array(shape, np.int32),
            'mask': np.float32(picture is not None),
        }

    def _asked_for(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """A picture and the boxes [m, 5] to learn; grey without boxes if it does not decode."""
        picture, found = self.example(number)
        if picture is None:
            size = self.description.image_shape[:2]
            return Image.new('RGB', size[::-1], box_transforms.GREY), np.zeros((0, 5))
        return picture, _rows(found)[~found.ignore]

    def _letterboxed(self, shape: tuple[int, int], boxes: np.ndarray) -> np.ndarray:
        """Boxes [m, 5] of a picture of `shape` (h, w) on its letterbox."""
        place = box_transforms.fit(shape, self.description.image_shape[:2])
        return box_transforms.move(boxes, shape, place)

    def _shuffled(self, number: int, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
        # Of two boxes that the same prediction answers for, the later one counts: not always the
        # same one.
        picture, boxes = self._asked_for(number)
        return picture, boxes[rng.permutation(len(boxes))]

    def _random_scale(
        self, number: int, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        canvas, boxes = box_transforms.random_scale(
            *self._shuffled(number, rng),
            self.description.image_shape[:2],
            rng,
            flip=self.flip,
            scale=self.scale,
        )
        return box_transforms.random_colors(canvas, rng, self.gains), boxes

    def _mosaic(self, number: int, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
        numbers = rng.permutation([number, *rng.integers(len(self), size=3)])
        examples = [self._shuffled(int(n), rng) for n in numbers]
        canvas, boxes = box_transforms.mosaic(
            examples, self.description.image_shape[:2], rng, flip=self.flip
        )
        return box_transforms.random_colors(canvas, rng, self.gains), boxes


def source(config: Any, split: str, *, train: bool) -> Source:
    """Opens one split of a data set with boxes.

    Nothing is downloaded, and nothing in the data ends a run: what is bad is left out, counted,
    and told by `Source.warnings`. Only a split without any picture is an error.

    Args:
        config: the whole config. Of `config.data`:
            `name`: 'digit_scenes' (handwritten digits on 128x128, no files, see `scenes.draw`);
            'voc:PATH', a folder with Annotations, JPEGImages and ImageSets/Main; 'coco:PATH', a
            folder with annotations/instances_SPLIT.json and the pictures in SPLIT/; or a TFDS name
            with `image` and `objects`, such as 'voc/2007' and 'coco/2017'.
            `data_dir`: where TFDS finds it; None is TFDS's own default.
            `image_size`: of the pictures in a batch, pixels a side, or (h, w); None is 128 for
            digit_scenes, else 416.
            `augment`: for training; 'random_scale' (random scale, aspect, place, mirroring and
            colours), 'none', or None or 'auto': 'random_scale', for digit_scenes without mirroring
            and without change of hue.
            `cache`: True holds the decoded pictures in memory, False does not; None or 'auto' does
            if their sizes are known and they take less than 1 GiB.
            `mosaic`, `mixup`, `mosaic_epochs`: probabilities, and the share of the run, from its
            start, that has them; its length is that of `config.train`.
            `scale`: limits of the random scale, if the config has it (default 0.25, 2).
            Of `config.detection`: `max_boxes`, of a training example.
        split: a split, or as for `sources.source` slices and sums of splits.
        train: whether the split is trained on.

    Raises:
        ValueError: an unknown name, split or setting; data that is not there or not of this form;
            a split without pictures.
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
    notes = Notes()
    if name == _SCENES:
        sources.cache_setting(config.data)  # always in memory; only a wrong value matters
        opened = _scenes(split, notes)
    elif kind in opening:
        folder = pathlib.Path(path).expanduser()
        opened = opening[kind](config, name, folder, split, notes)
    else:
        opened = _tfds(config, name, split, notes, train=train)
    size = _image_size(config, scenes.SIZE if name == _SCENES else _DEFAULT_SIZE)
    description = Description(
        name=name,
        image_shape=(*size, 3),
        num_classes=len(opened.class_names),
        class_names=tuple(opened.class_names),
        splits=dict(opened.splits),
    )
    max_boxes = config.detection.max_boxes
    if isinstance(max_boxes, bool) or not isinstance(max_boxes, int) or max_boxes < 1:
        raise ValueError(f'detection.max_boxes {max_boxes!r} must be a positive whole number')
    augment = getattr(config.data, 'augment', None)
    plain = name == _SCENES and augment != 'random_scale'
    mosaic, mixup, share = (
        _share(config, key, default)
        for key, default in (('mosaic', 0.0), ('mixup', 0.0), ('mosaic_epochs', 0.7))
    )
    return Source(
        description,
        split,
        opened.example,
        opened.annotation,
        opened.count,
        opened.in_memory,
        _augmentation(augment),
        max_boxes=max_boxes,
        eval_boxes=max(max_boxes, opened.most_boxes),
        notes=notes,
        flip=not plain,
        gains=(0.0, *box_transforms.GAINS[1:]) if plain else box_transforms.GAINS,
        scale=_scale(config),
        mosaic=mosaic,
        mixup=mixup,
        mosaic_until=share * _run_length(config, opened.count) if train else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A split as it was opened: see `Source` and `Description`; the most boxes a picture has."""

    class_names: Sequence[str]
    splits: Mapping[str, int]
    example: Callable[[int], tuple[Image.Image | None, Annotation]]
    annotation: Callable[[int], Annotation]
    count: int
    in_memory: bool
    most_boxes: int


def _scenes(split: str, notes: Notes) -> _Opened:
    ranges = sources.split_ranges(_SCENES, split, scenes.COUNTS)
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
    return _Opened(
        scenes.CLASS_NAMES,
        scenes.COUNTS,
        example,
        functools.partial(operator.getitem, found),
        len(found),
        True,
        _most_boxes(found),
    )


def _voc(config: Any, name: str, folder: pathlib.Path, split: str, notes: Notes) -> _Opened:
    lists = annotations.voc_splits(name, folder)
    splits = {key: len(names) for key, names in lists.items()}
    ranges = sources.split_ranges(name, split, splits)
    names = [picture for key, low, high in ranges for picture in lists[key][low:high]]
    class_names = annotations.voc_classes(name, folder)
    found = annotations.voc(folder, list(dict.fromkeys(names)), class_names, notes)
    return _from_files(config, name, split, class_names, splits, found, notes)


def _coco(config: Any, name: str, folder: pathlib.Path, split: str, notes: Notes) -> _Opened:
    files = annotations.coco_files(name, folder)
    parts = [part.split('[')[0].strip() for part in str(split).split('+')]
    unknown = [part for part in parts if part not in files]
    if unknown:
        raise ValueError(
            f'data.split {split!r}: {name!r} has no {unknown[0]!r}; it has {", ".join(files)}'
        )
    documents = {part: annotations.coco_document(name, files[part]) for part in parts}
    categories = [annotations.coco_categories(name, d) for d in documents.values()]
    if any(c != categories[0] for c in categories):
        raise ValueError(f'data.split {split!r} of {name!r}: its parts differ in categories')
    splits = {part: len(document['images']) for part, document in documents.items()}
    found = []
    for key, low, high in sources.split_ranges(name, split, splits):
        found += annotations.coco(
            folder / key,
            documents[key]['images'][low:high],
            documents[key]['annotations'],
            list(categories[0]),
            notes,
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
) -> _Opened:
    if not found:
        reasons = '; '.join(notes.lines())
        raise ValueError(f'data.split {split!r} of {name!r} has no picture left: {reasons}')
    example = functools.partial(_from_file, found, notes)
    cache = sources.cache_setting(config.data)
    if cache is None:
        cache = 3 * sum(h * w for h, w in (a.shape for a in found)) < sources.CACHE_LIMIT
    if cache:
        # Threads, because decoding photos lets go of Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pictures = list(pool.map(functools.partial(_decoded, example), range(len(found))))
        example = functools.partial(_held, pictures, found)
    annotation = functools.partial(operator.getitem, found)
    return _Opened(class_names, splits, example, annotation, len(found), cache, _most_boxes(found))


def _tfds(config: Any, name: str, split: str, notes: Notes, *, train: bool) -> _Opened:
    """A prepared TFDS data set; its annotations are read with the pictures, when asked for."""
    import tensorflow_datasets as tfds

    builder = prepared.open_builder(name, getattr(config.data, 'data_dir', None))
    image, label, ignored = _objects(name, builder.info.features)
    splits = {key: info.num_examples for key, info in builder.info.splits.items()}
    sources.split_ranges(name, split, splits)
    encoded = isinstance(image, tfds.features.Image)
    with prepared.quiet():
        records = builder.as_data_source(
            split=split, decoders={'image': tfds.decode.SkipDecoding()} if encoded else None
        )
    example = functools.partial(_from_record, records, label.num_classes, ignored, notes)
    # Cut the truth of no picture that is evaluated: every record is read once for that.
    most = 0 if train else _most_objects(records)
    cache = bool(sources.cache_setting(config.data))
    if cache:
        examples = [example(i) for i in range(len(records))]
        pictures = [None if p is None else transforms.to_array(p) for p, _ in examples]
        example = functools.partial(_held, pictures, [found for _, found in examples])
    annotation = functools.partial(_second, example)
    names = tuple(label.names)
    return _Opened(names, splits, example, annotation, len(records), cache, most)


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
            picture = file.convert('RGB')
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


def _rows(found: Annotation) -> np.ndarray:
    """Boxes and classes as the transforms take them, [m, 5]."""
    return np.concatenate([found.boxes, found.classes[:, None]], axis=1)


def _padded(values: np.ndarray, count: int, value: Any) -> np.ndarray:
    """`count` rows: those of `values` first, then of `value`."""
    padded = np.full((count, *values.shape[1:]), value, values.dtype)
    padded[: len(values)] = values
    return padded


def _image_size(config: Any, default: int) -> tuple[int, int]:
    size = getattr(config.data, 'image_size', None)
    size = default if size is None else size
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not whole or min(sides) < 1:
        raise ValueError(
            f'data.image_size {size!r} must be a positive whole number of pixels, or two of them '
            f'(height, width), or None for {default}'
        )
    return sides


def _augmentation(augment: Any) -> str:
    if augment is None or augment == 'auto':
        return 'random_scale'
    if augment not in AUGMENTATIONS:
        raise ValueError(
            f'data.augment {augment!r} must be one of {", ".join(AUGMENTATIONS)}, or auto'
        )
    return augment


def _share(config: Any, key: str, default: float) -> float:
    value = getattr(config.data, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f'data.{key} {value!r} must be a number from 0 to 1')
    return value


def _scale(config: Any) -> tuple[float, float]:
    scale = getattr(config.data, 'scale', box_transforms.SCALE)
    low, high = scale if isinstance(scale, (tuple, list)) and len(scale) == 2 else (0, 0)
    if not 0 < low <= high:
        raise ValueError(f'data.scale {scale!r} must be two numbers, 0 < smallest <= largest')
    return low, high


def _run_length(config: Any, count: int) -> int:
    """Number of training examples of the whole run."""
    batch_size = config.train.batch_size
    return batch_size * (
        config.train.steps or max(1, round(config.train.epochs * count / batch_size))
    )
