"""ResNet with bottleneck attention modules (BAM, arXiv 1807.06514).

    python train.py --config configs/resnet_bam.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNet-50 with a module after each stage but the last; 100 epochs (the authors'
script, which is CBAM's too, stops at 90 unless told otherwise), batch 256, rate 0.1 times 0.1 after
each 30 epochs.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'bam_resnet50'
    else:
        config.model.attention = 'bam'
    return config
