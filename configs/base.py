"""Every key of a config: its default, meaning and unit; and what a dataset changes in them.

A study imports this file and says only what differs:

    config = base.get_config(arg)
    config.model.attention = 'gc'

`arg` is the dataset: 'digits' (embedded, small), 'cifar10' or 'imagenet2012'. On the command line
`--config configs/resnet_gc.py:cifar10` chooses it, and `--config.GROUP.KEY=VALUE` overrides a key.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import create, placeholder


def get_config(arg: str = 'digits') -> ConfigDict:
    """Returns the config of a plain ResNet on the dataset `arg`.

    Raises:
        ValueError: `arg` is not one of the datasets.
    """
    if arg not in DATASETS:
        raise ValueError(f'config argument {arg!r} is unknown: use one of {", ".join(DATASETS)}')
    config = defaults()
    DATASETS[arg](config)
    return config


def defaults() -> ConfigDict:
    """Returns every key with its default."""
    return create(
        task='classification',  # or detection
        model=create(
            name='resnet50',  # `attention_jax.list_models()`
            num_classes=placeholder(int),  # None: the dataset's
            attention='',  # `attention_jax.list_attention()`; empty: none
            attention_args=create(),  # its arguments; or a tuple of one dict a stage
            placement='',  # WHERE[@STAGES], e.g. branch@2+3; empty: its authors'
            identity_init=False,  # the mechanism starts as the identity, see models/attach.py
            arguments=create(),  # further arguments of the network, e.g. zero_init_last
            pretrained='',  # file, work directory or hub id to start from; empty: random
        ),
        data=create(
            name='digits',  # 'digits' or any TFDS name
            data_dir=placeholder(str),  # where TFDS finds it; None: ~/tensorflow_datasets
            split='train',  # examples to train on; slices work: train[:90%]
            test_split='test',  # examples to evaluate on, each counted once
            # pixels a side, for boxes also (h, w); None: the dataset's own, or 224, for boxes 416
            image_size=placeholder(object),
            # none, pad_crop, pad_crop_flip, random_resized_crop; for boxes random_scale; or auto
            augment='auto',
            workers=0,  # processes that decode what is not in memory; 0: threads of this one
            cache=placeholder(bool),  # hold the decoded images in memory; None: if they are small
            preprocessing='auto',  # auto: as model.pretrained was trained, if given; or dataset
            scale=(0.25, 2.0),  # detection: limits of the random scale
            mosaic=0.0,  # detection: probability that an example is made of four images
            mixup=0.0,  # detection: probability that such a one is mixed with one more image
            mosaic_epochs=0.7,  # detection: share of the run, from its start, that has these two
        ),
        detection=create(
            anchors=(),  # (w, h) of boxes in pixels; empty: the network's own
            masks=(),  # the numbers of each scale's anchors, stride 32 first; empty: the network's
            ignore_threshold=0.5,  # IoU from which a box nobody asked for is not called wrong
            class_weight=placeholder(float),  # of the loss's term; None: classes / 80, its authors'
            score_threshold=0.001,  # of the least certain box that is evaluated
            iou_threshold=0.5,  # from which on the worse of two boxes of a class is dropped
            max_detections=300,  # an image, the best
            max_boxes=100,  # an image, in training; the largest are kept
        ),
        optimizer=create(
            name='sgd',  # sgd or adamw
            learning_rate=0.1,  # at the top of the schedule
            momentum=0.9,  # sgd: momentum; adamw: beta 1
            nesterov=False,  # sgd only
            weight_decay=1e-4,  # sgd: added to the gradient (L2); adamw: decoupled
            decay_mask='none',  # left out of weight decay: none, or norms_and_biases
            frozen=(),  # parts of the network that are not trained, e.g. ('backbone',)
            clip_norm=0.0,  # largest global norm of the gradient; 0: no clipping
            accumulate=1,  # batches whose gradients are averaged for one update
        ),
        schedule=create(
            name='steps',  # cosine (to 0), steps, exponential, constant, or yolo (its authors')
            warmup_epochs=0.0,  # linear from 0, in epochs
            boundaries=(0.3, 0.6, 0.9),  # steps: fractions of the run, so that epochs may change
            factor=0.1,  # of the rate: at each boundary (steps), after each epoch (exponential)
        ),
        train=create(
            epochs=100,  # passes over the training split
            steps=0,  # batches; 0: as many as make the epochs
            batch_size=256,  # images, over all devices and processes
            seed=0,  # of parameters, order, augmentation and dropout
            compute_dtype='float32',  # float32 or bfloat16; parameters and sums stay float32
            label_smoothing=0.0,  # share of the label spread evenly over the classes, 0 to 1
            eval_every=1,  # epochs; the last step is always evaluated
            checkpoint_every=500,  # batches; an evaluation saves too. 0: evaluations only
            log_every=50,  # batches
            ema_decay=0.0,  # moving average of the variables, evaluated in their place; 0: off
        ),
        mesh=create(
            data=-1,  # devices that split the batch only; -1: all that fsdp leaves
            fsdp=1,  # devices that split batch, parameters and optimiser state
        ),
    )


def _digits(config: ConfigDict) -> None:
    config.model.name = 'tiny_resnet'
    config.data.augment = 'none'  # the 8x8 originals fill their frame: a crop cuts strokes off
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = 'cosine'
    config.schedule.warmup_epochs = 1.0
    config.train.epochs = 15
    config.train.batch_size = 64
    config.train.label_smoothing = 0.1
    config.train.eval_every = 3
    config.train.log_every = 11


def _cifar10(config: ConfigDict) -> None:
    """ResNet-20 as github.com/akamaster/pytorch_resnet_cifar10 trains it: x0.1 at 100 and 150."""
    config.model.name = 'cifar_resnet20'
    config.data.name = 'cifar10'
    config.schedule.boundaries = (0.5, 0.75)
    config.train.epochs = 200
    config.train.batch_size = 128


def _imagenet2012(config: ConfigDict) -> None:
    """What ECA and CBAM ran: 100 epochs, batch 256, rate 0.1, x0.1 each 30 epochs, decay on all."""
    config.data.name = 'imagenet2012'
    config.data.test_split = 'validation'
    config.data.workers = 8


DATASETS = {'digits': _digits, 'cifar10': _cifar10, 'imagenet2012': _imagenet2012}
