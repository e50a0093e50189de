"""Covariance pooling with an iterative matrix square root, a head."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from attention_jax import checks
from attention_jax.functional import covariance
from attention_jax.functional.dtypes import Dtype
from attention_jax.modules.initializers import kaiming_fan_out
from attention_jax.modules.layers import BatchNorm, Dense
from attention_jax.modules.registry import pointwise, register_attention


class IterativeSqrtCovariancePooling(nn.Module):
    """Global covariance pooling with iterative square root normalisation (iSQRT-COV): a head.

    With x `[..., h, w, c]`, d the hidden width and `mu` the mean of z over positions::

        z = relu(norm(x W))                            [..., h, w, d]   hidden None: z = x, d = c
        S = mean_hw (z - mu)(z - mu)^T                 [..., d, d]
        t = trace(S) + epsilon;  Y = S / t;  Z = I
        repeat: T = (3 I - Z Y) / 2;  Y, Z = Y T, T Z
        R = sqrt(t) Y                                  approximately S^(1/2)
        out = R[i, j] for i <= j, row by row           [..., d (d + 1) / 2]

    Off-diagonal entries are not scaled. The few steps that the networks use do not converge: they
    are trained with what the recursion gives. An image whose z is the same everywhere has S = 0 and
    gets 0 (the released code: NaN).

    Source: Li, Xie, Wang, Gao, "Towards Faster Training of Global Covariance Pooling Networks by
    Iterative Matrix Square Root Normalization", CVPR 2018, arXiv 1712.01034; defaults from the
    network of jiangtaoxie/fast-MPN-COV, src/network/mpncovresnet.py and
    src/representation/MPNCOV.py (whose class alone has no reduction and 3 steps). GSoP-Net2 takes 3
    steps and the lower triangle; with one step its copy leaves out a factor S / t, which is not
    followed here. The kernel starts with variance 2 / d.

    Attributes:
        hidden: d, the width after the 1x1 reduction; None: no reduction.
        iterations: Newton-Schulz steps.
        square_root: False gives the covariance itself.
        vectorize: False gives the matrix, `[..., d, d]`.
        triangle: 'upper' or 'lower' ((0, 0), (1, 0), (1, 1), (2, 0), ...): the same numbers in
            another order, so a classifier belongs to one of them.
        epsilon: added to the trace, for maps that are almost constant.
        dtype: type of the computation and the output; None is the input's. All that follows the
            reduction is float32, at the highest matmul precision.
        param_dtype: type of the parameters.
    """

    hidden: int | None = 256
    iterations: int = 5
    square_root: bool = True
    vectorize: bool = True
    triangle: str = 'upper'
    epsilon: float = 0.0
    dtype: Dtype = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Pools x `[..., h, w, c]` to a descriptor; `train` is for the norm.

        Raises:
            ValueError: x of one position (a zero covariance has no direction to normalise).
        """
        checks.feature_map(x)
        checks.choice('triangle', self.triangle, covariance.TRIANGLES)
        checks.at_least('hidden', self.hidden, 1)
        checks.at_least('iterations', self.iterations, 1)
        checks.at_least('epsilon', self.epsilon, 0)
        if self.square_root and x.shape[-3:-1] == (1, 1):
            raise ValueError(
                f'x must have more than one position, got shape {x.shape}: its covariance is zero '
                f'and has no root to follow; use a larger map, or square_root=False'
            )
        z = x.astype(self.dtype or x.dtype)

        if self.hidden is not None:
            types = {'param_dtype': self.param_dtype}
            init = {'use_bias': False, 'kernel_init': kaiming_fan_out}
            z = Dense(self.hidden, **init, **types, name='reduce')(z)
            z = jax.nn.relu(BatchNorm(**types, name='reduce_norm')(z, train=train))
        s = covariance.covariance(z)
        if self.square_root:
            s = covariance.square_root(s, self.iterations, epsilon=self.epsilon)
        if self.vectorize:
            s = covariance.triangle(s, self.triangle)
        return s.astype(z.dtype)


register_attention(
    'isqrt_cov',
    IterativeSqrtCovariancePooling,
    paper='Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix '
    'Square Root Normalization',
    arxiv='1712.01034',
    year=2018,
    family='channel',
    complexity='N d (C + d) + d^3',
    preserves_shape=False,
    has_map=False,
    placement='none',
    variants={
        'authors': {},
        'gsop_net2': {'iterations': 3, 'triangle': 'lower'},
        'matrix': {'hidden': None, 'iterations': 3, 'vectorize': False},
        'covariance': {'hidden': None, 'square_root': False},
    },
    torch_names={
        'authors': {
            **pointwise({'conv_dr_block.0': 'reduce'}),
            'conv_dr_block.1.*': 'reduce_norm/*',
        },
        'gsop_net2': {
            **pointwise({'layer_reduce': 'reduce'}),
            'layer_reduce_bn.*': 'reduce_norm/*',
        },
    },
)
