"""ResNet with split attention in the place of its 3x3 convolutions (ResNeSt, arXiv 2004.08955).

    python train.py --config configs/resnest.py  # also :cifar10, :imagenet2012

`imagenet2012`: ResNeSt-50 by the paper's recipe: 270 epochs, cosine with 5 of warm-up, labels
smoothed by 0.1, dropout 0.2, the last norm of each branch starting at 0, no decay of norms and
biases, batch 8192 at rate 3.2, which is linear in the batch: on a machine for 256 images add

    --config.train.batch_size=256 --config.optimizer.learning_rate=0.1

The deeper networks take larger images, e.g. `--config.model.name=resnest101
--config.data.image_size=256`. Left out: AutoAugment, mixup (0.2), and DropBlock beyond 50 layers.
"""

from ml_collections import ConfigDict

from configs import datasets


def get_config(arg: str = 'digits') -> ConfigDict:
    config = datasets.get_config(arg)
    if arg == 'imagenet2012':
        config.model.name = 'resnest50'
        config.model.arguments = {'dropout_rate': 0.2, 'zero_init_last': True}
        config.optimizer.learning_rate = 3.2
        config.optimizer.decay_mask = 'norms_and_biases'
        config.schedule.name = 'cosine'
        config.schedule.warmup_epochs = 5.0
        config.train.epochs = 270
        config.train.batch_size = 8192
        config.train.label_smoothing = 0.1
    else:
        config.model.attention = 'split_attention'
    return config
