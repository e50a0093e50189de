"""The non-local block."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.maps import sow_map, wanted_queries
from attention_jax.modules.positions import (
    SimilarityVector,
    attend_positions,
    flatten_positions,
    logit_scale,
    pair_terms,
    pool_positions,
)
from attention_jax.modules.registry import Scheme, TorchNames, pointwise, register_attention
from attention_jax.modules.widths import hidden_width


class NonLocal(nn.Module):
    """Non-local block: every position gathers from every (pooled) position.

    With the n positions of x, the m positions of xk = max_pool(x) and d the hidden width::

        q = x Wq + bq          k = xk Wk + bk          v = xk Wv + bv          Wq, Wk, Wv [c, d]
        A = softmax_m(s q k^T)                [..., n, m]    embedded_gaussian
        A = softmax_m(x xk^T)                                gaussian: no Wq, Wk
        A = q k^T / m                                        dot_product
        A_ij = relu(wp . [q_i, k_j]) / m                     concatenation, wp [2d]
        z = norm(A v Wo + bo)                 [..., n, c]    Wo [d, c]
        out = x + z

    `pool_position='after'` pools k and v instead of x, another function: a maximum does not commute
    with a projection. A takes memory linear in n and m (`functional.attend`); the two modes without
    softmax never form it. A gaussian's logits are of the order of c: the map of features that are
    not normalised is nearly diagonal.

    Source: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, arXiv 1711.07971,
    eq. 1-6; defaults from the authors' Caffe2 graph (facebookresearch/video-nonlocal-net
    lib/models/nonlocal_helper.py): embedded Gaussian with s = d^-1/2 (not in the paper), pooling by
    2 before the projections and never in time, kernels N(0, 0.01^2), biases 0, and batch
    normalisation whose scale starts at 0. Their frozen affine layer is that norm in evaluation.
    AlexHex7/Non-local_pytorch pools after the projections and has no scale (its initialisers are
    PyTorch's), mmcv has neither pool nor norm, timm s = c^-1/2 and a hidden width of c / 8 rounded
    to a multiple of 8 (give `hidden`); GCNet's copy divides by the scale, `scale=d**0.5`.

    Attributes:
        spatial_dims: 1, 2 or 3 axes of positions, the last before c; all others are batch.
        mode: 'embedded_gaussian', 'gaussian', 'dot_product' or 'concatenation'.
        reduction: divisor of the channels that gives d, rounded down, at least 1.
        hidden: d itself; wins over `reduction`.
        scale: s: 'hidden', d^-1/2; 'input', c^-1/2; a number; None, 1. The default is nothing to
            the other modes, which have no scale.
        pool_size: window and stride of the maximum pool over height and width; 1 is none. What a
            side leaves over is dropped.
        pool_position: 'before' or 'after' the projections.
        group_size: with three spatial axes, attention within groups of that many frames.
        use_bias: bq, bk, bv.
        output_bias: bo; None is `use_bias`.
        normalization: 'batch', or None.
        norm_eps: of that norm.
        norm_momentum: of that norm, in Flax's sense.
        zero_init: the norm's scale starts at 0, or Wo and bo where there is no norm.
        residual: adds x.
        chunk_size: queries taken at a time by the modes with softmax; None chooses.
        dtype: type of the computation; None is the input's. Logits and softmax are float32.
        param_dtype: type of the parameters.
    """

    spatial_dims: int = 2
    mode: str = 'embedded_gaussian'
    reduction: int = 2
    hidden: int | None = None
    scale: str | float | None = 'hidden'
    pool_size: int = 2
    pool_position: str = 'before'
    group_size: int | None = None
    use_bias: bool = True
    output_bias: bool | None = None
    normalization: str | None = 'batch'
    norm_eps: float = 1e-5
    norm_momentum: float = 0.9
    zero_init: bool = True
    residual: bool = True
    chunk_size: int | None = None
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Adds to each position what it gathers from the others.

        Args:
            x: `[..., h, w, c]`, `[..., l, c]` or `[..., t, h, w, c]` by `spatial_dims`.
            train: uses the batch's statistics in the norm.
        """
        self._check(x)
        c, shape = x.shape[-1], x.shape
        d = hidden_width(c, reduction=self.reduction, hidden=self.hidden, minimum=1)
        x = x.astype(self.dtype or x.dtype)
        if self.group_size is not None:
            x = rearrange(x, '... (g t) h w c -> ... g t h w c', t=self.group_size)

        y = self._attend(x, d)
        use_bias = self.use_bias if self.output_bias is None else self.output_bias
        zero = self.zero_init and self.normalization is None
        z = self._dense(c, use_bias, 'out', zero=zero)(y).reshape(x.shape)
        if self.normalization == 'batch':
            z = BatchNorm(
                momentum=self.norm_momentum,
                epsilon=self.norm_eps,
                scale_init=initializers.zeros if self.zero_init else initializers.ones,
                param_dtype=self.param_dtype,
                name='norm',
            )(z, train=train)
        return (x + z if self.residual else z).reshape(shape)

    def _attend(self, x: jax.Array, d: int) -> jax.Array:
        """A v, `[..., n, d]`."""
        pool = functools.partial(
            pool_positions, size=self.pool_size, spatial_dims=self.spatial_dims
        )
        project = functools.partial(self._dense, d, self.use_bias)
        source, after = (pool(x), lambda y: y) if self.pool_position == 'before' else (x, pool)
        if self.mode == 'gaussian':
            query, key = x, after(source)
        else:
            query, key = project('query')(x), after(project('key')(source))
        value = after(project('value')(source))
        query, key, value = (flatten_positions(y, self.spatial_dims) for y in (query, key, value))

        if self.mode == 'concatenation':
            vector = SimilarityVector(2 * d, _INIT, self.param_dtype, name='similarity')
            a, b = pair_terms(vector(), query, key)

            def weights() -> jax.Array:
                sums = wanted_queries(self, a[..., None]) + b[..., None, :]
                return (jax.nn.relu(sums) / b.shape[-1]).astype(x.dtype)

            sow_map(self, weights)
            return functional.pairwise_relu_attend(a, b, value)
        options = {'weighting': 'mean', 'scale': 1.0}
        if self.mode != 'dot_product':
            scale = None if self.mode == 'gaussian' else self.scale
            options = {'weighting': 'softmax', 'scale': logit_scale(scale, x.shape[-1], d)}
        return attend_positions(self, query, key, value, chunk_size=self.chunk_size, **options)

    def _dense(self, features: int, use_bias: bool, name: str, zero: bool = False) -> Dense:
        return Dense(
            features,
            use_bias=use_bias,
            kernel_init=initializers.zeros if zero else _INIT,
            bias_init=initializers.zeros,
            param_dtype=self.param_dtype,
            name=name,
        )

    def _check(self, x: jax.Array) -> None:
        checks.choice('spatial_dims', self.spatial_dims, (1, 2, 3))
        checks.feature_map(x, self.spatial_dims)
        checks.choice('mode', self.mode, _MODES)
        checks.choice('pool_position', self.pool_position, ('before', 'after'))
        checks.choice('normalization', self.normalization, (None, 'batch'))
        checks.at_least('chunk_size', self.chunk_size, 1)
        if isinstance(self.scale, str):
            checks.choice('scale', self.scale, ('hidden', 'input'))
        if self.mode != 'embedded_gaussian' and self.scale not in (None, 'hidden'):
            raise ValueError(
                f"scale {self.scale!r} is for mode 'embedded_gaussian', got {self.mode!r}: leave "
                f'it out, or use None'
            )
        checks.pool_fits(x, self.pool_size, self.spatial_dims)
        if self.group_size is not None:
            if self.spatial_dims != 3:
                raise ValueError(
                    f'group_size {self.group_size} is for spatial_dims 3, got {self.spatial_dims}'
                )
            checks.divides('group_size', self.group_size, 'the frames', x.shape[-4])


def _torch_names(module: NonLocal) -> TorchNames:
    """Names of the released blocks; two of them wrap what they pool, so that a number joins in.

    'authors' is what the block's form comes from: Wang et al. pool before the projections,
    AlexHex7/Non-local_pytorch after them. 'caffe2' are the names behind the block's own prefix.
    """
    phi, g = ('phi.0', 'g.0') if module.pool_size > 1 else ('phi', 'g')
    w = 'W.0' if module.normalization else 'W'

    def scheme(query: str, key: str, value: str, out: str, norm: str, similarity: str) -> Scheme:
        layers = {query: 'query', key: 'key', value: 'value', out: 'out'}
        return {
            **pointwise(layers, module.spatial_dims),
            **pointwise({similarity: 'similarity'}),
            f'{norm}.*': 'norm/*',
        }

    schemes = {
        'video': scheme('theta', 'phi', 'g', 'out', 'bn', 'concat_project.0'),
        'alexhex7': scheme('theta', phi, g, w, 'W.1', 'concat_project.0'),
        'mmcv': scheme(
            *(f'{layer}.conv' for layer in ('theta', phi, g, 'conv_out')),
            'conv_out.bn',
            'concat_project.conv',
        ),
        'timm': scheme('t', 'p', 'g', 'z', 'norm', 'concat_project.0'),
        'cgnl': scheme('t', 'p', 'g', 'z', 'bn', 'concat_project.0'),
        'caffe2': {
            'bn_s': 'norm/scale',
            'bn_b': 'norm/bias',
            'bn_rm': 'norm/mean',
            'bn_riv': 'norm/var',
        },
    }
    ones = ' '.join('1' * module.spatial_dims)
    for theirs, ours in (('theta', 'query'), ('phi', 'key'), ('g', 'value'), ('out', 'out')):
        schemes['caffe2'][f'{theirs}_w'] = (f'{ours}/kernel', f'o i {ones} -> i o')
        schemes['caffe2'][f'{theirs}_b'] = f'{ours}/bias'
    before = module.pool_position == 'before'
    return {'authors': schemes['video' if before else 'alexhex7'], **schemes}


_MODES = ('embedded_gaussian', 'gaussian', 'dot_product', 'concatenation')
_INIT = initializers.normal(0.01)
_ALEXHEX7 = {'pool_position': 'after', 'scale': None}

register_attention(
    'non_local',
    NonLocal,
    paper='Non-local Neural Networks',
    arxiv='1711.07971',
    year=2018,
    family='positions',
    complexity='N C (N + C)/r',
    identity_at_init=lambda module: module.zero_init and module.residual,
    placement='inserted',
    variants={
        'authors': {},
        'video': {'spatial_dims': 3},
        'video_groups': {'spatial_dims': 3, 'group_size': 2},
        'alexhex7': _ALEXHEX7,
        'alexhex7_gaussian': {'mode': 'gaussian', **_ALEXHEX7},
        'alexhex7_dot_product': {'mode': 'dot_product', **_ALEXHEX7},
        'alexhex7_concatenation': {'mode': 'concatenation', **_ALEXHEX7},
        'alexhex7_1d': {'spatial_dims': 1, **_ALEXHEX7},
        'mmcv': {'pool_size': 1, 'normalization': None},
        'timm': {'reduction': 8, 'scale': 'input', 'pool_size': 1},
        'cgnl': {'use_bias': False, 'scale': None, 'pool_size': 1},
    },
    torch_names=_torch_names,
)
