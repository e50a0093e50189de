"""YOLOv4-tiny and its loss in PyTorch, written as bubbliiiing/yolov4-tiny-pytorch computes them.

Only for the comparison in `networks.py`. Targets are dense and made by a loop over the boxes on the
host, as there; `tests/parity/yolo_test.py` holds the loss and its gradients beside the authors'.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

BALANCE = {32: 0.4, 16: 1.0}


def conv(inputs: int, outputs: int, window: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, window, stride, window // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1),
    )


class Stage(nn.Module):
    """A cross stage partial block; gives the map before and after the pool."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.first, self.last = conv(width, width, 3), conv(width, width, 1)
        self.inner, self.inner2 = conv(half, half, 3), conv(half, half, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the fused half and the pooled whole."""
        route = self.first(x)
        one = self.inner(route.chunk(2, 1)[1])
        fused = self.last(torch.cat([self.inner2(one), one], 1))
        return fused, functional.max_pool2d(torch.cat([route, fused], 1), 2)


class YOLOv4Tiny(nn.Module):
    """The network without attention."""

    def __init__(self, num_classes: int):
        super().__init__()
        outputs = 3 * (5 + num_classes)
        self.stem = nn.Sequential(conv(3, 32, 3, 2), conv(32, 64, 3, 2))
        self.stages = nn.ModuleList([Stage(64), Stage(128), Stage(256)])
        self.top = conv(512, 512, 3)
        self.neck = conv(512, 256, 1)
        self.coarse = nn.Sequential(conv(256, 512, 3), nn.Conv2d(512, outputs, 1))
        self.up = conv(256, 128, 1)
        self.fine = nn.Sequential(conv(384, 256, 3), nn.Conv2d(256, outputs, 1))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Returns the outputs at strides 32 and 16."""
        x = self.stem(x)
        for stage in self.stages:
            middle, x = stage(x)
        p = self.neck(self.top(x))
        up = functional.interpolate(self.up(p), scale_factor=2, mode='nearest')
        return [self.coarse(p), self.fine(torch.cat([up, middle], 1))]


def loss(
    outputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    *,
    image_size: tuple[int, int],
    anchors: Sequence[tuple[float, float]],
    masks: Sequence[Sequence[int]],
) -> torch.Tensor:
    """The loss of outputs `[b, 3 (5 + k), h, w]`; targets are [m, 5] an image: box, class."""
    scales = zip(outputs, masks, (32, 16), strict=True)
    return sum(_scale(o, targets, image_size, anchors, m, s) for o, m, s in scales)


def _scale(output, targets, image_size, anchors, mask, stride):
    b, _, h, w = output.shape
    output = output.view(b, len(mask), -1, h, w).permute(0, 1, 3, 4, 2)
    k = output.shape[-1] - 5
    scaled = output.new_tensor(anchors) / stride
    shape = scaled[list(mask)].view(1, -1, 1, 1, 2)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    cells = torch.stack([columns, rows], -1).to(output.dtype)
    boxes = torch.cat([output[..., :2].sigmoid() + cells, output[..., 2:4].exp() * shape], -1)

    wanted = output.new_zeros(b, len(mask), h, w, 5 + k)
    ignored = torch.zeros(b, len(mask), h, w, dtype=torch.bool)
    served = sorted({number for numbers in ((3, 4, 5), (1, 2, 3)) for number in numbers})
    for n, rows_of_image in enumerate(targets):
        if not len(rows_of_image):
            continue
        true = rows_of_image[:, :4] * output.new_tensor([w, h, w, h])
        centred = torch.cat([torch.zeros_like(true[:, 2:]), true[:, 2:]], -1)
        sizes = torch.cat([torch.zeros_like(scaled), scaled], -1)[served]
        best = _iou(centred[:, None], sizes[None]).argmax(1)
        for box, label, number in zip(true, rows_of_image[:, 4].long(), best, strict=True):
            if served[number] not in mask:
                continue
            place = n, mask.index(served[number]), int(box[1]), int(box[0])
            wanted[place][:4] = box
            wanted[place][4] = 1
            wanted[place][5 + label] = 1
        overlap = _iou(true[:, None], boxes[n].detach().view(1, -1, 4)).amax(0)
        ignored[n] = (overlap > 0.5).view(len(mask), h, w)

    answers = wanted[..., 4] > 0
    total = output.new_zeros(())
    if answers.any():
        box = (1 - _ciou(boxes[answers], wanted[answers][:, :4])).mean()
        kind = _entropy(output[answers][:, 5:].sigmoid(), wanted[answers][:, 5:]).mean()
        total = 0.05 * box + k / 80 * kind
    counted = answers | ~ignored
    thing = _entropy(output[..., 4].sigmoid(), wanted[..., 4])[counted].mean()
    size = image_size[0] * image_size[1] / 416**2
    return total + BALANCE[stride] * 5 * size * thing


def _entropy(probability, wanted):
    p = probability.clamp(1e-7, 1 - 1e-7)
    return -wanted * p.log() - (1 - wanted) * (1 - p).log()


def _corners(x):
    return x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2


def _iou(a, b):
    (low, high), (low_b, high_b) = _corners(a), _corners(b)
    inside = (torch.minimum(high, high_b) - torch.maximum(low, low_b)).clamp(min=0).prod(-1)
    return inside / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inside).clamp(min=1e-6)


def _ciou(a, b):
    (low, high), (low_b, high_b) = _corners(a), _corners(b)
    iou = _iou(a, b)
    distance = ((a[..., :2] - b[..., :2]) ** 2).sum(-1)
    around = (torch.maximum(high, high_b) - torch.minimum(low, low_b)).clamp(min=0)
    diagonal = (around**2).sum(-1).clamp(min=1e-6)
    angles = [torch.atan(x[..., 2] / x[..., 3].clamp(min=1e-6)) for x in (a, b)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    return iou - distance / diagonal - v / (1 - iou + v).clamp(min=1e-6) * v
