"""ResNet with global second-order pooling (GSoP-Net1, arXiv 1811.12006).

    python train.py --config configs/resnet_gsop.py  # also :cifar10, :imagenet2012

`imagenet2012`: GSoP-Net1 on ResNet-50 by the authors' script: 95 epochs, batch 384, rate 0.1 times
0.1 after the 30th, 60th and 90th. GSoP-Net2 takes 65 epochs, with steps after the 30th, 45th and
60th:

    --config.model.name=gsop_net2_resnet50 --config.train.epochs=65 \
        --config.schedule.boundaries='(0.4615, 0.6923, 0.9231)'
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'gsop_net1_resnet50'
        config.schedule.boundaries = (30 / 95, 60 / 95, 90 / 95)
        config.train.epochs = 95
        config.train.batch_size = 384
    else:
        config.model.attention = 'gsop'
        config.model.attention_args = {'hidden': 32}  # the networks are narrow
    return config
