"""ResNet with efficient channel attention (ECA-Net, arXiv 1910.03151).

    python train.py --config configs/resnet_eca.py  # also :cifar10, :imagenet2012

`imagenet2012`: the authors' network (kernel sizes 3, 5, 5, 7 over the stages) and recipe: 100
epochs, batch 256, rate 0.1 times 0.1 after each 30 epochs.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'eca_resnet50'
    else:
        config.model.attention = 'eca'
    return config
