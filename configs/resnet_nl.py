"""ResNet with non-local blocks (arXiv 1711.07971).

    python train.py --config configs/resnet_nl.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNet-50 with five blocks. The paper trains on videos (Kinetics) and has no
ImageNet recipe; what stands in is CBAM's: 100 epochs, batch 256, rate 0.1 times 0.1 after each 30
epochs.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'nl_resnet50_5'
    else:
        config.model.attention = 'non_local'
    return config
