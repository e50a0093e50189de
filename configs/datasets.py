"""What a data set changes in the defaults, which are of a plain ResNet; a study changes the rest.

CIFAR-10 and ImageNet are TFDS's: `--config.data.data_dir=DIR` says where they were prepared.
"""

from ml_collections import ConfigDict

from attention_jax.config import defaults


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
