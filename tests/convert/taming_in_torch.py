"""The networks of taming-transformers in PyTorch, for tokenizers_in_torch.py."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


def group_norm(channels, groups):
    """The group norm of both families (eps 1e-6, learned scale and shift)."""
    return nn.GroupNorm(groups, channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    """Two norm/SiLU/conv steps around a skip; 1x1 skip if the width changes."""

    def __init__(self, in_channels, out_channels, groups=32):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + h


class AttnBlock(nn.Module):
    """Single-head attention over all positions, with a skip."""

    def __init__(self, channels, groups=32):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))
        # scores[b, i, j]: how much position i looks at position j.
        scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(dim=-1), v)
        return x + self.proj_out(mixed.reshape(x.shape))


class Downsample(nn.Module):
    """Halve the size: one zero row below, one zero column right, stride 2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the size by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def run_level(x, blocks, attns):
    """Residual blocks of one level, each followed by its attention if any."""
    for i, block in enumerate(blocks):
        x = block(x)
        if len(attns):
            x = attns[i](x)
    return x


class Level(nn.Module):
    """One resolution of a taming encoder or decoder."""

    def __init__(self, in_channels, out_channels, count, attention, groups):
        super().__init__()
        widths = [in_channels] + [out_channels] * count
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, groups) for _ in range(count if attention else 0)
        )


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution (always attention)."""

    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """taming's encoder: images to z_channels feature maps.

    Attention goes by the configured `resolution`, not by the image's size.
    """

    def __init__(
        self,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        resolution,
        z_channels,
        in_channels=3,
        groups=32,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width, size = ch, resolution
        for i, mult in enumerate(ch_mult):
            level = Level(width, ch * mult, num_res_blocks, size in attn_resolutions, groups)
            width = ch * mult
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
                size //= 2
            self.down.append(level)
        self.mid = Middle(width, groups)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = run_level(x, level.block, level.attn)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """taming's decoder: z_channels feature maps to images.

    `up` is stored finest level first and run from its end to its start.
    Each level has one block more than the encoder's.
    """

    def __init__(
        self,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        resolution,
        z_channels,
        out_ch=3,
        groups=32,
    ):
        super().__init__()
        last = len(ch_mult) - 1
        width, size = ch * ch_mult[-1], resolution // 2**last
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, groups)
        coarsest_first = []
        for i in range(last, -1, -1):
            level = Level(
                width, ch * ch_mult[i], num_res_blocks + 1, size in attn_resolutions, groups
            )
            width = ch * ch_mult[i]
            if i > 0:
                level.upsample = Upsample(width)
                size *= 2
            coarsest_first.append(level)
        self.up = nn.ModuleList(coarsest_first[::-1])
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = run_level(x, level.block, level.attn)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))
