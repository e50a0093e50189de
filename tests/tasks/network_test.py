import jax.numpy as jnp
import pytest

from attention_jax.tasks.network import build_model
from configs import datasets


def test_model_is_the_configs():
    config = datasets.get_config()
    config.model.attention = 'se'
    config.model.attention_args = {'reduction': 4}
    config.model.arguments = {'zero_init_last': True}
    model = build_model(config, 10)
    assert (model.attention, model.num_classes, model.zero_init_last) == ('se', 10, True)
    assert model.attention_args == {'reduction': 4}
    config.train.compute_dtype = 'bfloat16'
    assert build_model(config, 10).dtype == jnp.bfloat16
    config.model.num_classes = 3
    with pytest.raises(
        ValueError, match='num_classes 3 is not the number of classes of the data, 10'
    ):
        build_model(config, 10)
    assert build_model(config, 3).num_classes == 3
