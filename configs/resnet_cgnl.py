"""ResNet with a compact generalized non-local block (CGNL, arXiv 1810.13125).

    python train.py --config configs/resnet_cgnl.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNet-50 with one block, from torchvision's weights of `resnet50`, which the rate
of 0.01 is meant for (`--config.model.pretrained=FILE`, or a hub id); the authors' 100 epochs behind
10 of warm-up, batch 256, the rate times 0.1 after the 31st, 61st and 81st of the 100. Their crops
are of 0.08 to 1.25 times the image's area, here of 0.08 to 1.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'cgnl_resnet50_1'
        config.optimizer.learning_rate = 0.01
        config.schedule.warmup_epochs = 10.0
        config.schedule.boundaries = (41 / 110, 71 / 110, 91 / 110)
        config.train.epochs = 110
    else:
        config.model.attention = 'cgnl'
    return config
