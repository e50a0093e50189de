"""A mechanism at the places of a network: as it is, or so that it starts as nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.nn import initializers

from attention_jax.functional.dtypes import statistics_type
from attention_jax.models.placement import Sites
from attention_jax.modules.registry import (
    TorchNames,
    attention_entry,
    create_attention,
    names_for,
    starts_as_identity,
)


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed as the object it is
class Mechanism:
    """What one part of a network, a block for instance, knows of the network's mechanism.

    `place in mechanism` says whether it stands at a place of this part.

    Attributes:
        attention: registry name; None only where there is no place.
        common: arguments that it has in the whole network, `param_dtype` among them.
        identity_init: it starts as the identity.
        places: place in this part -> its arguments there, which win.
    """

    attention: str | None
    common: Mapping[str, Any]
    identity_init: bool
    places: Mapping[str, Mapping[str, Any]]

    def __contains__(self, place: str) -> bool:
        """Whether it stands at a place of this part."""
        return place in self.places

    def build(self, place: str, **arguments: Any) -> nn.Module:
        """Builds it as it stands at a place; `arguments` win."""
        return create_attention(
            self.attention, **{**self.common, **self.places[place], **arguments}
        )

    def at(
        self,
        place: str,
        x: jax.Array,
        *,
        parent: nn.Module,
        train: bool,
        name: str = 'attention',
    ) -> jax.Array:
        """x, or what the mechanism makes of it if it stands at this place.

        With F the mechanism and alpha `[1]` a parameter `NAME_alpha` of the parent that starts at
        0, `identity_init` gives `x + alpha (F(x) - x)`: a trained network that it is put into
        computes at first what it did before. A mechanism that starts as the identity by itself is
        left alone.

        Args:
            place: one that keeps the shape of x.
            x: `[..., h, w, c]`.
            parent: module whose compact method this is called from.
            train: passed on.
            name: of the mechanism's variables in the parent.
        """
        if place not in self:
            return x
        module = self.build(place, name=name)
        y = module(x, train=train)
        if not self.identity_init or starts_as_identity(module):
            return y
        dtype = self.common['param_dtype']
        alpha = parent.param(f'{name}_alpha', initializers.zeros, (1,), dtype)
        wide = statistics_type(x.dtype)
        start, change = x.astype(wide), y.astype(wide) - x.astype(wide)
        return (start + alpha[0].astype(wide) * change).astype(x.dtype)


def mechanism_names(attention: str, sites: Sites) -> TorchNames:
    """The naming schemes of a mechanism's weights, as it is built at the last of its sites."""
    arguments = [arguments for places in sites.values() for arguments in places.values()][-1]
    return names_for(attention_entry(attention), create_attention(attention, **arguments))
