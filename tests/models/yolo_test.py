"""YOLOv4-tiny: what is particular to it. Counts and stored values are in networks_test.py."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import attention_jax
from attention_jax.interop import matching, torch
from attention_jax.interop import nnx as bridge
from attention_jax.models import placement
from attention_jax.models.registry import model_entry
from tests import helpers

TINY = {'width': 0.125, 'num_classes': 2}
SE = {'attention': 'se', 'attention_args': {'reduction': 4}}
X = helpers.array((2, 64, 96, 3))


def tiny(**arguments):
    return attention_jax.create_model('yolov4_tiny', **{**TINY, **arguments})


def shapes(model, shape, **options):
    """Shapes of the outputs for images of this shape."""
    run = functools.partial(model.init_with_output, jax.random.key(0), **options)
    out, _ = jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree.map(lambda leaf: leaf.shape, out)


def reading(xp, variables, x, places, train):
    """The tiny network with SE at `places`, layer by layer."""

    def layer(y, *path, strides=1):
        params = variables['params']
        for key in path:
            params = params[key]
        y = helpers.convolve(xp, y, params['conv']['kernel'], strides=strides)
        y = helpers.normalize(xp, variables, (*path, 'norm'), y, train)
        return xp.where(y > 0, y, y / 10)

    def gate(y, place):
        if place not in places:
            return y
        params = variables['params'][f'{place}_attention']
        z = y.mean((1, 2)) @ params['fc1']['kernel'] + params['fc1']['bias'][None]
        z = xp.maximum(z, 0) @ params['fc2']['kernel'] + params['fc2']['bias'][None]
        return y * helpers.sigmoid(xp, z)[:, None, None]

    def head(y, stride):
        y = layer(y, f'head{stride}_conv')
        params = variables['params'][f'head{stride}']
        return (
            xp.einsum('bhwc,co->bhwo', y, params['kernel'][0, 0]) + params['bias'][None, None, None]
        )

    x = layer(layer(x, 'backbone', 'conv1', strides=2), 'backbone', 'conv2', strides=2)
    for block in ('block1', 'block2', 'block3'):
        route = layer(x, 'backbone', block, 'conv1')
        inner = layer(route[..., route.shape[-1] // 2 :], 'backbone', block, 'conv2')
        both = xp.concatenate([layer(inner, 'backbone', block, 'conv3'), inner], -1)
        feat1 = layer(both, 'backbone', block, 'conv4')
        x = xp.concatenate([route, feat1], -1)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    neck = layer(gate(layer(x, 'backbone', 'conv3'), 'feat2'), 'neck')
    up = layer(neck, 'upsample')[:, np.arange(2 * neck.shape[1]) // 2]
    up = gate(up[:, :, np.arange(2 * neck.shape[2]) // 2], 'upsampled')
    return [head(neck, 32), head(xp.concatenate([up, gate(feat1, 'feat1')], -1), 16)]


def test_values(x64):
    model = tiny(**SE)
    variables = helpers.random_variables(model, X)
    got, _ = jax.jit(lambda v: model.apply(v, X, train=True, mutable=['batch_stats']))(variables)
    want = reading(np, variables, X, placement.NECK, train=True)
    for output, expected in zip(got, want, strict=True):
        helpers.assert_close(output, expected)


@pytest.mark.slow
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('places', ['feat1', 'feat2', 'upsampled', 'feat1+feat2+upsampled'])
def test_gradients(x64, places, train):
    def read(xp, variables, x):
        return reading(xp, variables, x, places.split('+'), train)

    helpers.check(tiny(**SE, placement=places), read, X, train=train)


def test_outputs_and_stages_at_any_size_and_number_of_channels():
    outputs, stages = shapes(tiny(width=0.3), (2, 64, 96, 1), return_stages=True)
    assert outputs == [(2, 2, 3, 21), (2, 4, 6, 21)]
    assert stages == {  # widths 32, 64, ... times 0.3, to multiples of 8
        'stem': (2, 16, 24, 16),
        'stage1': (2, 8, 12, 32),
        'stage2': (2, 4, 6, 80),
        'stage3': (2, 2, 3, 160),
        'feat1': (2, 4, 6, 80),
        'feat2': (2, 2, 3, 152),
        'pre_logits': (2, 152),
        'neck': (2, 2, 3, 80),
        'upsampled': (2, 4, 6, 40),
    }
    other = tiny(masks=((0, 1), (2,)), num_classes=7)
    assert shapes(other, (1, 32, 32, 3)) == [(1, 1, 1, 24), (1, 2, 2, 12)]
    assert shapes(tiny(num_classes=0, **SE), (1, 32, 64, 3)) == [(1, 1, 2, 64), (1, 2, 4, 32)]


def test_types():
    model = tiny(dtype=jnp.bfloat16, **SE)
    run = functools.partial(model.init_with_output, jax.random.key(0))
    outputs, variables = jax.eval_shape(run, jnp.zeros((1, 32, 32, 3)))
    assert {output.dtype for output in outputs} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_places_and_their_arguments():
    arguments = {'attention': 'se', 'placement': 'upsampled+feat2'}
    model = tiny(**arguments, attention_args=({'hidden': 3}, {'hidden': 5}))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    found = {n: params[n]['fc1']['kernel'].shape for n in params if n.endswith('_attention')}
    assert found == {'upsampled_attention': (16, 3), 'feat2_attention': (64, 5)}
    other = attention_jax.create_model('yolov4_tiny_voc_phi2', attention='gc')
    assert (other.placement, other.attention_args) == (None, None)


REFUSED = {'cross_layer_non_local', 'danet_head', 'isqrt_cov', 'sk', 'split_attention'}


def test_mechanisms_that_do_not_fit_are_refused():
    for name in attention_jax.list_attention():
        if name in REFUSED:
            with pytest.raises(ValueError, match='needs one that returns its input gated'):
                tiny(attention=name)
        else:
            tiny(attention=name)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(set(attention_jax.list_attention()) - REFUSED))
def test_every_other_mechanism_at_every_place(name):
    model = attention_jax.create_model('yolov4_tiny', attention=name, num_classes=3)
    assert shapes(model, (1, 256, 512, 3)) == [(1, 8, 16, 24), (1, 16, 32, 24)]
    paths = helpers.called(model, (1, 256, 512, 3))
    assert {f'{place}_attention' for place in placement.NECK} <= paths


def test_identity_init_leaves_the_plain_network():
    x = jnp.asarray(X, jnp.float32)
    gated = tiny(**SE, identity_init=True)
    variables = helpers.random_variables(gated, x, dtype=np.float32)
    for place in placement.NECK:
        variables['params'][f'{place}_attention_alpha'] = np.zeros(1, np.float32)
    got = jax.jit(gated.apply)(variables, x)
    want = jax.jit(tiny().apply)(variables, x)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


def test_initialisation():
    model = tiny()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    kernels, scales = [], []
    for path, value in traverse_util.flatten_dict(params, sep='/').items():
        values = np.asarray(value).ravel()
        if path.endswith('/kernel'):
            kernels.append(values)
        elif path.endswith('/scale'):
            scales.append(values - 1)
        elif path.endswith('norm/bias'):
            assert not values.any()
    for found in map(np.concatenate, (kernels, scales)):
        assert found.std() == pytest.approx(0.02, rel=0.1)
        assert abs(found.mean()) < 0.003
    bias = np.asarray(params['head32']['bias'])
    assert 0 < np.abs(bias).max() <= 64**-0.5


def test_backbone_is_a_classifier():
    model = attention_jax.create_model('darknet53_tiny', num_classes=5, width=0.25)
    logits, stages = shapes(model, (2, 40, 72, 1), return_stages=True)
    assert logits == (2, 5)
    assert stages['feat2'] == (2, 1, 2, 128)
    with pytest.raises(ValueError, match='31 x 64 pixels, the network needs at least 32 x 32'):
        shapes(model, (1, 31, 64, 3))


@pytest.mark.parametrize('phi', range(5))
def test_names_are_the_repositorys(phi):
    name = f'yolov4_tiny_voc_phi{phi}'
    text = (helpers.REFERENCE / 'networks' / f'{name}.json.gz').read_bytes()
    names = json.loads(gzip.decompress(text))
    leaves = matching.network_shapes(model_entry(name), attention_jax.create_model(name), 3)
    arrays = {path: np.zeros(leaf.shape, np.int8) for path, leaf in leaves.items()}
    state = torch.to_state_dict(name, traverse_util.unflatten_dict(arrays, sep='/'))
    want = names['parameters'] | names['buffers']
    want = {k: tuple(v) for k, v in want.items() if 'num_batches_tracked' not in k}
    assert {k: v.shape for k, v in state.items()} == want


def test_maps_of_the_neck():
    model = tiny(attention='cbam')
    variables = helpers.random_variables(model, X.astype(np.float32), dtype=np.float32)
    found = jax.eval_shape(
        lambda v, x: attention_jax.attention_maps(model, v, x), variables, jnp.float32(X)
    )
    sides = {'feat1': (4, 6, 32), 'feat2': (2, 3, 64), 'upsampled': (4, 6, 16)}
    want = {}
    for place, (h, w, c) in sides.items():
        want[f'{place}_attention/channel'] = (2, c)
        want[f'{place}_attention/spatial'] = (2, h, w)
    assert {path: m.shape for path, m in found.items()} == want


def test_nnx_gives_both_outputs():
    x = jnp.ones((1, 32, 32, 3))
    model = tiny()
    variables = helpers.random_variables(model, x, dtype=np.float32)
    converted = bridge.to_nnx(model, variables, x)
    got = nnx.jit(lambda model, x: model(x))(converted, x)
    want = jax.jit(model.apply)(variables, x)
    assert len(got) == 2
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ('arguments', 'word'),
    [
        ({'wdth': 1.0}, 'did you mean width'),
        ({'width': 0.0}, 'width must be positive'),
        ({'num_classes': -1}, 'num_classes'),
        ({'anchors': ((10, 0),) * 6}, 'anchors must be pairs'),
        ({'anchors': ((10, 14),)}, 'masks must hold numbers of anchors, 0 to 0'),
        ({'masks': ((0, 1, 2),)}, 'masks must be two'),
        ({'masks': ((0, 1, 2), ())}, 'masks must be two'),
        ({'image_size': 416}, 'image_size must be height and width'),
        ({'image_size': (416, 400)}, 'image_size has 416 x 400 pixels.*416 x 416'),
        ({'attention_args': {'reduction': 4}}, 'attention_args needs attention'),
        ({'placement': 'feat1'}, 'placement needs attention'),
        ({'attention': 'se', 'placement': 'branch'}, "'branch' cannot be read: join some of feat1"),
        ({'attention': 'se', 'placement': 'feat1+feat1'}, 'each once'),
        ({'attention': 'se', 'attention_args': ({},) * 2}, r'3 places .*, got 2'),
        ({'attention': 'sk'}, "attention 'sk' changes the shape"),
        ({'attention': 'nothing'}, 'is not registered'),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        attention_jax.create_model('yolov4_tiny', **arguments)


def test_sides_that_are_no_multiples_are_refused():
    with pytest.raises(ValueError, match=r'x has 64 x 50 pixels.*multiples of 32.*64 x 64'):
        shapes(tiny(), (1, 64, 50, 3))
