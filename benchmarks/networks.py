"""Training steps of networks on a CPU: what they take to compile, and their time beside PyTorch's.

    python benchmarks/networks.py compile resnet50 resnest50 --json FILE
    python benchmarks/networks.py step --json FILE           (needs the extra `parity`)

`compile` traces and compiles the step at two images of 224 x 224 (or the network's own size, if
smaller). `step` times it and PyTorch's step of the same network, alternating in one process, on an
idle machine: float32, channels last, SGD with momentum and weight decay, random images.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from attention_jax.analysis import benchmark
from attention_jax.models.registry import model_entry
from attention_jax.tasks.task import task_entry
from attention_jax.training import sharding
from attention_jax.training.program import Program, make_program
from configs import datasets, yolov4_tiny

# Network, images a batch and their size, as the tables in the README and docs have them.
STEPS = (
    ('resnet50', 8, 224),
    ('se_resnet50', 8, 224),
    ('gc_resnet50_r16', 8, 224),
    ('resnest50', 8, 224),
    ('cifar_resnet20', 128, 32),
    ('yolov4_tiny_voc_phi0', 4, 416),
)
BOXES = 20  # an image, of detection
# Name of a network -> timm's of what PyTorch is timed with.
TIMM = {
    'resnet50': 'resnet50',
    'se_resnet50': 'seresnet50',
    'gc_resnet50_r16': 'resnet50',
    'resnest50': 'resnest50d',
    'mobilenetv2_100': 'mobilenetv2_100',
    'resnext50_32x4d': 'resnext50_32x4d',
    'cbam_resnet18': 'resnet18',
}
COMPILES = (
    'resnet50', 'resnet152', 'resnext50_32x4d', 'resnext101_64x4d', 'seresnet50', 'senet154',
    'eca_resnet50', 'cbam_resnet50', 'bam_resnet50', 'gc_resnet50_r16', 'gcresnet50t',
    'triplet_resnet50', 'nl_resnet50_5', 'a2_resnet50_5_d2', 'cgnl_resnet50_1',
    'gsop_net1_resnet50', 'gsop_net2_resnet50', 'sknet50', 'skresnet18', 'resnest50',
    'resnest50_fast_4s2x40d', 'resnest269', 'mobilenetv2', 'eca_mobilenetv2', 'cifar_resnet110',
)  # fmt: skip


def detects(name: str) -> bool:
    """Whether a network finds boxes."""
    return model_entry(name).task == 'detection'


def random_boxes(batch: int) -> np.ndarray:
    """Boxes of random places and sizes, and classes, `[b, BOXES, 5]`."""
    random = np.random.default_rng(1)
    centers = random.uniform(0.1, 0.9, (batch, BOXES, 2))
    sides = np.exp(random.uniform(np.log(0.05), np.log(0.8), (batch, BOXES, 2)))
    classes = random.integers(0, 20, (batch, BOXES, 1))
    return np.concatenate([centers, sides, classes], -1).astype(np.float32)


def build(name: str, batch: int, size: int) -> Program:
    """The training step of a network, on one device."""
    entry = model_entry(name)
    config = yolov4_tiny.get_config('voc') if detects(name) else datasets.get_config('imagenet2012')
    config.model.name = name
    config.train.batch_size = batch
    description = task_entry(entry.task).description('random', (size, size, 3), entry.num_classes)
    return make_program(config, description, sharding.make_mesh(1, 1, jax.devices()[:1]))


def measure_compile(name: str) -> dict[str, Any]:
    """Seconds to trace and to compile one network's training step."""
    size = min(224, max(model_entry(name).input_size))
    program = build(name, 2, size)
    started = time.perf_counter()
    lowered = program.train_step.lower(program.state, program.batch)
    traced = time.perf_counter()
    lowered.compile()
    compiled = time.perf_counter()
    return {
        'name': name,
        'size': size,
        'trace_seconds': round(traced - started, 1),
        'compile_seconds': round(compiled - traced, 1),
    }


def first(name: str, batch: int, size: int) -> tuple[Any, dict[str, jax.Array]]:
    """A network's first state, and a batch of random images for its training step."""
    program = build(name, batch, size)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, program.batch['image'].shape, np.uint8)
    data = {'image': jnp.asarray(images)}
    if detects(name):
        shape = program.batch['boxes'].shape
        found = random_boxes(batch)
        boxes, classes = np.zeros(shape, np.float32), np.full(shape[:2], -1, np.int32)
        boxes[:, :BOXES], classes[:, :BOXES] = found[..., :4], found[..., 4]
        data |= {'boxes': jnp.asarray(boxes), 'classes': jnp.asarray(classes)}
    else:
        data['label'] = jnp.asarray(random.integers(0, 10, (batch,)).astype(np.int32))
    return jax.jit(program.init)(jax.random.key(0)), data


def ours(name: str, batch: int, size: int) -> Callable[[], None]:
    """A function that takes one training step and waits for it."""
    state, data = first(name, batch, size)
    compiled = build(name, batch, size).train_step.lower(state, data).compile()
    kept = [state]

    def run() -> None:
        kept[0], measured = compiled(kept[0], data)
        jax.block_until_ready((kept[0].params, measured))

    return run


def theirs(name: str, batch: int, size: int) -> Callable[[], None]:
    """PyTorch's training step of the same network."""
    if detects(name):
        return their_detection(batch, size)
    forms = benchmark.load_forms()
    forms.timm_layers()
    import timm
    import torch

    own = name == 'cifar_resnet20'
    model = cifar_resnet20(torch) if own else timm.create_model(TIMM[name])
    if name == 'gc_resnet50_r16':
        for stage in (model.layer2, model.layer3, model.layer4):
            for block in stage:
                block.se = forms.GlobalContext(block.bn3.num_features)
    if name == 'cbam_resnet18':
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in stage:
                block.se = forms.CBAM(block.bn2.num_features)
    model = model.to(memory_format=torch.channels_last).train()
    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return run


def their_detection(batch: int, size: int) -> Callable[[], None]:
    """PyTorch's training step of YOLOv4-tiny."""
    import torch
    import torch_yolo

    from attention_jax.models import yolo

    model = torch_yolo.YOLOv4Tiny(20).to(memory_format=torch.channels_last).train()
    x = torch.rand(batch, 3, size, size).to(memory_format=torch.channels_last)
    targets = list(torch.from_numpy(random_boxes(batch)))
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{'params': kernels, 'weight_decay': 5e-4}, {'params': others, 'weight_decay': 0}]
    optimizer = torch.optim.SGD(groups, lr=2.5e-3, momentum=0.937, nesterov=True)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        torch_yolo.loss(
            model(x), targets, image_size=(size, size), anchors=yolo.ANCHORS, masks=yolo.MASKS
        ).backward()
        optimizer.step()

    return run


def cifar_resnet20(torch: Any) -> Any:
    """ResNet-20 with parameter-free shortcuts, in PyTorch."""
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            self.stride, self.new = stride, (width - inputs) // 2

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            if self.stride > 1:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new, self.new))
            return functional.relu(x + y)

    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, 2 if a != b else 1) for a, b in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *blocks, *head)


def measure_step(name: str, batch: int, size: int, repeats: int) -> dict[str, Any]:
    """Seconds a training step, ours and PyTorch's in turn."""
    sides = {'ours': ours(name, batch, size), 'torch': theirs(name, batch, size)}
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for run in sides.values():
        run()
    for _ in range(repeats):
        for side, run in sides.items():
            run()  # the caches and threads as this side leaves them
            started = time.perf_counter()
            run()
            samples[side].append(time.perf_counter() - started)
    medians = {side: statistics.median(times) for side, times in samples.items()}
    return {
        'name': name,
        'batch': batch,
        'size': size,
        'repeats': repeats,
        'samples': samples,
        'medians': medians,
        'ratio': medians['ours'] / medians['torch'],
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=('compile', 'step'))
    parser.add_argument('names', nargs='*', help='networks; none: those of the tables')
    parser.add_argument('--repeats', type=int, default=10, metavar='N')
    parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
    options = parser.parse_args()
    report = {'environment': benchmark.environment(), 'rows': []}
    if options.what == 'compile':
        rows = (measure_compile(name) for name in options.names or COMPILES)
    else:
        chosen = [s for s in STEPS if not options.names or s[0] in options.names]
        rows = (measure_step(*step, options.repeats) for step in chosen)
    for row in rows:
        print({key: value for key, value in row.items() if key != 'samples'}, flush=True)
        report['rows'].append(row)
        if options.json:
            options.json.write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    main()
