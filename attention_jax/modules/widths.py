"""Widths of bottlenecks."""

from attention_jax import checks


def hidden_width(
    channels: int,
    *,
    reduction: int,
    hidden: int | None = None,
    divisor: int | None = None,
    minimum: int | None = None,
    guard: bool = False,
    prefix: str = '',
) -> int:
    """Width of a bottleneck: `hidden`, or `channels` divided by `reduction`.

    Args:
        channels: width to be reduced.
        reduction: divisor, rounded down (the papers' convention).
        hidden: the width itself; wins over everything else.
        divisor: rounds `channels / reduction` to the nearest multiple, at least one (timm).
        minimum: lower bound of the result.
        guard: with `divisor`, one more step up if rounding lost over 10 % (MobileNetV3, timm).
        prefix: of the two arguments' names in messages, e.g. 'value_'.

    Raises:
        ValueError: a width below 1, or `reduction` below 1.
    """
    if hidden is not None:
        checks.at_least(f'{prefix}hidden', hidden, 1)
        return hidden
    checks.at_least(f'{prefix}reduction', reduction, 1)
    if divisor is None:
        width = channels // reduction if minimum is None else max(channels // reduction, minimum)
        if width < 1:
            raise ValueError(
                f'{prefix}reduction {reduction} leaves no width for {channels} channels: '
                f'use a reduction of at most {channels}, or give {prefix}hidden'
            )
        return width
    checks.at_least('hidden_divisor', divisor, 1)
    exact = channels / reduction
    width = max(minimum or divisor, int(exact + divisor / 2) // divisor * divisor)
    return width + divisor if guard and width < 0.9 * exact else width
