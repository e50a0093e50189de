import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attention_jax.training import sharding


def test_mesh_takes_all_devices_with_auto_axes():
    mesh = sharding.make_mesh(-1, 2)
    assert dict(mesh.shape) == {'data': 4, 'fsdp': 2}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert sharding.make_mesh(1, 1, jax.devices()[3:4]).devices.item() == jax.devices()[3]


@pytest.mark.parametrize(('data', 'fsdp'), [(3, 1), (-1, 3), (8, 2), (0, 1), (-1, 0), (-2, 1)])
def test_mesh_refuses_sizes_that_do_not_fit(data, fsdp):
    with pytest.raises(ValueError, match=f'mesh.data {data} .*mesh.fsdp {fsdp}'):
        sharding.make_mesh(data, fsdp)


def test_batch_size_must_fit_the_devices():
    mesh = sharding.make_mesh()
    sharding.check_batch_size(16, mesh)
    with pytest.raises(ValueError, match='20 must be divisible by the 8 devices: use 16 or 24'):
        sharding.check_batch_size(20, mesh)
    with pytest.raises(ValueError, match=r'4 must be divisible by the 8 devices: use 8$'):
        sharding.check_batch_size(4, mesh)


@pytest.mark.parametrize(
    ('shape', 'spec'),
    [
        ((3, 3, 64, 128), P(None, None, None, 'fsdp')),
        ((3, 3, 128, 64), P(None, None, 'fsdp')),
        ((3, 3, 64, 64), P(None, None, None, 'fsdp')),  # the last of two equal ones
        ((7, 7, 3, 254), P(None, None, None, 'fsdp')),
        ((513, 131), P()),  # no even axis
        ((1024,), P()),  # small
        ((), P()),
    ],
)
def test_rule_on_shape(shape, spec):
    mesh = sharding.make_mesh(-1, 2)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert sharding.state_sharding(mesh, x).spec == spec
    assert sharding.state_sharding(sharding.make_mesh(), x).spec == P()


def test_global_batch_is_split_over_all_devices():
    mesh = sharding.make_mesh(-1, 2)
    image = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1)
    batch = sharding.global_batch(mesh, {'image': image})
    assert {s.data.shape for s in batch['image'].addressable_shards} == {(2, 1, 1, 1)}
    np.testing.assert_array_equal(batch['image'], image)
