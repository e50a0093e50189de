"""The table of keys, and what a config may hold."""

import pytest

from attention_jax import config as configs


def test_every_key_tells_itself():
    for name, key in configs.KEYS.items():
        assert key.meaning.endswith('.'), name
        assert key.default is not None or key.value_type is not None, name
    config = configs.defaults()
    configs.check(config)
    assert set(configs.flatten(config)) == set(configs.KEYS)
    with pytest.raises(TypeError, match='num_classes'):
        config.model.num_classes = 'ten'


def test_defaults_are_made_anew():
    config = configs.defaults()
    config.model.arguments.width = 2
    config.train.epochs = 7
    assert configs.defaults().model.arguments.to_dict() == {}
    assert configs.defaults().train.epochs == 100


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('optimizer.name', 'lamb', "optimizer.name 'lamb' is unknown: use one of 'sgd', 'adamw'"),
        ('optimizer.decay_mask', 'all', "optimizer.decay_mask 'all' is unknown"),
        ('optimizer.learning_rate', -1.0, 'optimizer.learning_rate must be at least 0, got -1.0'),
        ('optimizer.learning_rate', float('nan'), 'must be at least 0, got nan'),
        ('optimizer.momentum', 1.0, 'optimizer.momentum must be in 0 to 1, 1 excluded, got 1.0'),
        ('optimizer.accumulate', 0, 'optimizer.accumulate must be at least 1, got 0'),
        ('schedule.name', 'poly', "schedule.name 'poly' is unknown"),
        ('schedule.boundaries', (0.5, 100.0), r'boundaries .0.5, 100.0. must be rising fractions'),
        ('schedule.boundaries', (0.5, 0.25), 'must be rising fractions'),
        ('detection.iou_threshold', 1.5, 'detection.iou_threshold must be in 0 to 1, got 1.5'),
        ('detection.class_weight', -1.0, 'detection.class_weight must be at least 0, got -1.0'),
        ('detection.max_detections', 0, 'detection.max_detections must be at least 1, got 0'),
        ('data.preprocessing', 'timm', "data.preprocessing 'timm' is unknown"),
        ('data.workers', -1, 'data.workers must be at least 0, got -1'),
        ('data.mosaic', 2.0, 'data.mosaic must be in 0 to 1, got 2.0'),
        ('data.mixup', -0.5, 'data.mixup must be in 0 to 1, got -0.5'),
        ('data.mosaic_epochs', -1.0, 'data.mosaic_epochs must be in 0 to 1, got -1.0'),
        ('detection.max_boxes', 0, 'detection.max_boxes must be at least 1, got 0'),
        ('data.scale', (2, 1), 'data.scale .2, 1. must be two numbers, 0 < smallest <= largest'),
        ('data.scale', (2,), 'data.scale .2,. must be two numbers'),
        ('train.batch_size', 0, 'train.batch_size must be at least 1, got 0'),
        ('train.seed', 2**32, 'train.seed must be in 0 to 4294967295, got 4294967296'),
        ('mesh.fsdp', 0, 'mesh.fsdp must be at least 1, got 0'),
    ],
)
def test_what_is_not_allowed_is_said(name, value, message):
    config = configs.defaults()
    group, _, key = name.partition('.')
    config[group][key] = value
    with pytest.raises(ValueError, match=message):
        configs.check(config)


def test_a_file_may_add_keys_of_its_own(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(
        'from configs import datasets\n\n\n'
        'def get_config(arg="digits"):\n'
        '    config = datasets.get_config(arg)\n'
        '    config.regression = {"target": "ink"}\n'
        '    return config\n'
    )
    config = configs.load_config(str(path))
    configs.check(config)
    assert configs.flatten(config)['regression.target'] == 'ink'


def test_a_file_without_a_config(tmp_path):
    path = tmp_path / 'empty.py'
    path.write_text('')
    with pytest.raises(ValueError, match=r'empty.py has no function get_config'):
        configs.load_config(str(path))
    with pytest.raises(ValueError, match=r'does not exist, did you mean .*empty.py'):
        configs.load_config(str(tmp_path / 'empti.py'))
