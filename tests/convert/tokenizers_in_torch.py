"""VQGAN tokenizers in PyTorch, as an independent reference; runs with the peers.

`VQModel` follows taming-transformers (plain, EMA and Gumbel codebooks; the first also covers latent
diffusion's VQ models). `LlamaGenVQ` follows LlamaGen's VQ-16 and VQ-8. Only what turns images into
codes and codes into images is here: no losses, no training.

`main` builds a model with random weights, saves it and returns its outputs.
"""

import json
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from taming_in_torch import (
    AttnBlock,
    Decoder,
    Downsample,
    Encoder,
    ResnetBlock,
    Upsample,
    group_norm,
    run_level,
)


def nearest(latents, table):
    """Index of the closest row of `table` for each position; first on ties.

    Distances are summed in float64, so the only float32 error in the codes is
    that of the latents.
    """
    points = latents.permute(0, 2, 3, 1).double()
    b, h, w, c = points.shape
    distances = torch.cdist(
        points.reshape(-1, c), table.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.argmin(dim=1).reshape(b, h, w)


def rows(table, codes):
    """Rows of `table` at `codes` [b, h, w], as a map [b, c, h, w]."""
    return table[codes].permute(0, 3, 1, 2).contiguous()


class PlainCodebook(nn.Module):
    """Codebook learned by gradient."""

    def __init__(self, n_embed, embed_dim):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def codes(self, latents):
        return nearest(latents, self.embedding.weight)

    def lookup(self, codes):
        return rows(self.embedding.weight, codes)


class MovingTable(nn.Module):
    """Table with the two running sums its moving average is made from."""

    def __init__(self, n_embed, embed_dim):
        super().__init__()
        table = torch.randn(n_embed, embed_dim)
        self.weight = nn.Parameter(table, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(n_embed), requires_grad=False)
        self.embed_avg = nn.Parameter(table.clone(), requires_grad=False)


class MovingCodebook(PlainCodebook):
    """Codebook learned by moving averages; read through its weight alone."""

    def __init__(self, n_embed, embed_dim):
        super().__init__(n_embed, embed_dim)
        self.embedding = MovingTable(n_embed, embed_dim)


class GumbelCodebook(nn.Module):
    """Codebook chosen by the largest logit (here without Gumbel noise)."""

    def __init__(self, n_embed, embed_dim, z_channels):
        super().__init__()
        if z_channels != embed_dim:
            raise ValueError(
                "kind 'gumbel' needs z_channels == embed_dim: quant_conv gives "
                f"embed_dim={embed_dim} channels, proj reads z_channels={z_channels}"
            )
        self.proj = nn.Conv2d(z_channels, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embed_dim)

    def codes(self, latents):
        logits = F.conv2d(latents.double(), self.proj.weight.double(), self.proj.bias.double())
        return logits.argmax(dim=1)

    def lookup(self, codes):
        return rows(self.embed.weight, codes)


class UnitCodebook(nn.Module):
    """LlamaGen's codebook: rows and latents are scaled to length one in use."""

    def __init__(self, n_embed, embed_dim, used_size=65536):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        self.register_buffer("codebook_used", torch.zeros(used_size))

    def table(self):
        return F.normalize(self.embedding.weight, dim=1)

    def codes(self, latents):
        return nearest(F.normalize(latents, dim=1), self.table())

    def lookup(self, codes):
        return rows(self.table(), codes)


class Tokenizer(nn.Module):
    """What both families share: images to codes and codes to images."""

    def latents(self, images):
        """Continuous maps [b, embed_dim, i, j], as quant_conv gives them."""
        return self.quant_conv(self.encoder(images))

    def encode(self, images):
        """Codes, int64 [b, i, j], of images [b, 3, h, w]."""
        return self.quantize.codes(self.latents(images))

    def decode(self, codes):
        """Images [b, 3, h, w] of codes [b, i, j]; not clipped."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(codes)))


class VQModel(Tokenizer):
    """taming's VQGAN; `kind` picks the codebook: "vq", "ema" or "gumbel".

    The defaults are the f16 model with 1024 codes.
    """

    def __init__(
        self,
        ch=128,
        ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        attn_resolutions=(16,),
        resolution=256,
        z_channels=256,
        embed_dim=256,
        n_embed=1024,
        kind="vq",
        groups=32,
        in_channels=3,
        out_ch=3,
    ):
        super().__init__()
        shape = (
            ch,
            tuple(ch_mult),
            num_res_blocks,
            tuple(attn_resolutions or ()),
            resolution,
            z_channels,
        )
        self.encoder = Encoder(*shape, in_channels=in_channels, groups=groups)
        self.decoder = Decoder(*shape, out_ch=out_ch, groups=groups)
        if kind == "vq":
            self.quantize = PlainCodebook(n_embed, embed_dim)
        elif kind == "ema":
            self.quantize = MovingCodebook(n_embed, embed_dim)
        elif kind == "gumbel":
            self.quantize = GumbelCodebook(n_embed, embed_dim, z_channels)
        else:
            raise ValueError(f"kind must be 'vq', 'ema' or 'gumbel', not {kind!r}")
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)


class ConvBlock(nn.Module):
    """One resolution of a LlamaGen encoder or decoder."""

    def __init__(self, in_channels, out_channels, count, attention, groups):
        super().__init__()
        self.res = nn.ModuleList()
        self.attn = nn.ModuleList()
        for j in range(count):
            self.res.append(ResnetBlock(out_channels if j else in_channels, out_channels, groups))
            if attention:
                self.attn.append(AttnBlock(out_channels, groups))


def llamagen_middle(channels, groups):
    """Block, attention, block, numbered 0, 1, 2."""
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, groups),
            AttnBlock(channels, groups),
            ResnetBlock(channels, channels, groups),
        ]
    )


class LlamaGenEncoder(nn.Module):
    """LlamaGen's encoder; attention at the last level, whatever its size."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, in_channels, groups):
        super().__init__()
        last = len(ch_mult) - 1
        widths = [ch] + [ch * mult for mult in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            block = ConvBlock(widths[i], widths[i + 1], num_res_blocks, i == last, groups)
            if i != last:
                block.downsample = Downsample(widths[i + 1])
            self.conv_blocks.append(block)
        self.mid = llamagen_middle(widths[-1], groups)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.conv_blocks:
            x = run_level(x, block.res, block.attn)
            if hasattr(block, "downsample"):
                x = block.downsample(x)
        for layer in self.mid:
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LlamaGenDecoder(nn.Module):
    """LlamaGen's decoder; conv_blocks run in order, coarsest level first."""

    def __init__(self, ch, ch_mult, num_res_blocks, z_channels, out_ch, groups):
        super().__init__()
        down = [ch * mult for mult in reversed(ch_mult)]
        widths = [down[0], *down]
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = llamagen_middle(widths[0], groups)
        self.conv_blocks = nn.ModuleList()
        for i in range(len(down)):
            block = ConvBlock(widths[i], widths[i + 1], num_res_blocks + 1, i == 0, groups)
            if i != len(down) - 1:
                block.upsample = Upsample(widths[i + 1])
            self.conv_blocks.append(block)
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], out_ch, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        for layer in self.mid:
            x = layer(x)
        for block in self.conv_blocks:
            x = run_level(x, block.res, block.attn)
            if hasattr(block, "upsample"):
                x = block.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class LlamaGenVQ(Tokenizer):
    """LlamaGen's VQ; the defaults are VQ-16, ch_mult (1, 2, 2, 4) is VQ-8."""

    def __init__(
        self,
        ch=128,
        ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        z_channels=256,
        embed_dim=8,
        n_embed=16384,
        groups=32,
        in_channels=3,
        out_ch=3,
        used_size=65536,
    ):
        super().__init__()
        shape = (ch, tuple(ch_mult), num_res_blocks, z_channels)
        self.encoder = LlamaGenEncoder(*shape, in_channels, groups)
        self.decoder = LlamaGenDecoder(*shape, out_ch, groups)
        self.quantize = UnitCodebook(n_embed, embed_dim, used_size)
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)


# Spread of a convolution's weights, times 1/sqrt(fan in), by the last part of
# its name. 1.6 undoes the shrinking by SiLU (or of pixels in [-1, 1]); second
# convolutions are weaker so that sums of many blocks stay moderate; queries
# and keys are stronger so that attention is far from a plain average.
GAINS = {
    "conv_in": 1.6,
    "conv1": 1.6,
    "conv2": 0.8,
    "conv_out": 1.6,
    "q": 1.5,
    "k": 1.5,
    "v": 1.0,
    "proj_out": 1.0,
}


def draw_weights(model, images, seed):
    """Fill every tensor of the model with random values.

    The codebook is drawn last, with the mean and spread of the latents of
    `images`, so that the images use many different codes.
    """
    rng = torch.Generator().manual_seed(seed)

    def normal(like, scale=1.0):
        return torch.randn(like.shape, generator=rng) * scale

    def uniform(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=rng)

    quantize = model.quantize
    unit = isinstance(quantize, UnitCodebook)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.GroupNorm):
                layer.weight.copy_(uniform(layer.weight, 0.5, 1.5))
                layer.bias.copy_(normal(layer.bias, 0.3))
            elif isinstance(layer, nn.Conv2d):
                gain = GAINS.get(name.split(".")[-1], 1.0)
                if name == "decoder.conv_in":
                    gain = 1.0
                if name == "post_quant_conv" and unit:
                    gain = math.sqrt(layer.in_channels)  # fed vectors of length one
                fan_in = layer.weight[0].numel()
                layer.weight.copy_(normal(layer.weight, gain / math.sqrt(fan_in)))
                layer.bias.copy_(normal(layer.bias, 0.2))

        latents = model.latents(images)
        mean = latents.mean(dim=(0, 2, 3))
        spread = latents.std(dim=(0, 2, 3), unbiased=False) + 1e-3
        if isinstance(quantize, GumbelCodebook):
            # Logits of centred latents, so that no code wins everywhere.
            weight = normal(quantize.proj.weight[:, :, 0, 0]) / spread / math.sqrt(len(spread))
            quantize.proj.weight.copy_(weight[:, :, None, None])
            quantize.proj.bias.copy_(normal(quantize.proj.bias, 0.2) - weight @ mean)
            quantize.embed.weight.copy_(normal(quantize.embed.weight))
            return
        table = quantize.embedding.weight
        drawn = mean + spread * normal(table)
        if unit:
            # Rows of many lengths: only their directions may matter.
            drawn = F.normalize(drawn, dim=1) * uniform(table[:, :1], 0.3, 2.0)
            used = quantize.codebook_used
            used.copy_(torch.randint(len(table), used.shape, generator=rng).float())
        table.copy_(drawn)
        if isinstance(quantize, MovingCodebook):
            # Not the sums that would give the weight: they must not be read.
            sizes, sums = quantize.embedding.cluster_size, quantize.embedding.embed_avg
            sizes.copy_(uniform(sizes, 0.5, 20.0))
            sums.copy_(normal(sums))


FAMILIES = {"taming": VQModel, "llamagen": LlamaGenVQ}


def build(spec):
    """Model of a spec: its constructor options sit beside the other keys, or
    in an object under "options".
    """
    options = {
        k: v for k, v in spec.items() if k not in ("family", "seed", "file", "envelope", "options")
    }
    options.update(spec.get("options") or {})
    return FAMILIES[spec["family"]](**options).eval()


def main(arrays):
    """Build, save and run one random model.

    `arrays["kind"]` holds the bytes of a JSON object with "family" ("taming"
    or "llamagen"), "seed", "file" (where the weights go), "envelope" (the key
    the weights are saved under, or null for none) and the constructor's
    options. `arrays["images"]` is float32 [b, 3, h, w] in [-1, 1].

    Returns "codes" int64 [b, i, j], "decoded" float32 [b, h, w, 3] and
    "latents" float32 [b, i, j, embed_dim].
    """
    spec = json.loads(np.asarray(arrays["kind"], dtype=np.uint8).tobytes())
    images = torch.from_numpy(np.array(arrays["images"], dtype=np.float32))
    model = build(spec)
    draw_weights(model, images, int(spec["seed"]))

    weights = model.state_dict()
    envelope = spec.get("envelope")
    torch.save(weights if envelope is None else {envelope: weights}, spec["file"])

    with torch.no_grad():
        latents = model.latents(images)
        codes = model.quantize.codes(latents)
        decoded = model.decode(codes)

    def channels_last(x):
        return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())

    return {
        "codes": codes.numpy(),
        "decoded": channels_last(decoded),
        "latents": channels_last(latents),
    }
