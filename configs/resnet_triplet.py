"""ResNet with triplet attention (arXiv 2010.03045).

    python train.py --config configs/resnet_triplet.py  # also :cifar10, :imagenet2012

`imagenet2012`: the paper's 100 epochs, batch 256, rate 0.1 times 0.1 after each 30 epochs.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'triplet_resnet50'
    else:
        config.model.attention = 'triplet'
    return config
