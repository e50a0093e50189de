"""Every study at every dataset: its network exists, it has all keys and no others."""

import pathlib

import jax
import pytest

from attention_jax import command_line, create_model
from attention_jax.tasks.classification import build_model
from attention_jax.training.optimizer import make_optimizer, make_schedule
from attention_jax.training.workdir import check_config
from configs import base

CONFIGS = pathlib.Path(base.__file__).parent
STUDIES = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem not in ('__init__', 'base'))
GROUPS = {
    'model': 'name num_classes attention attention_args placement arguments',
    'data': 'name data_dir split test_split image_size augment workers cache',
    'optimizer': (
        'name learning_rate momentum nesterov weight_decay decay_mask clip_norm accumulate'
    ),
    'schedule': 'name warmup_epochs boundaries factor',
    'train': (
        'epochs steps batch_size seed compute_dtype label_smoothing eval_every checkpoint_every '
        'log_every ema_decay'
    ),
    'mesh': 'data fsdp',
}
KEYS = ['task', *(f'{group}.{key}' for group, keys in GROUPS.items() for key in keys.split())]
# What each study trains on ImageNet, by the recipes of the papers.
IMAGENET = {
    'resnet': (25_557_032, 90, 256, 0.1, 'steps'),
    'resnet_se': (28_071_976, 100, 1024, 0.6, 'steps'),
    'resnet_eca': (25_557_112, 100, 256, 0.1, 'steps'),
    'resnet_cbam': (28_089_624, 100, 256, 0.1, 'steps'),
    'resnet_gc': (28_078_773, 120, 256, 0.1, 'cosine'),
    'resnet_nl': (32_915_496, 100, 256, 0.1, 'steps'),
}


def leaves(config):
    """Dotted keys of the values, empty groups included."""
    keys = command_line.keys(config)
    return [key for key in keys if key.count('.') or key == 'task']


def load(study: str, dataset: str = ''):
    return command_line.load_config(f'{CONFIGS / study}.py' + (f':{dataset}' if dataset else ''))


def test_base_has_the_public_keys():
    assert sorted(leaves(base.defaults())) == sorted(KEYS)


@pytest.mark.parametrize('study', STUDIES)
@pytest.mark.parametrize('dataset', ['', *base.DATASETS])
def test_study_can_be_built(study, dataset):
    config = load(study, dataset)
    config.lock()
    assert sorted(leaves(config)) == sorted(KEYS)
    assert config.data.name == (dataset or 'digits')
    check_config(config)
    rate = config.optimizer.learning_rate
    steps = config.train.epochs * 100
    schedule = make_schedule(config.schedule, rate, steps=steps, steps_per_epoch=100)
    make_optimizer(config.optimizer, schedule)
    build_model(config, 10)


@pytest.mark.parametrize('study', STUDIES)
def test_imagenet_recipe(study):
    config = load(study, 'imagenet2012')
    parameters, *recipe = IMAGENET[study]
    train = config.train
    assert recipe == [
        train.epochs,
        train.batch_size,
        config.optimizer.learning_rate,
        config.schedule.name,
    ]
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 1e-4)
    assert config.optimizer.decay_mask == 'none'
    model = create_model(config.model.name)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), 'float32')
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == parameters


def test_steps_of_imagenet_fall_each_thirty_epochs():
    for study in ('resnet', 'resnet_se', 'resnet_eca', 'resnet_cbam'):
        config = load(study, 'imagenet2012')
        epochs = [round(b * config.train.epochs) for b in config.schedule.boundaries]
        assert epochs == list(range(30, config.train.epochs, 30))


def test_cifar_is_akamasters():
    config = load('resnet', 'cifar10')
    assert [round(b * config.train.epochs) for b in config.schedule.boundaries] == [100, 150]
    assert (config.train.batch_size, config.model.name) == (128, 'cifar_resnet20')


def test_unknown_dataset():
    with pytest.raises(ValueError, match="'mars' is unknown: use one of digits, cifar10, imagenet"):
        load('resnet', 'mars')
