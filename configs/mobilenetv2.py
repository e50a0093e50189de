"""MobileNetV2 (arXiv 1801.04381), plain or with any mechanism in its inverted residuals.

    python train.py --config configs/mobilenetv2.py  # also :cifar10, :imagenet2012

`--config.model.attention=NAME` adds a mechanism, `--config.model.placement=expanded` puts it on the
expanded channels; released networks have names, e.g. `--config.model.name=eca_mobilenetv2`.

`imagenet2012`: ECA's recipe, which is Triplet's too: 400 epochs, batch 96, rate 0.045 times 0.98
after each epoch, decay 4e-5. Coordinate attention and its baselines `se_mobilenetv2_r24` and
`cbam_mobilenetv2_r24` took 200 epochs, batch 256, rate 0.05 and a cosine. Digits and CIFAR-10 are
small: fewer strides, and for digits fewer rows of the network's table.
"""

from ml_collections import ConfigDict

from configs import datasets

# Expansion, channels, blocks and stride of each stage.
_DIGITS = ((1, 16, 1, 1), (6, 24, 1, 2), (6, 32, 2, 2))
_CIFAR10 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    config.model.name = 'mobilenetv2'
    if arg == 'imagenet2012':
        config.optimizer.learning_rate = 0.045
        config.optimizer.weight_decay = 4e-5
        config.schedule.name = 'exponential'
        config.schedule.factor = 0.98
        config.train.epochs = 400
        config.train.batch_size = 96
    elif arg == 'cifar10':
        config.model.arguments = {'stem_strides': 1, 'rows': _CIFAR10}
    else:
        config.model.arguments = {'stem_strides': 1, 'rows': _DIGITS, 'features': 256}
    return config
