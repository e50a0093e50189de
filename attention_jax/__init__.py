"""Visual attention mechanisms as exact, fast Flax modules, and networks that carry them."""

import importlib
from typing import TYPE_CHECKING, Any

from attention_jax import functional
from attention_jax.models.registry import create_model, list_models
from attention_jax.modules import *  # noqa: F403
from attention_jax.modules import __all__ as _mechanisms
from attention_jax.modules.registry import create_attention, list_attention
from attention_jax.version import __version__

if TYPE_CHECKING:
    from attention_jax.analysis.maps import attention_maps
    from attention_jax.tasks.detection.prediction import predict
    from attention_jax.training.checkpoints import load
    from attention_jax.training.pretrained import load_pretrained

# What a user of one module need not pay for is imported when it is first used.
_LAZY = {
    'analysis': 'attention_jax.analysis',
    'attention_maps': 'attention_jax.analysis.maps',
    'data': 'attention_jax.data',
    'interop': 'attention_jax.interop',
    'load': 'attention_jax.training.checkpoints',
    'load_pretrained': 'attention_jax.training.pretrained',
    'models': 'attention_jax.models',
    'predict': 'attention_jax.tasks.detection.prediction',
    'tasks': 'attention_jax.tasks',
    'training': 'attention_jax.training',
}

__all__ = [
    '__version__',
    'attention_maps',
    'create_attention',
    'create_model',
    'functional',
    'list_attention',
    'list_models',
    'load',
    'load_pretrained',
    'predict',
    *_mechanisms,
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(_LAZY[name])
    return module if _LAZY[name].endswith(f'.{name}') else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
