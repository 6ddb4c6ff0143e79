"""Opens sources by their kind."""

import importlib

from leon_jax.config import UserError
from leon_jax.data.sources.raw_record import ShardedSource, SourceConfig

# For each kind its class ("module:Class"), and the extra of leon_jax with its packages.
_KINDS = {
    "tfds": ("leon_jax.data.sources.tfds:Tfds", "data"),
    "webdataset": ("leon_jax.data.sources.webdataset:WebDataset", "data"),
    "parquet": ("leon_jax.data.sources.parquet:Parquet", "data"),
    "documents": ("leon_jax.data.sources.documents:Documents", "data"),
    "jsonl": ("leon_jax.data.sources.jsonl:Jsonl", "data"),
    "folder": ("leon_jax.data.sources.image_folder:ImageFolder", "data"),
    "huggingface": ("leon_jax.data.sources.huggingface:HuggingFace", "huggingface"),
}


def register(kind: str, target: str, extra: str) -> None:
    """Registers a kind of source for a dataset outside of this package.

    Args:
      kind: the value of `SourceConfig.kind`.
      target: "module:Class"; the class takes a `SourceConfig` and is a `ShardedSource`. The module
        is imported when a source of this kind is opened.
      extra: the extra of leon_jax that installs the packages of the module.

    Raises:
      ValueError: another class is registered for this kind.
    """
    if _KINDS.setdefault(kind, (target, extra)) != (target, extra):
        raise ValueError(f"the source kind {kind!r} is already registered as {_KINDS[kind][0]}")


def open_source(config: SourceConfig) -> ShardedSource:
    """Opens the source that a configuration describes.

    Raises:
      UserError: the kind is unknown, the path does not exist, or a package of the kind is not
        installed.
    """
    if config.kind not in _KINDS:
        raise UserError(f"kind is {config.kind!r}; it must be one of {', '.join(sorted(_KINDS))}")
    target, extra = _KINDS[config.kind]
    module, _, name = target.partition(":")
    try:
        # Import late: a source may need packages that are not installed.
        source = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"a source of kind {config.kind} needs the package {error.name}; "
            f"run: pip install 'leon_jax[{extra}]'"
        ) from error
    return source(config)
