"""The non-local block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from attention_jax import checks, functional
from attention_jax.functional import cost
from attention_jax.functional.dtypes import Dtype, statistics_type
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.maps import sow_map, wanted_queries
from attention_jax.modules.positions import flatten_positions, logit_scale
from attention_jax.modules.registry import TorchName, TorchNames, register_attention
from attention_jax.modules.widths import hidden_width

_MODES = ('embedded_gaussian', 'gaussian', 'dot_product', 'concatenation')


def _torch_names(module: 'NonLocal') -> TorchNames:
    """Names of the released blocks; two of them wrap what they pool, so that a number joins in.

    'authors' is what the block's form comes from: Wang et al. pool before the projections,
    AlexHex7/Non-local_pytorch after them. 'caffe2' are the names behind the block's own prefix.
    """
    ones = ' '.join('1' * module.spatial_dims)
    pooled = '.0' if module.pool_size > 1 else ''
    norm = '.0' if module.normalization else ''

    def scheme(theta: str, phi: str, g: str, out: str, bn: str, concat: str) -> Any:
        layers = {theta: 'query', phi: 'key', g: 'value', out: 'out'}
        names: dict[str, TorchName] = {
            f'{theirs}.*': (f'{ours}/*', f'o i {ones} -> i o') for theirs, ours in layers.items()
        }
        return names | {f'{bn}.*': 'norm/*', f'{concat}.*': ('similarity/*', 'o i 1 1 -> i o')}

    video = scheme('theta', 'phi', 'g', 'out', 'bn', 'concat_project.0')
    alexhex7 = scheme('theta', f'phi{pooled}', f'g{pooled}', f'W{norm}', 'W.1', 'concat_project.0')
    caffe2: dict[str, TorchName] = {
        f'bn_{theirs}': f'norm/{ours}'
        for theirs, ours in (('s', 'scale'), ('b', 'bias'), ('rm', 'mean'), ('riv', 'var'))
    }
    for theirs, ours in (('theta', 'query'), ('phi', 'key'), ('g', 'value'), ('out', 'out')):
        caffe2[f'{theirs}_w'] = (f'{ours}/kernel', f'o i {ones} -> i o')
        caffe2[f'{theirs}_b'] = f'{ours}/bias'
    return {
        'authors': video if module.pool_position == 'before' else alexhex7,
        'video': video,
        'alexhex7': alexhex7,
        'mmcv': scheme(
            'theta.conv',
            f'phi{pooled}.conv',
            f'g{pooled}.conv',
            'conv_out.conv',
            'conv_out.bn',
            'concat_project.conv',
        ),
        'timm': scheme('t', 'p', 'g', 'z', 'norm', 'concat_project.0'),
        'cgnl': scheme('t', 'p', 'g', 'z', 'bn', 'concat_project.0'),
        'caffe2': caffe2,
    }


_ALEXHEX7 = {'pool_position': 'after', 'scale': None}


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

        Returns:
            The shape of x.

        Raises:
            ValueError: an unknown name, a size below 1, a scale for a mode without one, frames that
                the group does not divide, or a map smaller than the pool.
        """
        self._check(x)
        c = x.shape[-1]
        d = hidden_width(c, reduction=self.reduction, hidden=self.hidden, minimum=1)
        shape = x.shape
        x = x.astype(self.dtype or x.dtype)
        if self.group_size is not None:
            x = x.reshape(*shape[:-4], -1, self.group_size, *shape[-3:])

        y = self._attend(x, d)
        zero_out = self.zero_init and self.normalization is None
        z = self._dense(
            c,
            use_bias=self.use_bias if self.output_bias is None else self.output_bias,
            kernel_init=initializers.zeros if zero_out else initializers.normal(0.01),
            name='out',
        )(y).reshape(x.shape)
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
        project = functools.partial(
            self._dense, d, use_bias=self.use_bias, kernel_init=initializers.normal(0.01)
        )
        before = self.pool_position == 'before'
        pooled = self._pool(x) if before or self.mode == 'gaussian' else x
        source, after = (pooled, lambda y: y) if before else (x, self._pool)
        if self.mode == 'gaussian':
            query, key = x, pooled
        else:
            query, key = project(name='query')(x), after(project(name='key')(source))
        value = after(project(name='value')(source))
        query, key, value = (flatten_positions(y, self.spatial_dims) for y in (query, key, value))

        if self.mode == 'concatenation':
            weight = _Similarity(self.param_dtype, name='similarity')
            a, b = weight(query, key)

            def weights() -> jax.Array:
                sums = wanted_queries(self, a[..., None]) + b[..., None, :]
                return (jax.nn.relu(sums) / b.shape[-1]).astype(x.dtype)

            sow_map(self, weights)
            return functional.pairwise_relu_attend(a, b, value)
        options = {'weighting': 'mean', 'scale': 1.0}
        if self.mode != 'dot_product':
            scale = None if self.mode == 'gaussian' else self.scale
            options = {'weighting': 'softmax', 'scale': logit_scale(scale, x.shape[-1], d)}
        sow_map(
            self, lambda: functional.attention_weights(wanted_queries(self, query), key, **options)
        )
        return functional.attend(query, key, value, chunk_size=self.chunk_size, **options)

    def _check(self, x: jax.Array) -> None:
        checks.choice('spatial_dims', self.spatial_dims, (1, 2, 3))
        checks.feature_map(x, self.spatial_dims)
        checks.choice('mode', self.mode, _MODES)
        checks.choice('pool_position', self.pool_position, ('before', 'after'))
        checks.choice('normalization', self.normalization, (None, 'batch'))
        if self.chunk_size is not None:
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

    def _pool(self, x: jax.Array) -> jax.Array:
        """Maximum over windows in height and width."""
        if self.pool_size == 1:
            return x
        s = self.pool_size
        window = {1: (s,), 2: (s, s), 3: (1, s, s)}[self.spatial_dims]
        return functional.max_pool(x, window)

    def _dense(self, features: int, **options: Any) -> Dense:
        return Dense(
            features, bias_init=initializers.zeros, param_dtype=self.param_dtype, **options
        )


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


class _Similarity(nn.Module):
    """The two halves of `wp . [q_i, k_j]`: a number a query and a number a key, in float32."""

    param_dtype: Dtype

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        d = query.shape[-1]
        kernel = self.param('kernel', initializers.normal(0.01), (2 * d, 1), self.param_dtype)
        cost.add('macs', query.size + key.size)
        return tuple(
            jnp.einsum(
                '...nd,d->...n',
                y,
                half.astype(y.dtype),
                preferred_element_type=statistics_type(y.dtype),
            )
            for y, half in ((query, kernel[:d, 0]), (key, kernel[d:, 0]))
        )
