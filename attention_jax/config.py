"""Every key of a config: its default, meaning, type and what is allowed; and files of configs.

    config = load_config('configs/resnet_gc.py:cifar10')   # what a study changes in `defaults()`
    config.train.epochs = 3
    check(config)

On the command line `--config.train.epochs=3` does the same. A file may add keys of its own, which
its task reads.
"""

import dataclasses
import difflib
import functools
import pathlib
import runpy
import sys
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from attention_jax import checks


@dataclasses.dataclass(frozen=True)
class Key:
    """What is known of a key.

    Attributes:
        default: None is a value of its own; an empty dict takes keys of any name.
        meaning: what it is, and its unit.
        value_type: where the default, None, does not tell it.
        choices: all values, where they are few.
        at_least: the smallest number.
        at_most: the largest number.
        below: a number that all are below.
    """

    default: Any
    meaning: str
    value_type: type | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    @property
    def allowed(self) -> str:
        """The range of numbers in words, e.g. 'at least 1', or 'in 0 to 1, 1 excluded'."""
        if self.below is not None:
            return f'in {self.at_least} to {self.below}, {self.below} excluded'
        if self.at_most is not None:
            return f'in {self.at_least} to {self.at_most}'
        return f'at least {self.at_least}'

    def allows(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


_from_0 = functools.partial(Key, at_least=0)
_from_1 = functools.partial(Key, at_least=1)
_share = functools.partial(Key, at_least=0, at_most=1)
_rate = functools.partial(Key, at_least=0, below=1)

KEYS = {
    'task': Key('classification', 'classification, detection, or a registered one.'),
    'model.name': Key('resnet50', 'Network, one of `attention_jax.list_models()`.'),
    'model.num_classes': Key(None, "Number of outputs; None: the data set's classes.", int),
    'model.attention': Key(
        '', 'Mechanism in it, one of `list_attention()`; empty: its own, or none.'
    ),
    'model.attention_args': Key({}, 'Arguments of the mechanism; or a tuple of one dict a stage.'),
    'model.placement': Key('', "WHERE[@STAGES], e.g. branch@2+3; empty: the mechanism's authors'."),
    'model.identity_init': Key(
        False, 'The mechanism starts as the identity, see models/attach.py.'
    ),
    'model.arguments': Key({}, 'Further arguments of the network, e.g. zero_init_last.'),
    'model.pretrained': Key('', 'File, work directory or hub id to start from; empty: random.'),
    'data.name': Key('digits', "'digits' or any TFDS name; detection: digit_scenes, voc:, coco:."),
    'data.data_dir': Key(None, 'Where TFDS finds the data; None: ~/tensorflow_datasets.', str),
    'data.split': Key('train', 'Examples to train on; slices work: train[:90%].'),
    'data.test_split': Key('test', 'Examples to evaluate on, each counted once.'),
    'data.image_size': Key(
        None, "Pixels a side, for boxes also (h, w); None: the data's, 224, for boxes 416.", object
    ),
    'data.augment': Key(
        'auto',
        'none, pad_crop, pad_crop_flip, random_resized_crop; for boxes random_scale; or auto.',
    ),
    'data.workers': _from_0(
        0, 'Processes that decode what is not in memory; 0: threads of this one.'
    ),
    'data.cache': Key(None, 'Hold decoded images in memory; None: if they are small.', bool),
    'data.preprocessing': Key(
        'auto',
        'auto: as model.pretrained was trained, if given; dataset: as usual for it.',
        choices=('auto', 'dataset'),
    ),
    'data.scale': Key((0.25, 2.0), 'Detection: limits of the random scale.'),
    'data.mosaic': _share(0.0, 'Detection: probability that an example is made of four images.'),
    'data.mixup': _share(0.0, 'Detection: probability that such a one is mixed with another.'),
    'data.mosaic_epochs': _share(
        0.7, 'Detection: share of the run, from its start, with these two.'
    ),
    'detection.anchors': Key((), "(w, h) of boxes in pixels; empty: the network's own."),
    'detection.masks': Key(
        (), "Numbers of a scale's anchors, stride 32 first; empty: the network's own."
    ),
    'detection.ignore_threshold': _share(
        0.5, 'IoU from which a box nobody asked for is not called wrong.'
    ),
    'detection.class_weight': _from_0(
        None, "Weight of the loss's term; None: classes / 80, its authors'.", float
    ),
    'detection.score_threshold': _share(0.001, 'Score of the least certain box evaluated.'),
    'detection.iou_threshold': _share(
        0.5, 'IoU from which the worse of two boxes of a class is dropped.'
    ),
    'detection.max_detections': _from_1(300, 'Boxes found in an image; the best are kept.'),
    'detection.max_boxes': _from_1(100, 'Boxes of an image in training; the largest are kept.'),
    'optimizer.name': Key('sgd', 'Optimiser.', choices=('sgd', 'adamw')),
    'optimizer.learning_rate': _from_0(0.1, 'Rate at the top of the schedule.'),
    'optimizer.momentum': _rate(0.9, 'sgd: momentum; adamw: beta 1.'),
    'optimizer.nesterov': Key(False, "sgd: Nesterov's form of the momentum."),
    'optimizer.weight_decay': _from_0(1e-4, 'sgd: added to the gradient (L2); adamw: decoupled.'),
    'optimizer.decay_mask': Key(
        'none', 'What is left out of weight decay.', choices=('none', 'norms_and_biases')
    ),
    'optimizer.frozen': Key((), "Parts of the network that are not trained, e.g. ('backbone',)."),
    'optimizer.clip_norm': _from_0(0.0, 'Largest global norm of the gradient; 0: no clipping.'),
    'optimizer.accumulate': _from_1(1, 'Batches whose gradients are averaged for one update.'),
    'schedule.name': Key(
        'steps',
        "Course of the rate: cosine falls to 0; yolo is that network's authors'.",
        choices=('cosine', 'steps', 'exponential', 'constant', 'yolo'),
    ),
    'schedule.warmup_epochs': _from_0(0.0, 'Epochs of a linear rise from 0.'),
    'schedule.boundaries': Key(
        (0.3, 0.6, 0.9), 'steps: fractions of the run, so that epochs may change.'
    ),
    'schedule.factor': Key(
        0.1, 'Factor on the rate at each boundary (steps) or epoch (exponential).'
    ),
    'train.epochs': _from_1(100, 'Passes over the training split.'),
    'train.steps': _from_0(0, 'Batches of the run; 0: as many as make the epochs.'),
    'train.batch_size': _from_1(256, 'Images of a batch, over all devices and processes.'),
    'train.seed': Key(
        0, 'Seed of parameters, order, augmentation and dropout.', at_least=0, at_most=2**32 - 1
    ),
    'train.compute_dtype': Key(
        'float32',
        'Type of the computation; parameters and sums stay float32.',
        choices=('float32', 'bfloat16'),
    ),
    'train.label_smoothing': _rate(0.0, 'Share of the label spread evenly over the classes.'),
    'train.eval_every': _from_1(
        1, 'Epochs between evaluations; the last step is always evaluated.'
    ),
    'train.checkpoint_every': _from_0(
        500, 'Batches between checkpoints; an evaluation saves too. 0: only these.'
    ),
    'train.log_every': _from_1(50, 'Batches between rows of metrics.'),
    'train.ema_decay': _rate(
        0.0, 'Decay of the moving average of the variables, evaluated in their place; 0: off.'
    ),
    'mesh.data': Key(
        -1, 'Devices that split the batch only; -1: all that fsdp leaves.', at_least=-1
    ),
    'mesh.fsdp': _from_1(1, 'Devices that split batch, parameters and optimiser state.'),
}


def defaults() -> ConfigDict:
    """Returns a config of every key with its default."""
    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        *groups, last = name.split('.')
        group = functools.reduce(lambda tree, name: tree.setdefault(name, {}), groups, tree)
        group[last] = placeholder(key.value_type) if key.default is None else key.default
    return ConfigDict(tree)


def check(config: ConfigDict) -> None:
    """Raises a ValueError for a value that is not allowed.

    What only the data, the devices or a registry can tell is checked where these are known.
    """
    values = flatten(config)
    for name, key in KEYS.items():
        value = values.get(name)
        if value is None:
            continue
        if key.choices:
            checks.choice(name, value, key.choices)
        elif not key.allows(value):
            raise ValueError(f'{name} must be {key.allowed}, got {value}')
    boundaries = tuple(values.get('schedule.boundaries', ()))
    if not all(0 < b < 1 for b in boundaries) or sorted(set(boundaries)) != list(boundaries):
        raise ValueError(
            f'schedule.boundaries {boundaries} must be rising fractions of the run, '
            'between 0 and 1: 0.5 is the middle'
        )
    scale = values.get('data.scale', (1, 1))
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f'data.scale {scale!r} must be two numbers, 0 < smallest <= largest')


def load_config(spec: str) -> ConfigDict:
    """Returns the config of `FILE[:ARG]`.

    Raises:
        ValueError: no such file, it has no `get_config`, or that refuses ARG.
    """
    name, _, argument = spec.partition(':')
    path = pathlib.Path(name)
    if not path.is_file():
        files = [*pathlib.Path('configs').glob('*.py'), *path.parent.glob('*.py')]
        there = {file.stem: str(file) for file in files}
        raise ValueError(f'config file {name} does not exist{suggest(path.stem, there)}')
    # A study imports its neighbours as `configs.datasets`.
    sys.path.insert(0, str(path.resolve().parents[1]))
    try:
        module = runpy.run_path(name)
    finally:
        sys.path.pop(0)
    if 'get_config' not in module:
        raise ValueError(f'config file {name} has no function get_config')
    return module['get_config'](*[argument] if argument else [])


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns dotted name -> value; an empty group is a value."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping | ConfigDict) and value:
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value
    return flat


def suggest(given: str, known: Mapping[str, str]) -> str:
    """Returns a question that names the values whose keys are closest to `given`, or nothing."""
    close = [known[key] for key in difflib.get_close_matches(given, known, n=2, cutoff=0.7)]
    return f', did you mean {" or ".join(close)}?' if close else ''
