"""Networks; importing this package registers them all."""

from attention_jax.models import mobilenet_variants, resnet_variants  # noqa: F401
from attention_jax.models.darknet import CSPDarknet
from attention_jax.models.mobilenet import MobileNetV2
from attention_jax.models.resnet import ResNet
from attention_jax.models.yolo import YOLOv4Tiny

__all__ = ['CSPDarknet', 'MobileNetV2', 'ResNet', 'YOLOv4Tiny']
