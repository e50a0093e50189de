"""The table of networks in docs/networks.md: what each has and costs, and what others published."""

import re
from collections.abc import Callable, Iterator, Sequence

from attention_jax.analysis import markdown
from attention_jax.models.costs import costs
from attention_jax.models.registry import create_model, list_models, model_entry

PLACE = 'networks'  # of the table in its file
FRAMES = 8  # of the video that a network of videos is counted with

_COLUMNS = {
    'name': '---',
    'paper': '---',
    'parameters': '---:',
    'MACs': '---:',
    'matmul': '---:',
    'input': '---',
    'published accuracy (%)': '---',
}

_LEGEND = """\
Parameters: trainable ones, for 1000 classes unless the input says otherwise. MACs:
multiply-accumulates of convolutions and dense layers for one input of the size in pixels beside it,
without biases, norms, activations and pools. Matmul: those of products between two activations,
which are not among the MACs. Published accuracy: what the one in brackets claims ('authors': in
their repository or paper), top-1 on ImageNet-1k with one crop unless it says otherwise; none of
these numbers is ours."""


def table(
    names: Sequence[str] | None = None, progress: Callable[[str], None] = lambda name: None
) -> str:
    """Writes the table of networks in Markdown.

    Args:
        names: registry names; None is every network.
        progress: is told each name before its row is computed.

    Returns:
        See `markdown.table`.

    Raises:
        ValueError: a name is not registered.
    """

    def rows() -> Iterator[list[str]]:
        for name in list_models() if names is None else names:
            progress(name)
            yield row(name)

    return markdown.table(PLACE, _COLUMNS, rows(), _LEGEND)


def row(name: str) -> list[str]:
    """The cells of a network, in the order of the columns."""
    entry = model_entry(name)
    sides = (FRAMES,) * (entry.rank - 2) + tuple(entry.input_size)
    size = 'x'.join(map(str, sides))
    if entry.num_classes != 1000:
        size += f' ({entry.num_classes} classes)'
    counts = costs(create_model(name), (1, *sides, 3))
    claims = [f'{accuracy:.2f} ({whose})' for accuracy, whose in entry.published]
    return [
        f'`{name}`',
        re.sub(r'arXiv (\d+\.\d+)', r'[arXiv \1](https://arxiv.org/abs/\1)', entry.paper),
        f'{counts["parameters"]:,}',
        f'{counts["macs"]:,}',
        f'{counts["matmul"]:,}' if counts['matmul'] else '',
        size,
        ', '.join(claims),
    ]
