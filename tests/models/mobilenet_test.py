"""MobileNetV2: what is particular to it. Counts and stored values are in networks_test.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax.interop import torch
from attention_jax.models import mobilenet
from tests import helpers

TINY = {
    'rows': ((1, 8, 1, 1), (2, 8, 1, 1), (2, 16, 1, 2)),
    'stem_width': 8,
    'features': 24,
    'num_classes': 5,
    'dropout_rate': 0.0,
}
X = helpers.array((2, 9, 12, 3))


def tiny(**arguments):
    return attention_jax.create_model('mobilenetv2', **{**TINY, **arguments})


def reading(xp, variables, x, where, train):
    """The tiny network with SE at `where`, layer by layer."""

    def relu6(y):
        return xp.minimum(xp.maximum(y, 0), 6)

    def conv(y, path, **options):
        params = variables['params']
        for key in path:
            params = params[key]
        return helpers.convolve(xp, y, params['kernel'], **options)

    def norm(y, path):
        return helpers.normalize(xp, variables, path, y, train)

    def gate(y, params):
        z = y.mean((1, 2)) @ params['fc1']['kernel'] + params['fc1']['bias'][None]
        z = xp.maximum(z, 0) @ params['fc2']['kernel'] + params['fc2']['bias'][None]
        return y * helpers.sigmoid(xp, z)[:, None, None]

    x = relu6(norm(conv(x, ('stem_conv',), strides=2), ('stem_norm',)))
    for stage, (expansion, channels, depth, stride) in enumerate(TINY['rows'], 1):
        for b in range(depth):
            name = f'stage{stage}_block{b}'
            se = variables['params'][name].get('attention')
            strides = stride if b == 0 else 1
            y = x
            if expansion > 1:
                y = relu6(norm(conv(y, (name, 'expand_conv')), (name, 'expand_norm')))
            groups = y.shape[-1]
            y = conv(y, (name, 'depthwise_conv'), strides=strides, groups=groups)
            if where == 'depthwise_pre_norm':
                y = gate(y, se)
            y = relu6(norm(y, (name, 'depthwise_norm')))
            if where == 'expanded' and stage > 1:
                y = gate(y, se)
            y = norm(conv(y, (name, 'project_conv')), (name, 'project_norm'))
            if where == 'output':
                y = gate(y, se)
            x = x + y if strides == 1 and x.shape[-1] == channels else y
    x = relu6(norm(conv(x, ('features_conv',)), ('features_norm',))).mean((1, 2))
    head = variables['params']['head']
    return x @ head['kernel'] + head['bias'][None]


def test_values(x64):
    model = tiny(attention='se', placement='output', attention_args={'reduction': 4})
    variables = helpers.random_variables(model, X)
    got, _ = jax.jit(lambda v: model.apply(v, X, train=True, mutable=['batch_stats']))(variables)
    helpers.assert_close(got, reading(np, variables, X, 'output', train=True))


@pytest.mark.slow
@pytest.mark.parametrize('where', ['output', 'expanded', 'depthwise_pre_norm'])
@pytest.mark.parametrize('train', [False, True])
def test_gradients(x64, where, train):
    model = tiny(attention='se', placement=where, attention_args={'reduction': 4})

    def read(xp, variables, x):
        return reading(xp, variables, x, where, train)

    helpers.check(model, read, X, train=train)


def test_stages_without_a_head():
    model = tiny(num_classes=0, width=1.5)
    run = lambda x: model.init_with_output(jax.random.key(0), x, return_stages=True)[0]  # noqa: E731
    features, stages = jax.eval_shape(run, jnp.zeros((2, 17, 32, 1)))
    assert {name: stage.shape for name, stage in stages.items()} == {
        'stem': (2, 9, 16, 16),  # 8 * 1.5 = 12, to a multiple of 8
        'stage1': (2, 9, 16, 16),
        'stage2': (2, 9, 16, 16),
        'stage3': (2, 5, 8, 24),
        'pre_logits': (2, 40),
    }
    assert features.shape == (2, 40)


def test_whole_branches_are_dropped_where_there_is_a_sum():
    x = jnp.asarray(helpers.array((12, 4, 4, 3), dtype=np.float32))
    variables = helpers.random_variables(tiny(), x, dtype=np.float32)

    def stages(rate):
        run = functools.partial(
            tiny(drop_path_rate=rate).apply,
            train=True,
            return_stages=True,
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(1)},
        )
        return jax.jit(run)(variables, x)[0][1]

    # The rates of the three blocks are 0, half and whole; the third has no sum.
    whole, dropped = stages(0.0), stages(0.9)
    np.testing.assert_array_equal(dropped['stage1'], whole['stage1'])
    branch = (whole['stage2'] - whole['stage1']) / 0.55
    kept = np.abs(dropped['stage2'] - dropped['stage1']).max((1, 2, 3)) > 0
    assert 0 < kept.sum() < 12
    np.testing.assert_allclose(
        dropped['stage2'], whole['stage1'] + branch * kept[:, None, None, None], atol=1e-4
    )
    assert (np.abs(dropped['stage3']).max((1, 2, 3)) > 0).all()


def test_identity_init_leaves_the_plain_network():
    x = jnp.asarray(X, jnp.float32)
    plain = tiny()
    gated = tiny(attention='se', attention_args={'reduction': 4}, identity_init=True)
    variables = helpers.random_variables(gated, x, dtype=np.float32)
    for block in ('stage1_block0', 'stage2_block0', 'stage3_block0'):
        assert variables['params'][block].pop('attention_alpha').shape == (1,)
        variables['params'][block]['attention_alpha'] = np.zeros(1, np.float32)
    got = jax.jit(gated.apply)(variables, x)
    np.testing.assert_allclose(got, jax.jit(plain.apply)(variables, x), rtol=1e-5, atol=1e-5)


def test_every_mechanism_has_a_place_or_the_reason_why_not():
    refused = {}
    for name in attention_jax.list_attention():
        try:
            model = tiny(attention=name, rows=((1, 32, 1, 1), (2, 32, 2, 2)))
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert any('attention' in path for path in helpers.called(model, (2, 128, 128, 3))), name
    assert set(refused) == {
        'cross_layer_non_local',
        'danet_head',
        'isqrt_cov',
        'sk',
        'split_attention',
    }
    for name in ('sk', 'split_attention'):
        assert "no place in MobileNetV2, whose blocks lack 'conv2'" in refused.pop(name)
    for name, reason in refused.items():
        assert f'attention {name!r} has no place inside a backbone' in reason


def test_initialisations():
    for name, deviation in (('torchvision', (2 / (9 * 512)) ** 0.5), ('timm', (2 / 9) ** 0.5)):
        model = tiny(rows=((4, 128, 2, 1),), initialization=name, num_classes=100)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))['params']
        kernel = params['stage1_block1']['depthwise_conv']['kernel']
        assert float(kernel.std()) == pytest.approx(deviation, rel=0.1)
        head = np.asarray(params['head']['kernel'])
        expected = 0.01 if name == 'torchvision' else 0.1 / 3**0.5  # uniform, +-1/sqrt(classes)
        assert head.std() == pytest.approx(expected, rel=0.1)
        assert not np.asarray(params['head']['bias']).any()
    assert np.abs(head).max() <= 0.1


def names(source, **arguments):
    model = tiny(**arguments)
    variables = helpers.random_variables(model, X, dtype=np.float32)
    state = torch.to_state_dict('mobilenetv2', variables, source=source, **TINY | arguments)
    _, back, report = torch.from_state_dict('mobilenetv2', state, **TINY | arguments)
    assert report.source == source
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    return {name.removesuffix('.weight') for name in state if name.endswith('.weight')}


@pytest.mark.parametrize(
    ('source', 'arguments', 'there'),
    [
        (
            'torchvision.authors',
            {'attention': 'eca'},
            'features.1.conv.0.0 features.1.conv.1 features.1.conv.3.conv features.2.conv.0.0 '
            'features.2.conv.1.1 features.2.conv.2 features.2.conv.3 features.2.conv.4.conv '
            'features.4.0 features.4.1 classifier.1',
        ),
        ('simam', {}, 'features.0.0 features.2.conv.3 features.4.1 classifier.0'),
        (
            'flat.torchvision',
            {'attention': 'se', 'placement': 'expanded', 'attention_args': {'reduction': 8}},
            'features.0.1 features.1.conv.0 features.1.conv.3 features.1.conv.4 features.2.conv.3 '
            'features.2.conv.6.fc1 features.2.conv.7 features.2.conv.8 conv.0 conv.1 classifier.1',
        ),
        (
            'timm.efficientnet',
            {'attention': 'se', 'placement': 'expanded', 'attention_args': {'reduction': 8}},
            'conv_stem bn1 blocks.0.0.conv_dw blocks.0.0.conv_pw blocks.0.0.bn2 blocks.1.0.conv_pw '
            'blocks.1.0.conv_dw blocks.1.0.se.conv_reduce blocks.1.0.conv_pwl blocks.1.0.bn3 '
            'conv_head bn2 classifier',
        ),
        (
            'flat.torchvision',
            {'attention': 'se', 'placement': 'after_block@2:0', 'attention_args': {'reduction': 4}},
            'features.2.conv.6 features.3.fc1 features.4.conv.6',
        ),
    ],
)
def test_names_and_back(source, arguments, there):
    assert set(there.split()) <= names(source, **arguments)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'wdth': 1.0}, 'did you mean width'),
        ({'width': 0.0}, 'width must be positive'),
        ({'width_divisor': 0}, 'width_divisor'),
        ({'rows': ((1, 8, 1),)}, 'rows'),
        ({'rows': ((1, 8, 0, 1),)}, 'rows'),
        ({'num_classes': -1}, 'num_classes'),
        ({'initialization': 'caffe'}, 'initialization'),
        ({'drop_path_rate': 1.0}, 'drop_path_rate'),
        ({'attention_args': {'reduction': 4}}, 'attention_args need attention'),
        ({'placement': 'output'}, 'placement needs attention'),
        ({'attention': 'se', 'placement': 'branch'}, 'belongs to ResNet, not to MobileNetV2'),
        ({'attention': 'se', 'placement': 'output@8'}, 'stage 8'),
        ({'attention': 'se', 'placement': 'output@2:2'}, 'block 2'),
        ({'attention': 'se', 'attention_args': ({},) * 3}, '7 stages, got 3'),
        ({'attention': 'sk', 'placement': 'output'}, 'keeps its input'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        attention_jax.create_model('mobilenetv2', **arguments)


def test_images_smaller_than_the_stride_are_refused():
    model = attention_jax.create_model('mobilenetv2')
    with pytest.raises(ValueError, match='16 x 64 pixels, the network needs at least 32 x 32'):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 64, 3)))


def test_another_mechanism_has_its_own_place_and_arguments():
    model = attention_jax.create_model('cbam_mobilenetv2_r24', attention='gc')
    assert (model.placement, model.attention_args) == (None, None)
    assert {place for places in model.sites().values() for place in places} == {'output'}
    assert model.rows == mobilenet.ROWS
