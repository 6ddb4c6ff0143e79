"""Converts published VQ-GANs to image tokenizers and back."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np
import yaml
from flax import nnx

from leon_jax import weight_files
from leon_jax.config import UserError
from leon_jax.convert import tensor_map, vqgan_names
from leon_jax.models.vqgan import VQGAN, VQGANConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of published image tokenizers.

    Attributes:
      title: what it is, for the terminal.
      licence: SPDX expression or name of the licence of its released weights.
      names: returns the names of its tensors, by the number of levels.
      former: returns the name of taming for a name of the family, by the number of levels.
      unit_codes: see `VQGANConfig`.
      envelope: the key of the tensors in its files of PyTorch.
    """

    title: str
    licence: str
    names: Callable[[int], vqgan_names.Rename]
    former: Callable[[str, int], str]
    unit_codes: bool
    envelope: str


FAMILIES = {
    "taming": Family(
        "a VQ-GAN of taming-transformers or latent diffusion", "MIT", vqgan_names.taming,
        lambda name, levels: name, False, "state_dict",
    ),
    "llamagen": Family(
        "an image tokenizer of LlamaGen", "MIT", vqgan_names.llamagen, vqgan_names.from_llamagen,
        True, "model",
    ),
}  # fmt: skip

# Tensors that only training needs, by the start of their names.
_DROPPED = {
    "loss.": "the discriminator and the perceptual network",
    "quantize.embedding.cluster_size": "a statistic of the codebook's training",
    "quantize.embedding.embed_avg": "a statistic of the codebook's training",
    "quantize.codebook_used": "a statistic of the codebook's training",
    "model_ema.": "averaged weights; the other ones are converted",
    "colorize": "colours of a plot",
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """An image tokenizer in our layout.

    Attributes:
      config: its configuration.
      arrays: its arrays by name.
      used: the tensors that were converted, by their names in the checkpoint.
      dropped: names of the other tensors, and why they were dropped.
    """

    config: VQGANConfig
    arrays: Mapping[str, np.ndarray]
    used: Mapping[str, np.ndarray]
    dropped: Mapping[str, str]


def read(
    family: Family, tensors: Mapping[str, np.ndarray], config: pathlib.Path | None, resolution: int
) -> Converted:
    """Converts the tensors of a checkpoint.

    Args:
      family: the family.
      tensors: the tensors by name.
      config: the YAML file of taming or latent diffusion that describes the network; None: the
        shapes describe it.
      resolution: side of the images, if `config` is None.

    Raises:
      UserError: tensors are missing, unknown, misshaped or not finite; or the file says something
        else than the tensors.
    """
    dropped = {
        name: reason
        for name in tensors
        for start, reason in _DROPPED.items()
        if name.startswith(start)
    }
    used = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    levels = 1 + max(
        (int(match[1]) for match in map(_LEVEL.match, used) if match is not None), default=0
    )
    renamed = {family.former(name, levels): name for name in used}
    by_former = {former: used[name] for former, name in renamed.items()}
    described = None if config is None else _described(config)
    if described is not None:
        resolution = described["resolution"]
    network = vqgan_names.read_config(by_former, resolution, family.unit_codes)
    if described is not None:
        _compare(network, described, config)
    entries = vqgan_names.entries(network, family.names(len(network.multipliers)))
    arrays = tensor_map.to_ours(entries, used, _shapes(network))
    return Converted(network, arrays, used, dropped)


def write(
    family: Family, config: VQGANConfig, arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the tensors of an image tokenizer under the names of a family.

    Raises:
      UserError: the family has no such network.
    """
    ours = {
        "halo": (config.halo, None),
        "pixel_patch": (config.pixel_patch, 1),
        "groups": (config.groups, vqgan_names.GROUPS),
        "unit_codes": (config.unit_codes, family.unit_codes),
    }
    for key, (value, needed) in ours.items():
        if value != needed:
            raise UserError(
                f"{family.title} has no network with {key} {value}; it must be {needed}"
            )
    entries = vqgan_names.entries(config, family.names(len(config.multipliers)))
    return tensor_map.to_theirs(entries, arrays)


def describe(config: VQGANConfig) -> str:
    """Returns the YAML file of taming for a configuration."""
    values = {
        "embed_dim": config.code_dim,
        "n_embed": config.codes,
        "ddconfig": {
            "double_z": False,
            "z_channels": config.latent,
            "resolution": config.resolution,
            "in_channels": 3,
            "out_ch": 3,
            "ch": config.channels,
            "ch_mult": list(config.multipliers),
            "num_res_blocks": config.blocks,
            "attn_resolutions": list(config.attention_sizes),
            "dropout": 0.0,
        },
    }
    kind = "GumbelVQ" if config.code_logits else "VQModel"
    return yaml.safe_dump(
        {"model": {"target": f"taming.models.vqgan.{kind}", "params": values}}, sort_keys=False
    )


_LEVEL = re.compile(r"encoder\.(?:down|conv_blocks)\.(\d+)\.")


def _shapes(config: VQGANConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's arrays by name."""
    abstract = jax.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0)))
    return {name: leaf.shape for name, leaf in weight_files.flatten(abstract).items()}


def _described(path: pathlib.Path) -> dict:
    """Returns the network that a YAML file describes, with the keys of taming.

    Raises:
      UserError: the file is missing or damaged, or describes no VQ-GAN.
    """
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        network = {**params["ddconfig"], "embed_dim": params["embed_dim"]}
        network["n_embed"] = params["n_embed"]
        _ = network["resolution"], network["ch"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} describes no VQ-GAN of taming: {error}") from error
    return network


def _compare(config: VQGANConfig, described: dict, path: pathlib.Path | None) -> None:
    """Checks that a file describes the network of the tensors.

    Raises:
      UserError: it says something else; the message names the key.
    """
    actual = {
        "double_z": False,
        "z_channels": config.latent,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.channels,
        "ch_mult": list(config.multipliers),
        "num_res_blocks": config.blocks,
        "attn_resolutions": sorted(config.attention_sizes),
        "embed_dim": config.code_dim,
        "n_embed": config.codes,
    }
    for key, value in actual.items():
        stated = described.get(key, value)
        if key == "attn_resolutions":  # sides that no level has are without effect
            sides = [config.resolution >> level for level in range(len(config.multipliers))]
            stated = sorted(set(stated) & set(sides))
        if stated != value:
            raise UserError(f"{path} says {key}: {stated}, but the tensors have {value}")
