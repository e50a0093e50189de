import pytest

import attention_jax
from attention_jax.models import placement
from attention_jax.modules.registry import AttentionEntry

DEEP = (3, 4, 6, 3)
MOBILE = (1, 2, 3, 4, 3, 3, 1)


def blocks(text, depths=DEEP, backbone='ResNet'):
    parsed = placement.parse(text, depths, backbone)
    return parsed.where, [sorted(b) for b in parsed.blocks]


@pytest.mark.parametrize(
    ('text', 'where', 'expected'),
    [
        ('branch', 'branch', [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [0, 1, 2]]),
        ('branch@2+4', 'branch', [[], [0, 1, 2, 3], [], [0, 1, 2]]),
        ('after_block@2:1,3+3:1,3,5', 'after_block', [[], [1, 3], [1, 3, 5], []]),
        ('stage', 'stage', [[2], [3], [5], []]),
        ('stage@4', 'stage', [[], [], [], [2]]),
        ('last_block', 'branch', [[2], [3], [5], [2]]),
    ],
)
def test_text(text, where, expected):
    assert blocks(text) == (where, expected)


@pytest.mark.parametrize(
    ('text', 'where', 'expected'),
    [
        ('output', 'output', [1, 2, 3, 4, 3, 3, 1]),
        ('expanded', 'expanded', [0, 2, 3, 4, 3, 3, 1]),
        ('expanded@1+7', 'expanded', [1, 0, 0, 0, 0, 0, 1]),
        ('depthwise_pre_norm@4:1,3', 'depthwise_pre_norm', [0, 0, 0, 2, 0, 0, 0]),
        ('last_block', 'output', [1] * 7),
        ('stage', 'stage', [1] * 6 + [0]),
    ],
)
def test_text_of_mobilenet(text, where, expected):
    found, chosen = blocks(text, MOBILE, 'MobileNetV2')
    assert (found, [len(b) for b in chosen]) == (where, expected)


@pytest.mark.parametrize(
    ('kind', 'block', 'depths', 'expected'),
    [
        ('branch_but_first', 'bottleneck', DEEP, 'branch@2+3+4'),
        ('branch_but_first', 'basic', (3, 3, 3), 'branch@2+3'),
        ('inserted', 'bottleneck', DEEP, 'after_block@2:1,3+3:1,3,5'),
        ('inserted', 'bottleneck', (3, 4, 23, 3), 'after_block@2:1,3+3:6,13,20'),
        ('inserted', 'basic', (2, 2, 2, 2), 'after_block@3:1'),
        ('inserted', 'basic', (3, 3, 3), 'after_block@2:2'),
        ('inserted_before', 'bottleneck', DEEP, 'before_block@3:5'),
        ('inserted_before', 'basic', (3, 3, 3), 'after_block@2:2'),
        ('stage', 'basic', (3, 3, 3), 'stage'),
    ],
)
def test_defaults(kind, block, depths, expected):
    entry = AttentionEntry('x', None, 'paper', 2020, 'channel', placement=kind)
    assert placement.default(entry, depths, block) == expected


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('branch', 'output'),
        ('branch_but_first', 'output@2+3+4+5+6+7'),
        ('inserted', 'after_block@6:2'),
        ('inserted_before', 'after_block@6:2'),
        ('last_block', 'last_block'),
        ('stage', 'stage'),
        ('conv2_pre_norm', 'depthwise_pre_norm'),
    ],
)
def test_defaults_of_mobilenet(kind, expected):
    entry = AttentionEntry('x', None, 'paper', 2020, 'channel', placement=kind)
    assert placement.default(entry, MOBILE, 'inverted', 'MobileNetV2') == expected


def test_mobilenet_has_no_place_for_what_replaces_a_convolution():
    with pytest.raises(ValueError, match="'sk' has no place in MobileNetV2"):
        placement.resolve('sk', None, None, MOBILE, 'inverted', 'MobileNetV2')
    with pytest.raises(ValueError, match='belongs to ResNet, not to MobileNetV2: use one of exp'):
        placement.resolve('sk', 'conv2', None, MOBILE, 'inverted', 'MobileNetV2')
    with pytest.raises(ValueError, match='belongs to MobileNetV2, not to ResNet: use one of br'):
        placement.resolve('se', 'output', None, DEEP, 'bottleneck')


def test_sites():
    by_stage = tuple({'reduction': r} for r in (1, 2, 3, 4))
    assert placement.resolve('se', 'branch@2:0,3+4:1', by_stage, DEEP, 'bottleneck') == {
        'stage2_block0': {'branch': {'reduction': 2}},
        'stage2_block3': {'branch': {'reduction': 2}},
        'stage4_block1': {'branch': {'reduction': 4}},
    }
    before_all = placement.resolve('se', 'pre_conv@2', by_stage, DEEP, 'bottleneck')
    assert list(before_all) == ['stem', *(f'stage2_block{b}' for b in range(4))]
    assert before_all['stem'] == {'pre_conv': {'reduction': 1}}
    assert placement.resolve_neck('se', 'upsampled+feat1', by_stage[:2]) == {
        'neck': {'upsampled': {'reduction': 1}, 'feat1': {'reduction': 2}}
    }
    assert placement.resolve(None, None, None, DEEP, 'bottleneck') == {}


def test_a_head_has_no_place():
    entry = AttentionEntry('x', None, 'paper', 2020, 'channel', placement='none')
    with pytest.raises(ValueError, match='no place inside a backbone'):
        placement.default(entry, DEEP, 'bottleneck')


@pytest.mark.parametrize(
    'where', [w for w in placement.PLACES['ResNet'] if w not in ('conv1', 'conv2')]
)
def test_every_place_takes_a_gate(where):
    import jax
    import jax.numpy as jnp

    model = attention_jax.create_model(
        'resnet26', attention='se', placement=where, attention_args={'reduction': 1}
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    names = ['/'.join(p.key for p in path) for path, _ in jax.tree.leaves_with_path(variables)]
    assert any('attention' in name for name in names)
