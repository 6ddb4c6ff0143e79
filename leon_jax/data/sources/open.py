"""One source from its configuration."""

import importlib

from leon_jax.config import UserError
from leon_jax.data.sources.raw import Shards, SourceConfig

# Of each kind: its class in the file called like it, and the extra that its packages come with.
_KINDS = {
    "emoji": ("Emoji", "demo"),
    "tfds": ("Tfds", "data"),
    "webdataset": ("WebDataset", "data"),
    "parquet": ("Parquet", "data"),
    "jsonl": ("Jsonl", "data"),
    "huggingface": ("HuggingFace", "huggingface"),
}


def open_source(config: SourceConfig) -> Shards:
    """The source that a configuration describes.

    Raises:
      UserError: there is nothing at its path, or a package for its kind is not installed.
    """
    name, extra = _KINDS[config.kind]
    try:
        # Imported only here: most sources need packages that most programs do not.
        module = importlib.import_module(f"leon_jax.data.sources.{config.kind}")
    except ImportError as error:
        raise UserError(
            f"a source of kind {config.kind} needs the package {error.name}; "
            f"run: pip install 'leon_jax[{extra}]'"
        ) from error
    return getattr(module, name)(config)
