"""ResNet with global context blocks (GCNet, arXiv 1904.11492).

    python train.py --config configs/resnet_gc.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNet-50 with the block (reduction 16) in every stage but the first. The paper
trains in two phases: 120 epochs of plain ResNet-50 (batch 256, rate 0.1, cosine, 5 epochs of
warm-up), then 40 with the blocks at rate 0.02. What stands in: the first phase's recipe, with the
blocks in place from the start.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'gc_resnet50_r16'
        config.schedule.name = 'cosine'
        config.schedule.warmup_epochs = 5.0
        config.train.epochs = 120
    else:
        config.model.attention = 'gc'
    return config
