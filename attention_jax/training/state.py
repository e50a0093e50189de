"""The state of a run: one pytree with all that a step reads and writes."""

from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from attention_jax.training import sharding


@flax.struct.dataclass
class State:
    """State after `step` batches.

    Attributes:
        step: int32 `[]`, number of batches seen.
        params: the network's parameters.
        collections: its other collections by name, e.g. 'batch_stats'.
        opt_state: the optimiser's.
        ema: moving average of all variables (`{'params': ..., 'batch_stats': ...}`), or None.
        rng: key that every step folds its number into.
    """

    step: jax.Array
    params: Any
    collections: dict[str, Any]
    opt_state: optax.OptState
    ema: dict[str, Any] | None
    rng: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to evaluate: the averaged ones where they are kept."""
        return {'params': self.params, **self.collections} if self.ema is None else self.ema


def make_init(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    inputs: jax.ShapeDtypeStruct,
    *,
    ema: bool,
) -> Callable[[jax.Array], State]:
    """Returns the function from a random key to the state before the first step.

    Args:
        model: the network.
        optimizer: see `optimizer.make_optimizer`.
        inputs: shape and type of what the network takes.
        ema: keep a moving average of the variables.
    """

    def init(key: jax.Array) -> State:
        params_key, rng = jax.random.split(key)
        collections = dict(model.init(params_key, jnp.zeros(inputs.shape, inputs.dtype)))
        params = collections.pop('params')
        return State(
            step=jnp.int32(0),
            params=params,
            collections=collections,
            opt_state=optimizer.init(params),
            ema={'params': params, **collections} if ema else None,
            rng=rng,
        )

    return init


def abstract_state(init: Callable[[jax.Array], State], mesh: Mesh) -> State:
    """Returns the state's shapes, types and shardings on `mesh`; nothing is computed."""
    return sharding.with_sharding(mesh, jax.eval_shape(init, jax.random.key(0)))


def create_state(init: Callable[[jax.Array], State], abstract: State, seed: int) -> State:
    """Returns the state before the first step, each array born where it lives.

    Args:
        init: see `make_init`.
        abstract: see `abstract_state`.
        seed: of the random key.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # Compiling the initialisation costs more than compiling the step, several times so on a CPU;
    # it runs once, and level 1 gives the same bits.
    on_cpu = abstract.step.sharding.mesh.devices.flat[0].platform == 'cpu'
    options = {'xla_backend_optimization_level': 1} if on_cpu else None
    compiled = jax.jit(init, out_shardings=shardings, compiler_options=options)
    return compiled(jax.random.key(seed))


def start_from(state: State, abstract: State, variables: Mapping[str, Any]) -> State:
    """Returns the state before the first step with loaded variables in place of the initial ones.

    Args:
        state: see `create_state`.
        abstract: see `abstract_state`.
        variables: the network's, every collection, as arrays of any type.
    """

    def place(loaded: Any, like: Any) -> Any:
        def put(x: Any, a: jax.ShapeDtypeStruct) -> jax.Array:
            x = np.asarray(x).astype(a.dtype)
            return jax.make_array_from_callback(a.shape, a.sharding, lambda index: x[index])

        return jax.tree.map(put, loaded, like)

    collections = dict(variables)
    return state.replace(
        params=place(collections.pop('params'), abstract.params),
        collections=place(collections, abstract.collections),
        # Arrays of its own: the step's donated state may not hold one twice.
        ema=None if state.ema is None else place(dict(variables), abstract.ema),
    )
