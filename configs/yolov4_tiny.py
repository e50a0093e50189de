"""YOLOv4-tiny with attention in its neck (bubbliiiing/yolov4-tiny-pytorch; arXiv 2011.08036).

    python train.py --config configs/yolov4_tiny.py --config.model.attention=cbam
    python train.py --config configs/yolov4_tiny.py:bccd --config.data.name=voc:BCCD
    python train.py --config configs/yolov4_tiny.py:voc --config.data.name=voc:VOCdevkit/VOC2007
    python train.py --config configs/yolov4_tiny.py:coco --config.data.name=coco:COCO

Without an argument it trains a network of half the width on `digit_scenes`: handwritten digits on
128 x 128 pixels, enlarged to 160 x 160. `model.attention` is any mechanism that keeps its input's
shape, in three places of the neck; `yolov4_tiny_voc_phi0` ... `phi4` as `model.name` are the
repository's five forms.

`voc` and `coco` follow the repository's recipe: 416 x 416, batch 16, SGD with Nesterov momentum
0.937, weight decay 5e-4 on kernels, 300 epochs, rate 0.01 * batch / 64. Published numbers are of
`--config.data.name=voc:VOCdevkit/VOC2007+VOCdevkit/VOC2012`. Mosaic and mixup are off, as there:
`--config.data.mosaic=0.5` and `--config.data.mixup=0.5` turn them on. From released weights
(`--config.model.pretrained=FILE`) the repository first trains with the backbone frozen; here these
are two runs, each with a schedule of its own:

    --workdir A --config.model.pretrained=FILE "--config.optimizer.frozen=('backbone',)" \
        --config.train.epochs=50 --config.train.batch_size=32 --config.optimizer.learning_rate=5e-3
    --workdir B --config.model.pretrained=A --config.train.epochs=250
"""

from ml_collections import ConfigDict

from attention_jax.config import defaults


def get_config(arg: str = 'digit_scenes') -> ConfigDict:
    if arg not in DATASETS:
        raise ValueError(f'config argument {arg!r} is unknown: use one of {", ".join(DATASETS)}')
    config = defaults()
    config.task = 'detection'
    config.model.name = 'yolov4_tiny'
    config.optimizer.learning_rate = 2.5e-3
    config.optimizer.momentum = 0.937
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay_mask = 'norms_and_biases'
    config.schedule.name = 'yolo'
    config.train.batch_size = 16
    DATASETS[arg](config)
    return config


def _digit_scenes(config: ConfigDict) -> None:
    config.model.arguments.width = 0.5
    config.data.name = 'digit_scenes'
    config.data.image_size = 160  # the smallest digits are hardly larger than a cell
    config.data.scale = (0.8, 1.25)  # the smallest digits have 12 pixels
    config.detection.max_boxes = 16
    # attention-jax anchors digit_scenes --size 160
    config.detection.anchors = ((12, 18), (18, 26), (24, 35), (30, 42), (38, 54), (48, 65))
    config.detection.masks = ((3, 4, 5), (0, 1, 2))
    _short(config)
    config.train.epochs = 50
    config.train.eval_every = 10
    config.train.ema_decay = 0.998


def _voc(config: ConfigDict) -> None:
    config.data.name = 'voc:VOCdevkit/VOC2007'
    config.data.split = 'trainval'
    _published(config)


def _coco(config: ConfigDict) -> None:
    config.data.name = 'coco:coco'
    config.data.split = 'train2017'
    config.data.test_split = 'val2017'
    _published(config)


def _bccd(config: ConfigDict) -> None:
    """Blood cells: 292 training pictures of github.com/Shenggan/BCCD_Dataset."""
    config.data.name = 'voc:BCCD'
    config.data.split = 'trainval'
    # attention-jax anchors voc:BCCD --split trainval
    config.detection.anchors = ((25, 25), (56, 62), (68, 56), (68, 68), (79, 72), (141, 129))
    config.detection.masks = ((3, 4, 5), (0, 1, 2))
    config.data.scale = (0.5, 1.5)
    _short(config)
    config.train.epochs = 15
    config.train.batch_size = 8
    config.train.eval_every = 5


def _published(config: ConfigDict) -> None:
    """As long as the repository trains; each evaluation takes as long as some steps."""
    config.train.epochs = 300
    config.train.eval_every = 10
    config.data.workers = 8


def _short(config: ConfigDict) -> None:
    """For runs from nothing, in minutes; the repository's recipe takes longer to tell classes."""
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 2e-3
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 0.05
    config.schedule.name = 'cosine'
    config.schedule.warmup_epochs = 1.0
    config.detection.class_weight = 0.5


DATASETS = {'digit_scenes': _digit_scenes, 'voc': _voc, 'coco': _coco, 'bccd': _bccd}
