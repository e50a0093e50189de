"""Reading compiled programs: stored ones, and ones of eight CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from attention_jax.analysis import hlo
from attention_jax.training import sharding

# Pieces of programs compiled for 8 chips: one exchange in two pieces, an asynchronous one, a
# reduction fused with the slice of its result, and a kernel with an array on the chip.
PROGRAM = """\
HloModule jit_f, is_scheduled=true

%fused (param_0.1: bf16[3,3,32,32]) -> bf16[3,3,32,64] {
  %param_0.1 = bf16[3,3,32,32]{2,1,0,3:T(4,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.25 = bf16[3,3,32,64]{2,1,0,3:T(4,128)(2,1)} all-gather(%param_0.1), \
channel_id=12, dimensions={3}, metadata={op_name="jit(f)/conv1"}
}

%fused.1 (param_0.2: bf16[3,3,32,32]) -> bf16[3,3,32,64] {
  %param_0.2 = bf16[3,3,32,32]{2,1,0,3:T(4,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.27 = bf16[3,3,32,64]{2,1,0,3:T(4,128)(2,1)S(1)} all-gather(%param_0.2), \
channel_id=12, dimensions={3}, metadata={op_name="jit(f)/conv1"}
}

%all-reduce-scatter (input: bf16[3,3,64,64]) -> bf16[3,3,64,32] {
  %input = bf16[3,3,64,64]{2,3,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.66 = bf16[3,3,64,64]{2,3,1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=63
  ROOT %dynamic-slice.29 = bf16[3,3,64,32]{2,3,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.66)
}

ENTRY %main (param: f32[10], param.1: bf16[4,8,8,16], row: f32[1,64]) -> (f32[10], f32[8,64]) {
  %param = f32[10]{0:T(128)S(1)} parameter(0)
  %param.1 = bf16[4,8,8,16]{3,0,2,1:T(8,128)(2,1)} parameter(1)
  %row = f32[1,64]{1,0} parameter(2)
  %ag-start = (f32[1,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%row), channel_id=3, dimensions={0}
  %ag-done = f32[8,64]{1,0} all-gather-done(%ag-start)
  %fusion = f32[10]{0:T(128)} fusion(%param, %param.1), kind=kLoop, calls=%fused
  ROOT %tuple = (f32[10]{0:T(128)}, /*index=1*/f32[8,64]{1,0}) tuple(%fusion, %ag-done)
}
"""


def test_exchanges_of_a_stored_program():
    sent = hlo.collectives(hlo.read_program(PROGRAM))
    assert [(c.kind, c.shapes, c.bytes) for c in sent] == [
        ('all-gather', ((3, 3, 32, 64),), 2 * 9 * 32 * 64),
        ('reduce-scatter', ((3, 3, 64, 64),), 2 * 9 * 64 * 64),
        ('all-gather', ((8, 64),), 4 * 8 * 64),
    ]
    assert sent[0].where == 'jit(f)/conv1'
    # The kernel is a split parameter; what is left is 64 numbers of each of 8 examples.
    (line,) = hlo.batch_gathers(sent, 8, 8, split={9 * 32 * 64})
    assert line.startswith('all-gather [8, 64]')


def test_bytes_of_a_stored_program():
    total, off_chip = hlo.bytes_moved(hlo.read_program(PROGRAM))
    # The fusion: 10 numbers padded to a tile of 128, in and out; 8x8x4x16 padded to 8x8x8x128.
    # The gather: a row in, eight rows out.
    assert total == 4 * 128 + 4 * 128 + 2 * 8 * 8 * 8 * 128 + 4 * 64 * 9
    assert off_chip == total - 4 * 128


def exchanges(f, *arrays, specs):
    """The exchanges of `f` compiled for 8 CPU devices."""
    mesh = sharding.make_mesh(4, 2)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(arrays, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        text = jax.jit(f).lower(*arguments).compile().as_text()
    return hlo.collectives(hlo.read_program(text))


BATCH = P(('data', 'fsdp'))
WHOLE = P()


def grouped(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=4
    )


def over_examples(x, w):
    return jax.lax.map(lambda example: example @ w, x)


@pytest.mark.parametrize(
    ('f', 'shapes'),
    [
        (lambda x, w: jax.lax.with_sharding_constraint(x, WHOLE) @ w, [(16, 24), (24, 24)]),
        (lambda x, w: jax.lax.top_k(x @ w, 3)[0], [(16, 24), (24, 24)]),
        (lambda x, w: (x @ w)[jnp.argsort(x[:, 0])], [(16, 24), (24, 24)]),
        (over_examples, [(16, 4, 24), (24, 24)]),
        (grouped, [(16, 8, 8, 24), (3, 3, 6, 24)]),
    ],
    ids=['constraint', 'top_k', 'index', 'map', 'grouped'],
)
def test_gathered_batch_is_found(f, shapes):
    sent = exchanges(f, *shapes, specs=[BATCH, WHOLE])
    assert hlo.batch_gathers(sent, 16, 8, parameters={24 * 24})


def test_local_program_has_none():
    def loss(x, w):
        gate = jax.nn.sigmoid(x.mean((1, 2)) @ w)
        return (x * gate[:, None, None]).var(0).sum()

    sent = exchanges(jax.grad(loss, argnums=1), (16, 8, 8, 24), (24, 24), specs=[BATCH, WHOLE])
    assert [c.kind for c in sent].count('all-reduce')
    assert not hlo.batch_gathers(sent, 16, 8, parameters={24 * 24})


def test_split_parameter_is_no_batch():
    shapes, specs = [(16, 24), (24, 48)], [BATCH, P(None, 'fsdp')]
    sent = exchanges(
        lambda x, w: jax.lax.with_sharding_constraint(x @ w, BATCH), *shapes, specs=specs
    )
    assert {c.kind for c in sent} == {'all-gather'}
    assert hlo.batch_gathers(sent, 16, 8)
    assert not hlo.batch_gathers(sent, 16, 8, split={24 * 48})
    # Without the constraint the result is split as the parameter is, from the examples of pairs.
    sent = exchanges(lambda x, w: x @ w, *shapes, specs=specs)
    assert hlo.batch_gathers(sent, 16, 8, split={24 * 48})


@pytest.mark.parametrize(
    ('kind', 'shape', 'found'),
    [
        ('all-gather', (4,), True),  # a number for each example of two chips
        ('all-gather', (3,), False),
        ('all-gather', (24, 24), True),  # a parameter, but not a split one
        ('all-gather', (24, 48), False),
        ('all-reduce', (16, 24), True),  # rows of the whole batch
        ('all-reduce', (24, 24), False),
        ('all-reduce', (16, 36), False),  # the gradient of a parameter with as many rows
        ('all-reduce', (16,), False),
        ('all-to-all', (16, 24), False),  # nobody gets more than before
    ],
)
def test_what_counts_as_gathering(kind, shape, found):
    sent = [hlo.Collective(kind, 4, (shape,), 'jit(f)')]
    parameters = {'split': {24 * 48}, 'parameters': {24 * 24, 16 * 36}}
    assert len(hlo.batch_gathers(sent, 16, 8, **parameters)) == found
    assert not hlo.batch_gathers(sent, 16, 1)
