"""Pictures with boxes as examples of training and evaluation."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from attention_jax import data
from attention_jax.data.examples import Batch
from attention_jax.data.settings import augmentation, image_size
from attention_jax.data.transforms import to_array
from attention_jax.tasks.detection import reading, scenes, transforms
from attention_jax.tasks.detection.annotations import Notes

AUGMENTATIONS = ('none', 'random_scale')
_DEFAULT_SIZE = 416


@dataclasses.dataclass(frozen=True, eq=False)
class Source(data.Examples):
    """Pictures with boxes, out of memory or decoded when asked for.

    Attributes:
        pictures: see `reading.Opened`.
        augment: one of `AUGMENTATIONS`, for training.
        max_boxes: of a training example; the largest are kept.
        eval_boxes: of an evaluation example; at least as many as any picture has.
        notes: what was wrong with the data so far.
        flip: whether pictures may be mirrored.
        gains: see `transforms.random_colors`.
        scale: see `transforms.random_placement`.
        mosaic: probability that an example is made of four pictures.
        mixup: probability that such a one is mixed with one more.
        mosaic_until: number of examples of the run after which there is neither.
    """

    pictures: Any
    augment: str
    max_boxes: int
    eval_boxes: int
    notes: Notes
    flip: bool
    gains: tuple[float, float, float]
    scale: tuple[float, float]
    mosaic: float
    mixup: float
    mosaic_until: float

    by_position: ClassVar[bool] = True

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.pictures)

    @property
    def in_memory(self) -> bool:
        """Whether the decoded pictures are held."""
        return self.pictures.in_memory

    def warnings(self) -> list[str]:
        """What was left out of the data so far and why, counted, a line each."""
        where = f'{self.description.name}, {self.split}'
        return [f'{where}: {line}' for line in self.notes.lines()]

    def box_sizes(self) -> np.ndarray:
        """Sizes of all boxes but the ignored ones, (w, h) in pixels of the letterboxed picture."""
        sizes = [np.zeros((0, 2))]
        for number in range(len(self)):
            found = self.pictures.annotation(number)
            boxes = transforms.letterbox_boxes(found.rows[~found.ignore], found.shape, self._size)
            sizes.append(boxes[:, 2:4] - boxes[:, :2])
        return np.concatenate(sizes)

    def train_example(self, index: tuple[int, int], rng: np.random.Generator) -> Batch:
        """An augmented example.

        Args:
            index: (examples before it in the run, index of the picture).
            rng: of its draws.

        Returns:
            'image' uint8 [h, w, 3]; 'boxes' float32 [max_boxes, 4], (cx, cy, w, h) over its sides;
            'classes' int32 [max_boxes], -1 for padding, whose boxes are 0.
        """
        position, number = index
        if self.augment == 'none':
            picture, boxes = self._asked_for(number)
            shape = picture.height, picture.width
            boxes = transforms.letterbox_boxes(boxes, shape, self._size)
            canvas = transforms.letterbox(picture, self._size)
        elif position < self.mosaic_until and rng.random() < self.mosaic:
            canvas, boxes = self._mosaic(number, rng)
            if rng.random() < self.mixup:
                one_more = self._random_scale(int(rng.integers(len(self))), rng)
                canvas, boxes = transforms.mixup((canvas, boxes), one_more)
        else:
            canvas, boxes = self._random_scale(number, rng)
        if len(boxes) > self.max_boxes:
            self.notes.add(
                f'pictures of more than {self.max_boxes} boxes (detection.max_boxes), the largest '
                'kept',
                self.pictures.annotation(number).name,
            )
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            largest = np.argsort(-areas, kind='stable')[: self.max_boxes]
            boxes = boxes[np.sort(largest)]
        return _example(canvas, boxes, self._size, self.max_boxes)

    def eval_example(self, position: int) -> Batch:
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
        picture, found = self.pictures[position] if position < len(self) else (None, None)
        if picture is None:
            image, shape = Image.new('RGB', self._size[::-1]), self._size
            boxes, ignore = np.zeros((0, 5)), np.zeros(0, bool)
        else:
            image, shape = transforms.letterbox(picture, self._size), found.shape
            boxes, ignore = found.rows, found.ignore
        return _example(image, boxes, shape, self.eval_boxes) | {
            'ignore': _padded(ignore, self.eval_boxes, False),
            'shape': np.array(shape, np.int32),
            'mask': np.float32(picture is not None),
        }

    @property
    def _size(self) -> tuple[int, int]:
        return self.description.image_shape[:2]

    def _asked_for(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """A picture and the boxes [m, 5] to learn; grey without boxes if it does not decode."""
        picture, found = self.pictures[number]
        if picture is None:
            return Image.new('RGB', self._size[::-1], transforms.GREY), np.zeros((0, 5))
        return picture, found.rows[~found.ignore]

    def _shuffled(self, number: int, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
        # Of two boxes that the same prediction answers for, the later one counts: not always the
        # same one.
        picture, boxes = self._asked_for(number)
        return picture, boxes[rng.permutation(len(boxes))]

    def _random_scale(
        self, number: int, rng: np.random.Generator
    ) -> tuple[Image.Image, np.ndarray]:
        one = self._shuffled(number, rng)
        canvas, boxes = transforms.random_scale(
            *one, self._size, rng, flip=self.flip, scale=self.scale
        )
        return transforms.random_colors(canvas, rng, self.gains), boxes

    def _mosaic(self, number: int, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
        numbers = rng.permutation([number, *rng.integers(len(self), size=3)])
        four = [self._shuffled(int(n), rng) for n in numbers]
        canvas, boxes = transforms.mosaic(four, self._size, rng, flip=self.flip)
        return transforms.random_colors(canvas, rng, self.gains), boxes


def open_split(
    config: Any, split: str, preprocessing: Any = None, *, train: bool = False
) -> Source:
    """Opens one split of a data set with boxes; see `tasks.open_source`.

    Nothing is downloaded, and nothing in the data ends a run: what is bad is left out, counted,
    and told by `Source.warnings`. Only a split without any picture is an error.

    Args:
        config: the whole config. `data.name` is 'digit_scenes' (handwritten digits on 128x128, no
            files, see `scenes.draw`); 'voc:PATH', a folder with Annotations, JPEGImages and
            ImageSets/Main, or 'voc:PATH+PATH' for the pictures of several; 'coco:PATH', a folder
            with annotations/instances_SPLIT.json and the pictures in SPLIT/; or a TFDS name with
            `image` and `objects`, such as 'voc/2007' and 'coco/2017'.
            `data.augment` 'auto' is 'random_scale' (scale, aspect, place, mirroring and colours),
            for digit_scenes without mirroring and without change of hue; `data.cache` None holds
            pictures of known sizes that take less than 1 GiB.
        split: a split, or as for `data.settings.split_ranges` slices and sums of splits.
        preprocessing: not used: these networks take pixels over 255, whatever they were trained on.
        train: whether the split is trained on.

    Raises:
        ValueError: an unknown name, split or setting; data that is not there or not of this form;
            a split without pictures.
    """
    del preprocessing
    notes = Notes()
    opened = reading.open_data(config, split, notes, train=train)
    settings, name = config.data, config.data.name
    usual = scenes.SIZE if name == reading.SCENES else _DEFAULT_SIZE
    size = image_size(settings, (usual, usual), str(usual))
    plain = name == reading.SCENES and settings.augment != 'random_scale'
    run = 0  # its examples
    if train:
        run = config.train.batch_size * data.number_of_steps(config.train, len(opened.pictures))
    return Source(
        data.Description(
            name=name,
            image_shape=(*size, 3),
            num_classes=len(opened.class_names),
            class_names=tuple(opened.class_names),
            splits=dict(opened.splits),
        ),
        split,
        pictures=opened.pictures,
        augment=augmentation(settings, AUGMENTATIONS, 'random_scale'),
        max_boxes=config.detection.max_boxes,
        eval_boxes=max(config.detection.max_boxes, opened.most_boxes),
        notes=notes,
        flip=not plain,
        gains=(0.0, *transforms.GAINS[1:]) if plain else transforms.GAINS,
        scale=tuple(settings.scale),
        mosaic=settings.mosaic,
        mixup=settings.mixup,
        mosaic_until=settings.mosaic_epochs * run,
    )


def _example(picture: Image.Image, boxes: np.ndarray, shape: tuple[int, int], count: int) -> Batch:
    """A picture and `count` boxes, of which those over sides of `shape` come first."""
    return {
        'image': to_array(picture),
        'boxes': _padded(transforms.relative(boxes, shape), count, 0),
        'classes': _padded(boxes[:, 4].astype(np.int32), count, -1),
    }


def _padded(values: np.ndarray, count: int, value: Any) -> np.ndarray:
    """`count` rows: those of `values` first, then of `value`."""
    padded = np.full((count, *values.shape[1:]), value, values.dtype)
    padded[: len(values)] = values
    return padded
