import jax.numpy as jnp

from attention_jax.tasks.network import build_model
from configs import base


def test_model_is_the_configs():
    config = base.get_config()
    config.model.attention = 'se'
    config.model.attention_args = {'reduction': 4}
    config.model.arguments = {'zero_init_last': True}
    model = build_model(config, 10)
    assert (model.attention, model.num_classes, model.zero_init_last) == ('se', 10, True)
    assert model.attention_args == {'reduction': 4}
    config.model.num_classes = 3
    config.train.compute_dtype = 'bfloat16'
    model = build_model(config, 10)
    assert (model.num_classes, model.dtype) == (3, jnp.bfloat16)
