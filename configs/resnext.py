"""ResNeXt: grouped 3x3 convolutions in the bottlenecks (arXiv 1611.05431).

    python train.py --config configs/resnext.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNeXt-50 (32 groups of 4) by the recipe of the plain ResNet: 90 epochs, batch 256,
rate 0.1 times 0.1 after each 30 epochs. Else the ResNet of the dataset with bottlenecks of 4
groups; `--config.model.attention=NAME` puts a mechanism into any of them.
"""

from ml_collections import ConfigDict

from configs import resnet


def get_config(arg: str = 'digits') -> ConfigDict:
    config = resnet.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'resnext50_32x4d'
    else:
        config.model.arguments = {'block': 'bottleneck', 'cardinality': 4, 'base_width': 16}
    return config
