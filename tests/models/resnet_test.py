"""The ResNets beyond what every network shows: arguments, stages, forms that are equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attention_jax
from attention_jax.modules.layers import StochasticDepth
from tests import helpers


def counted(name, **arguments):
    return helpers.counted(attention_jax.create_model(name, **arguments), (1, 224, 224, 3))


def test_a_mechanism_at_its_authors_place_is_the_named_network():
    assert counted('resnet50', attention='gc')[0] == 28_078_773
    kernels = tuple({'kernel_size': k} for k in (3, 5, 5, 7))
    by_hand = counted('resnet50', attention='eca', placement='branch', attention_args=kernels)
    assert by_hand == counted('eca_resnet50')
    assert counted('eca_resnet50', kernel_size='adaptive')[0] == 25_557_032 + 86
    assert counted('eca_resnet50', attention='se') == counted('resnet50', attention='se')


def test_stages_and_head():
    model = attention_jax.create_model('tiny_resnet', num_classes=0, attention='se')
    x = jnp.asarray(helpers.array((2, 16, 24, 1), dtype=np.float32))
    variables = model.init(jax.random.key(0), x)
    features, stages = model.apply(variables, x, return_stages=True)
    shapes = {name: stage.shape for name, stage in stages.items()}
    assert shapes == {
        'stem': (2, 16, 24, 16),
        'stage1': (2, 16, 24, 16),
        'stage2': (2, 8, 12, 32),
        'stage3': (2, 4, 6, 64),
        'pre_logits': (2, 64),
    }
    np.testing.assert_array_equal(features, stages['pre_logits'])


def test_zero_initialised_last_scale_starts_every_block_as_its_shortcut():
    model = attention_jax.create_model('tiny_resnet', zero_init_last=True)
    x = jnp.asarray(helpers.array((1, 8, 8, 3), dtype=np.float32))
    variables = model.init(jax.random.key(0), x)
    _, stages = model.apply(variables, x, return_stages=True)
    np.testing.assert_array_equal(stages['stem'], stages['stage1'])


def test_stochastic_depth_drops_whole_examples_and_nothing_in_evaluation():
    model = attention_jax.create_model('tiny_resnet', drop_path_rate=0.9)
    plain = attention_jax.create_model('tiny_resnet')
    x = jnp.asarray(helpers.array((16, 8, 8, 3), dtype=np.float32))
    variables = helpers.random_variables(plain, x, dtype=np.float32)
    np.testing.assert_array_equal(model.apply(variables, x), plain.apply(variables, x))

    layer = StochasticDepth(0.25)
    ones = jnp.ones((4000, 2, 2, 1))
    kept = layer.apply({}, ones, train=True, rngs={'dropout': jax.random.key(1)})
    by_example = np.asarray(kept).reshape(4000, -1)
    assert (by_example == by_example[:, :1]).all()
    assert set(np.unique(by_example)) == {0, np.float32(1 / 0.75)}
    assert abs((by_example[:, 0] == 0).mean() - 0.25) < 0.03
    # The rate rises over the blocks from 0: the first block never drops, the last one does.
    _, stages = model.apply(
        variables,
        x,
        train=True,
        return_stages=True,
        mutable=['batch_stats'],
        rngs={'dropout': jax.random.key(0)},
    )[0]
    _, full = plain.apply(variables, x, train=True, return_stages=True, mutable=['batch_stats'])[0]
    np.testing.assert_allclose(stages['stage1'], full['stage1'], rtol=1e-5, atol=1e-5)
    assert np.abs(stages['stage3'] - full['stage3']).max() > 0.1


@pytest.mark.parametrize('name', ['nl_resnet50_5_video', 'a2_resnet50_5_video'])
def test_video_networks(name):
    x = jax.ShapeDtypeStruct((2, 8, 64, 64, 3), jnp.float32)
    model = attention_jax.create_model(name, num_classes=10)
    shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], x)
    assert shapes.shape == (2, 10)
    _, stages = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, return_stages=True)[0], x
    )
    assert stages['stage1'].shape == (2, 4, 16, 16, 256)
    assert stages['stage4'].shape == (2, 4, 2, 2, 2048)
    with pytest.raises(ValueError, match=r'\[b, t, h, w, c\]'):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def test_a_video_of_equal_frames_is_its_image():
    """Frames alike: every mean over time, and every softmax over space and time, is the image's."""
    arguments = {'attention': 'non_local', 'attention_args': {'pool_size': 1}}
    image = attention_jax.create_model('tiny_resnet', **arguments)
    video = attention_jax.create_model('tiny_resnet', spatial_dims=3, **arguments)
    x = jnp.asarray(helpers.array((2, 8, 8, 3), dtype=np.float32))
    variables = helpers.random_variables(image, x, dtype=np.float32)
    frames = jnp.repeat(x[:, None], 4, axis=1)
    helpers.assert_close(video.apply(variables, frames), image.apply(variables, x), 1e-5)


@pytest.mark.parametrize(
    ('name', 'arguments', 'word'),
    [
        ('resnet51', {}, 'resnet50'),
        ('resnet50', {'attention': 'see'}, 'did you mean'),
        ('resnet50', {'attentoin': 'se'}, 'attention'),
        ('resnet50', {'attention': 'se', 'placement': 'here'}, 'placement'),
        ('resnet50', {'attention': 'se', 'placement': 'branch@5'}, 'stage 5'),
        ('resnet50', {'attention': 'se', 'placement': 'branch@1:3'}, 'block 3'),
        ('resnet50', {'attention': 'se', 'placement': 'branch@'}, 'cannot be read'),
        ('resnet50', {'attention': 'se', 'placement': 'expanded'}, 'MobileNetV2'),
        ('resnet50', {'attention': 'se', 'placement': 'conv2'}, 'convolution'),
        ('resnet18', {'attention': 'se', 'placement': 'mid'}, 'bottleneck'),
        ('resnet50', {'placement': 'branch'}, 'attention'),
        ('resnet50', {'attention': 'se', 'attention_args': ({},) * 3}, 'attention_args'),
        ('eca_resnet50', {'kernel_size': (3, 5)}, 'kernel_size'),
        ('resnet50', {'num_classes': -1}, 'num_classes'),
        ('resnet50', {'block': 'wide'}, 'block'),
        ('resnet50', {'stem': 'cnn'}, 'stem'),
        ('resnet50', {'stride_in': 'conv3'}, 'stride_in'),
        ('resnet50', {'shortcut': 'none'}, 'shortcut'),
        ('resnet50', {'stem_pool': 'mean'}, 'stem_pool'),
        ('resnet50', {'strides': (1, 2)}, 'strides'),
        ('resnet50', {'widths': (64,)}, 'widths'),
        ('resnet50', {'conv2_pool': 'first'}, 'conv2_pool'),
        ('resnet50', {'activation': 'tanh'}, 'activation'),
        ('resnet50', {'pool': 'max'}, 'pool'),
        ('resnet50', {'pool_args': {'iterations': 1}}, 'pool_args'),
        ('resnet50', {'spatial_dims': 1}, 'spatial_dims'),
        ('resnet50', {'drop_path_rate': 1.0}, 'drop_path_rate'),
        ('resnet50', {'dropout_rate': -0.1}, 'dropout_rate'),
    ],
)
def test_bad_arguments_are_named(name, arguments, word):
    with pytest.raises(ValueError, match=word):
        attention_jax.create_model(name, **arguments)


def test_images_smaller_than_the_stride_are_refused():
    model = attention_jax.create_model('resnet18')
    with pytest.raises(ValueError, match='32 x 32'):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 64, 3)))


def test_gradient_of_a_maximum_inside_a_network(x64):
    """XLA computes what a maximum is taken of more than once, and rounds it differently."""
    model = attention_jax.create_model('tiny_resnet', attention='cbam')
    x = helpers.array((4, 16, 16, 3))
    variables = helpers.random_variables(model, x)
    _, _, _, (by_x,) = helpers.value_and_gradients(model, variables, (x,), 1.0, False)
    assert np.isfinite(by_x).all()
