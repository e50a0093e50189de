"""ResNet with the convolutional block attention module (CBAM, arXiv 1807.06521).

    python train.py --config configs/resnet_cbam.py  # also :cifar10, :imagenet2012

`imagenet2012`: the paper's 100 epochs (the authors' script stops at 90 unless told otherwise),
batch 256, rate 0.1 times 0.1 after each 30 epochs.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'cbam_resnet50'
    else:
        config.model.attention = 'cbam'
    return config
