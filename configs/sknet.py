"""ResNet with selective kernels in the place of its 3x3 convolutions (SKNet, arXiv 1903.06586).

    python train.py --config configs/sknet.py  # also :cifar10, :imagenet2012

`imagenet2012`: SKNet-50 by the paper's recipe: 100 epochs, batch 256, rate 0.1 times 0.1 after each
30 epochs, labels smoothed by 0.1, no decay of norms (nor of the head's bias). SENet's augmentation
by rotation and pixel jitter is left out.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'sknet50'
        config.optimizer.decay_mask = 'norms_and_biases'
        config.train.label_smoothing = 0.1
    else:
        config.model.attention = 'sk'
        config.model.attention_args = {'groups': 4, 'min_hidden': 16}  # the networks are narrow
    return config
