"""Plain ResNet, the baseline of every study.

    python train.py --config configs/resnet.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNet-50 by torchvision's first recipe: 90 epochs, batch 256, rate 0.1 times 0.1
after each 30 epochs.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.schedule.boundaries = (1 / 3, 2 / 3)
        config.train.epochs = 90
    return config
