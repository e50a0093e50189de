"""Networks; importing this package registers them all."""

from attention_jax.models import resnets  # noqa: F401
from attention_jax.models.mobilenet import MobileNetV2
from attention_jax.models.resnet import ResNet

__all__ = ['MobileNetV2', 'ResNet']
