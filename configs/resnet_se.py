"""ResNet with squeeze-and-excitation (arXiv 1709.01507).

    python train.py --config configs/resnet_se.py  # also :cifar10, :imagenet2012

`imagenet2012`: the paper's 100 epochs, batch 1024, rate 0.6 times 0.1 after each 30 epochs. Its
augmentation by rotation and pixel jitter is left out.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'se_resnet50'
        config.optimizer.learning_rate = 0.6
        config.train.batch_size = 1024
    else:
        config.model.attention = 'se'
    return config
