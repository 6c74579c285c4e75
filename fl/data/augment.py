"""Random flips and crops of training images, by a generator of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("none", "flip_crop")
PADDING = 4  # pixels on each side, the usual recipe for 32 x 32 images


def flip_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability 1/2, padded by 4 zeros on each side, and cut back to its size at random.

    x: [N, C, H, W].
    """
    count, _, height, width = x.shape
    flips = torch.rand(count, generator=generator) < 0.5
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    down, right = torch.randint(2 * PADDING + 1, (2, count), generator=generator)
    padded = F.pad(x, [PADDING] * 4)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    image = torch.arange(count)[:, None, None, None]
    channel = torch.arange(x.shape[1])[None, :, None, None]
    return padded[image, channel, rows, columns]
