"""Names of the VQ-GAN's tensors in published checkpoints.

taming-transformers (arXiv 2012.09841), latent diffusion (arXiv 2112.10752) and Chameleon
(arXiv 2405.09818) share one layout. Those of LlamaGen (arXiv 2406.06525) and Janus
(arXiv 2501.17811) have the same tensors under other names.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from leon_jax.config import UserError
from leon_jax.convert.tensor_map import CONVOLUTION, Entry
from leon_jax.models.vqgan import VQGANConfig

# A rename maps a name of taming to that of another family.
Rename = Callable[[str], str]
GROUPS = 32  # of the group normalisation in all families


def entries(config: VQGANConfig, rename: Rename, has_decoder: bool = True) -> list[Entry]:
    """Returns the map of a VQ-GAN.

    Args:
      config: a configuration without halo.
      rename: the names of the family.
      has_decoder: whether the checkpoint has the decoder.
    """
    named = [*_encoder(config), ("to_code", "quant_conv"), ("from_code", "post_quant_conv")]
    if has_decoder:
        named += _decoder(config)
    if config.code_logits:
        result = [
            Entry("codebook", (rename("quantize.embed.weight"),)),
            Entry("logits.kernel", (rename("quantize.proj.weight"),), CONVOLUTION),
            Entry("logits.bias", (rename("quantize.proj.bias"),)),
        ]
    else:
        result = [Entry("codebook", (rename("quantize.embedding.weight"),))]
    for ours, theirs in named:
        result += _module(ours, theirs, config, rename)
    return result


def taming(levels: int) -> Rename:
    """Returns the names of taming-transformers."""
    del levels
    return lambda name: name


def llamagen(levels: int) -> Rename:
    """Returns the names of LlamaGen, whose decoder begins with the coarsest level."""
    mid = {"block_1": "0", "attn_1": "1", "block_2": "2"}

    def rename(name: str) -> str:
        name = re.sub(r"\.down\.(\d+)\.", r".conv_blocks.\1.", name)
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".conv_blocks.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
        return re.sub(r"\.mid\.(\w+)\.", lambda m: f".mid.{mid[m[1]]}.", name)

    return rename


def from_llamagen(name: str, levels: int) -> str:
    """Returns the name of taming of a tensor of LlamaGen."""
    mid = ("block_1", "attn_1", "block_2")
    name = re.sub(r"\.mid\.(\d)\.", lambda m: f".mid.{mid[int(m[1])]}.", name)
    name = re.sub(r"(conv_blocks\.\d+)\.res\.", r"\1.block.", name)
    name = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", name)
    return re.sub(
        r"^decoder\.conv_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name
    )


def read_config(
    tensors: Mapping[str, np.ndarray], resolution: int, unit_codes: bool = False
) -> VQGANConfig:
    """Returns the configuration that the names and shapes of tensors imply.

    Args:
      tensors: the tensors under the names of taming.
      resolution: side of the images that the model was trained with, in pixels.
      unit_codes: see `VQGANConfig`.

    Raises:
      UserError: a tensor is missing, or the network has another form.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"the checkpoint lacks {name}; it has no VQ-GAN of this format")
        return tensors[name].shape

    width, colours = shape("encoder.conv_in.weight")[:2]
    if colours != 3:
        raise UserError(f"the model takes images with {colours} channels; only RGB is supported")
    levels = 1 + max(_numbers(tensors, r"encoder\.down\.(\d+)\."), default=0)
    multipliers = []
    for level in range(levels):
        channels = shape(f"encoder.down.{level}.block.0.conv1.weight")[0]
        if channels % width:
            raise UserError(
                f"encoder.down.{level} has {channels} channels, which is no multiple of {width}"
            )
        multipliers.append(channels // width)
    blocks = 1 + max(_numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\."), default=0)
    attention = _numbers(tensors, r"encoder\.down\.(\d+)\.attn\.")
    code_logits = "quantize.proj.weight" in tensors
    codes, code_dim = shape(f"quantize.{'embed' if code_logits else 'embedding'}.weight")
    return VQGANConfig(
        resolution=resolution,
        channels=width,
        multipliers=tuple(multipliers),
        blocks=blocks,
        attention_sizes=tuple(sorted(resolution >> level for level in attention)),
        groups=GROUPS,
        latent=shape("encoder.conv_out.weight")[0],
        code_dim=code_dim,
        codes=codes,
        unit_codes=unit_codes,
        code_logits=code_logits,
    )


def _numbers(names: Mapping[str, object], pattern: str) -> set[int]:
    """Returns the numbers that a pattern finds at the start of names."""
    matches = (re.match(pattern, name) for name in names)
    return {int(match[1]) for match in matches if match}


def _encoder(config: VQGANConfig) -> Iterator[tuple[str, str]]:
    """Yields (our module, module of taming), in the order of `vqgan.Encoder.layers`."""
    names, size = ["conv_in"], config.resolution
    for level in range(len(config.multipliers)):
        if level:
            names.append(f"down.{level - 1}.downsample.conv")
            size //= 2
        for block in range(config.blocks):
            names.append(f"down.{level}.block.{block}")
            if size in config.attention_sizes:
                names.append(f"down.{level}.attn.{block}")
    return _numbered("encoder", [*names, "mid.block_1", "mid.attn_1", "mid.block_2"])


def _decoder(config: VQGANConfig) -> Iterator[tuple[str, str]]:
    """Yields (our module, module of taming), in the order of `vqgan.Decoder.layers`."""
    names, size = ["conv_in", "mid.block_1", "mid.attn_1", "mid.block_2"], config.grid
    last = len(config.multipliers) - 1
    for level in range(last, -1, -1):
        if level < last:
            names.append(f"up.{level + 1}.upsample.conv")
            size *= 2
        for block in range(config.blocks + 1):
            names.append(f"up.{level}.block.{block}")
            if size in config.attention_sizes:
                names.append(f"up.{level}.attn.{block}")
    return _numbered("decoder", names)


def _numbered(half: str, names: list[str]) -> Iterator[tuple[str, str]]:
    for number, name in enumerate(names):
        suffix = ".conv" if name.endswith("upsample.conv") else ""
        yield f"{half}.layers.{number}{suffix}", f"{half}.{name}"
    yield f"{half}.norm", f"{half}.norm_out"
    yield f"{half}.out", f"{half}.conv_out"


def _module(ours: str, theirs: str, config: VQGANConfig, rename: Rename) -> Iterator[Entry]:
    """Yields the entries of one module."""

    def conv(part: str, *their_parts: str) -> Iterator[Entry]:
        yield Entry(
            f"{ours}{part}.kernel",
            tuple(rename(f"{theirs}{their}.weight") for their in their_parts),
            CONVOLUTION,
        )
        biases = tuple(rename(f"{theirs}{their}.bias") for their in their_parts)
        yield Entry(f"{ours}{part}.bias", biases)

    def norm(part: str, their: str) -> Iterator[Entry]:
        yield Entry(f"{ours}{part}.scale", (rename(f"{theirs}{their}.weight"),))
        yield Entry(f"{ours}{part}.shift", (rename(f"{theirs}{their}.bias"),))

    last = theirs.split(".")[-1]
    if ".attn" in theirs:
        yield from norm(".norm", ".norm")
        yield from conv(".qkv", ".q", ".k", ".v")
        yield from conv(".out", ".proj_out")
    elif ".block" in theirs:
        for number in "12":
            yield from norm(f".norm{number}", f".norm{number}")
            yield from conv(f".conv{number}", f".conv{number}")
        if _changes_width(theirs, config):
            yield from conv(".skip", ".nin_shortcut")
    elif last == "norm_out":
        yield from norm("", "")
    else:
        yield from conv("", "")


def _changes_width(block: str, config: VQGANConfig) -> bool:
    """Returns whether a residual block of taming has another width than its input."""
    half, *parts = block.split(".")
    if parts[0] == "mid" or int(parts[-1]):
        return False
    level, multipliers = int(parts[1]), config.multipliers
    if half == "encoder":
        return multipliers[level] != (multipliers[level - 1] if level else 1)
    before = multipliers[min(level + 1, len(multipliers) - 1)]
    return multipliers[level] != before
