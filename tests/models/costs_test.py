import attention_jax
from attention_jax.models.costs import costs, parameter_table


def test_costs_of_a_network_by_hand():
    model = attention_jax.create_model('tiny_resnet', num_classes=10)
    first = 9 * 3 * 16 + 2 * 16
    blocks = 9 * (16 * 16 + 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 4 * (16 + 32 + 64)
    assert costs(model, (1, 32, 32, 3)) == {
        'parameters': first + blocks + 64 * 10 + 10,
        'macs': 9 * (1024 * (48 + 512) + 256 * (512 + 1024) + 64 * (2048 + 4096)) + 640,
        'matmul': 0,
    }


def test_counting_twice_gives_the_same():
    model = attention_jax.create_model('tiny_resnet', attention='se')
    assert costs(model, (1, 32, 32, 3)) == costs(model, (1, 32, 32, 3))


def test_table_has_every_array_and_the_totals():
    model = attention_jax.create_model('tiny_resnet', num_classes=10)
    text = parameter_table(model, (1, 32, 32, 1))
    assert 'params/stem_conv1/kernel' in text
    assert '3x3x1x16' in text
    assert 'batch_stats/stem_norm1/mean' in text
    assert f'{costs(model, (1, 32, 32, 1))["parameters"]:,} parameters' in text
    assert len({len(line) for line in text.splitlines()[:10]}) == 1
