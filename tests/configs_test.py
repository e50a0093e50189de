"""Every study at every dataset: its network exists, it has all keys and no others."""

import pathlib

import jax
import pytest

from attention_jax.config import check, defaults, flatten, load_config
from attention_jax.tasks.network import build_model
from attention_jax.training.optimizer import make_optimizer, make_schedule
from configs import datasets, yolov4_tiny

CONFIGS = pathlib.Path(datasets.__file__).parent
DETECTION = 'yolov4_tiny'
OTHERS = ('__init__', 'datasets', DETECTION)
STUDIES = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem not in OTHERS)
GROUPS = {
    'model': (
        'name num_classes attention attention_args placement arguments pretrained identity_init'
    ),
    'data': (
        'name data_dir split test_split image_size augment workers cache preprocessing scale '
        'mosaic mixup mosaic_epochs'
    ),
    'detection': (
        'anchors masks ignore_threshold class_weight score_threshold iou_threshold max_detections '
        'max_boxes'
    ),
    'optimizer': (
        'name learning_rate momentum nesterov weight_decay decay_mask frozen clip_norm accumulate'
    ),
    'schedule': 'name warmup_epochs boundaries factor',
    'train': (
        'epochs steps batch_size seed compute_dtype label_smoothing eval_every checkpoint_every '
        'log_every ema_decay'
    ),
    'mesh': 'data fsdp',
}
KEYS = ['task', *(f'{group}.{key}' for group, keys in GROUPS.items() for key in keys.split())]
# What each study trains on ImageNet, by the recipes of the papers: parameters, epochs, batch, rate,
# schedule; and the weight decay and what it spares where they are not 1e-4 and nothing.
IMAGENET = {
    'resnet': (25_557_032, 90, 256, 0.1, 'steps'),
    'resnet_se': (28_071_976, 100, 1024, 0.6, 'steps'),
    'resnet_eca': (25_557_112, 100, 256, 0.1, 'steps'),
    'resnet_cbam': (28_089_624, 100, 256, 0.1, 'steps'),
    'resnet_gc': (28_078_773, 120, 256, 0.1, 'cosine'),
    'resnet_nl': (32_915_496, 100, 256, 0.1, 'steps'),
    'resnet_bam': (25_915_099, 100, 256, 0.1, 'steps'),
    'resnet_triplet': (25_561_832, 100, 256, 0.1, 'steps'),
    'resnet_a2': (32_907_304, 100, 256, 0.1, 'steps'),
    'resnet_cgnl': (27_197_480, 110, 256, 0.01, 'steps'),
    'resnet_gsop': (28_285_224, 95, 384, 0.1, 'steps'),
    'resnext': (25_028_904, 90, 256, 0.1, 'steps'),
    'sknet': (27_479_784, 100, 256, 0.1, 'steps', 1e-4, 'norms_and_biases'),
    'resnest': (27_483_240, 270, 8192, 3.2, 'cosine', 1e-4, 'norms_and_biases'),
    'mobilenetv2': (3_504_872, 400, 96, 0.045, 'exponential', 4e-5),
}


def leaves(config):
    """Dotted keys of the values; arguments of a network count as one."""
    keys = {'.'.join(key.split('.')[:2]) for key in flatten(config)}
    return sorted(key for key in keys if key.count('.') or key == 'task')


def load(study: str, dataset: str = ''):
    return load_config(f'{CONFIGS / study}.py' + (f':{dataset}' if dataset else ''))


def test_base_has_the_public_keys():
    assert leaves(defaults()) == sorted(KEYS)


@pytest.mark.parametrize('study', STUDIES)
@pytest.mark.parametrize('dataset', ['', *datasets.DATASETS])
def test_study_can_be_built(study, dataset):
    config = load(study, dataset)
    config.lock()
    assert leaves(config) == sorted(KEYS)
    assert config.data.name == (dataset or 'digits')
    check(config)
    rate = config.optimizer.learning_rate
    steps = config.train.epochs * 100
    schedule = make_schedule(config.schedule, rate, steps=steps, steps_per_epoch=100)
    make_optimizer(config.optimizer, schedule)
    model = build_model(config, 10)
    if dataset != 'imagenet2012':  # see test_imagenet_recipe
        shape = (1, 32, 32, 3) if dataset == 'cifar10' else (1, 8, 8, 1)
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, 'float32'))


@pytest.mark.parametrize('study', STUDIES)
def test_imagenet_recipe(study):
    config = load(study, 'imagenet2012')
    parameters, *recipe = IMAGENET[study]
    recipe += (1e-4, 'none')[len(recipe) - 4 :]
    train, optimizer = config.train, config.optimizer
    assert recipe == [
        train.epochs,
        train.batch_size,
        optimizer.learning_rate,
        config.schedule.name,
        optimizer.weight_decay,
        optimizer.decay_mask,
    ]
    assert optimizer.momentum == 0.9
    model = build_model(config, 1000)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), 'float32')
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == parameters


def test_steps_of_imagenet_fall_each_thirty_epochs():
    for study, (_, epochs, _, _, schedule, *_) in IMAGENET.items():
        if schedule == 'steps':
            boundaries = load(study, 'imagenet2012').schedule.boundaries
            expected = [41, 71, 91] if study == 'resnet_cgnl' else list(range(30, epochs, 30))
            assert [b * epochs for b in boundaries] == pytest.approx(expected)


def test_cifar_is_akamasters():
    config = load('resnet', 'cifar10')
    assert [round(b * config.train.epochs) for b in config.schedule.boundaries] == [100, 150]
    assert (config.train.batch_size, config.model.name) == (128, 'cifar_resnet20')


def test_unknown_dataset():
    with pytest.raises(ValueError, match="'mars' is unknown: use one of digits, cifar10, imagenet"):
        load('resnet', 'mars')


@pytest.mark.parametrize('dataset', ['', *yolov4_tiny.DATASETS])
def test_detection_can_be_built(dataset):
    config = load(DETECTION, dataset)
    config.lock()
    assert leaves(config) == sorted(KEYS)
    assert config.task == 'detection'
    check(config)
    steps = config.train.epochs * 100
    rate = config.optimizer.learning_rate
    schedule = make_schedule(config.schedule, rate, steps=steps, steps_per_epoch=100)
    make_optimizer(config.optimizer, schedule)
    model = build_model(config, 20)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), 'float32')
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    if dataset in ('voc', 'coco'):
        assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == 5_918_006
        assert [float(schedule(e * 100)) for e in (0, 3, 299)] == pytest.approx(
            [2.5e-4, 2.5e-3, 2.5e-5]
        )
        assert (config.train.epochs, config.train.batch_size) == (300, 16)
