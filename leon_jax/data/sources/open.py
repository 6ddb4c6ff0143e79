"""One source from its configuration."""

import importlib

from leon_jax.config import UserError
from leon_jax.data.sources.raw_record import Shards, SourceConfig

# Of each kind: where its class is ("module:Class"), and the extra that its packages come with.
_KINDS = {
    "tfds": ("leon_jax.data.sources.tfds:Tfds", "data"),
    "webdataset": ("leon_jax.data.sources.webdataset:WebDataset", "data"),
    "parquet": ("leon_jax.data.sources.parquet:Parquet", "data"),
    "jsonl": ("leon_jax.data.sources.jsonl:Jsonl", "data"),
    "huggingface": ("leon_jax.data.sources.huggingface:HuggingFace", "huggingface"),
}


def register(kind: str, target: str, extra: str) -> None:
    """Adds a kind of source, for a data set that is not part of this package.

    Args:
      kind: what `SourceConfig.kind` calls it.
      target: "module:Class"; the class is made of a `SourceConfig` and is a `Shards`. The module is
        imported when a source of this kind is opened.
      extra: the extra of leon_jax that brings the packages the module imports.

    Raises:
      ValueError: another class has this kind.
    """
    if _KINDS.setdefault(kind, (target, extra)) != (target, extra):
        raise ValueError(f"the source kind {kind!r} is {_KINDS[kind][0]} already")


def open_source(config: SourceConfig) -> Shards:
    """The source that a configuration describes.

    Raises:
      UserError: its kind is unknown, there is nothing at its path, or a package for its kind is not
        installed.
    """
    if config.kind not in _KINDS:
        raise UserError(f"kind is {config.kind!r}; it must be one of {', '.join(sorted(_KINDS))}")
    target, extra = _KINDS[config.kind]
    module, _, name = target.partition(":")
    try:
        # Imported only here: most sources need packages that most programs do not.
        source = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UserError(
            f"a source of kind {config.kind} needs the package {error.name}; "
            f"run: pip install 'leon_jax[{extra}]'"
        ) from error
    return source(config)
