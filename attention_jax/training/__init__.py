"""Training: `train(config, workdir)`, and what it is made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attention_jax.training.checkpoints import load
    from attention_jax.training.evaluation import evaluate
    from attention_jax.training.loop import train

__all__ = ['evaluate', 'load', 'train']


def __getattr__(name: str) -> Any:
    # When first used: reading weights by `pretrained` needs none of the seconds that these import.
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from attention_jax.training import checkpoints, evaluation, loop

    return {'evaluate': evaluation.evaluate, 'load': checkpoints.load, 'train': loop.train}[name]
