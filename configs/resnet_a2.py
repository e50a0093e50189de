"""ResNet with double attention blocks (A2-Nets, arXiv 1810.11579).

    python train.py --config configs/resnet_a2.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNet-50 with five blocks of half the width, whose size is the paper's. The authors
published neither code nor schedule; what stands in is CBAM's: 100 epochs, batch 256, rate 0.1 times
0.1 after each 30 epochs.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'a2_resnet50_5_d2'
    else:
        config.model.attention = 'double_attention'
    return config
