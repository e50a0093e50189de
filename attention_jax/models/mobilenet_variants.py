"""The named MobileNetV2s: each a line with its paper and the fields of `MobileNetV2` it has."""

from collections.abc import Sequence
from typing import Any

from attention_jax.models.mobilenet import ROWS, MobileNetV2
from attention_jax.models.mobilenet_torch_names import torch_names
from attention_jax.models.registry import register_described


def _network(
    name: str,
    paper: str,
    published: Sequence[tuple[float, str]] = (),
    preprocessing: str = 'torchvision',
    **description: Any,
) -> None:
    facts = {'paper': paper, 'published': published, 'preprocessing': preprocessing}
    facts |= {'family': 'mobilenet', 'torch_names': torch_names}
    register_described(MobileNetV2, name, description, **facts)


_V1_V2 = (71.88, 'torchvision V1'), (72.15, 'torchvision V2')
_network('mobilenetv2', 'arXiv 1801.04381', _V1_V2, dropout_rate=0.2)
_TIMM = {'paper': 'arXiv 1801.04381, as timm has it', 'preprocessing': 'timm'}
_network('mobilenetv2_100', initialization='timm', **_TIMM)
_network('mobilenetv2_140', initialization='timm', width=1.4, **_TIMM)

_AUTHORS = {'placement': 'output', 'width_divisor': None, 'dropout_rate': 0.25}
_KERNELS = tuple({'kernel_size': 3 if c >= 96 else 1} for _, c, _, _ in ROWS)
_ECA = {'attention': 'eca', 'attention_args': _KERNELS, **_AUTHORS}
_TRIPLET = {'attention': 'triplet', 'attention_args': {'norm_scale_init': 1.0}, **_AUTHORS}
_network('eca_mobilenetv2', 'arXiv 1910.03151', [(72.56, 'authors')], **_ECA)
_network('triplet_mobilenetv2', 'arXiv 2010.03045', [(71.99, 'authors')], **_TRIPLET)

_EXPANDED = {'placement': 'expanded', 'dropout_rate': 0.1}
_COORDINATE = {'attention': 'coordinate', **_EXPANDED}
_R16, _R24, _R32 = ({'attention_args': {'reduction': r}, **_EXPANDED} for r in (16, 24, 32))
_AT_CA = 'at the place of coordinate attention (arXiv 2103.02907)'
_SE, _CBAM = f'arXiv 1709.01507, {_AT_CA}', f'arXiv 1807.06521, {_AT_CA}'
_CA_PAPER = 'coordinate attention paper'
_network('ca_mobilenetv2', 'arXiv 2103.02907', [(74.3, 'authors')], **_COORDINATE)
_network('se_mobilenetv2_r16', _SE, attention='se', **_R16)
_network('se_mobilenetv2_r24', _SE, [(73.5, _CA_PAPER)], attention='se', **_R24)
_network('se_mobilenetv2_r32', _SE, attention='se', **_R32)
_network('cbam_mobilenetv2_r16', _CBAM, attention='cbam', **_R16)
_network('cbam_mobilenetv2_r24', _CBAM, [(73.6, _CA_PAPER)], attention='cbam', **_R24)

_SIMAM = 'as ZjjConan/SimAM has it'
_SE_OUT = {'placement': 'output', 'attention_args': {'reduction': 4, 'use_bias': False}}
_CBAM_OUT = {'placement': 'output', 'attention_args': {'reduction': 4}}
_network('se_mobilenetv2_out', f'arXiv 1709.01507, {_SIMAM}', attention='se', **_SE_OUT)
_network('cbam_mobilenetv2_out', f'arXiv 1807.06521, {_SIMAM}', attention='cbam', **_CBAM_OUT)
