"""A module as an argument that `jax.jit` compiles for."""

import dataclasses

from flax import linen as nn


@dataclasses.dataclass(frozen=True, eq=False)
class Static:
    """A module that is equal to another by value, also where its fields hold dicts.

    For `static_argnums`: a program is kept for the module, not for the object that says it.
    """

    module: nn.Module

    def __hash__(self) -> int:
        # A module whose arguments are dicts has no hash of its own.
        return hash(repr(self.module))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.module == other.module
