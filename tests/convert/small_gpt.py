"""A small GPT of LlamaGen with its image tokenizer, as checkpoints and as a model folder."""

import json
import pathlib

import jax
import numpy as np
from flax import nnx

from leon_jax import sharding
from leon_jax.cli import main
from leon_jax.convert import image_tokenizers, torch_file
from leon_jax.models.vqgan import VQGAN, VQGANConfig
from leon_jax.weight_files import flatten
from tests import peers
from tests.tiny import randomise

GRID = 8
# Names and values as in `gpt_in_torch.py`.
OPTIONS = {
    "dim": 32, "heads": 4, "kv_heads": 4, "hidden": 48, "layers": 2, "codes": 64, "classes": 1000,
    "grid": GRID, "guidance": 4.0, "steps": 64, "seed": 0, "envelope": "model",
}  # fmt: skip
TOKENIZER = VQGANConfig(
    resolution=32, channels=32, multipliers=(1, 1, 2), blocks=1, attention_sizes=(GRID,),
    latent=8, code_dim=8, codes=64, unit_codes=True,
)  # fmt: skip


def write_vqgan(path: pathlib.Path, config: VQGANConfig = TOKENIZER) -> None:
    """Writes an image tokenizer with random weights as LlamaGen does."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
        vqgan = randomise(jax.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))
    arrays = {name: np.asarray(array) for name, array in flatten(vqgan).items()}
    family = image_tokenizers.FAMILIES["llamagen"]
    torch_file.write(path, image_tokenizers.write(family, config, arrays), family.envelope)


def run_peer(folder: pathlib.Path, classes, codes, /, **options) -> dict[str, np.ndarray]:
    """Writes gpt.pt into a folder, and returns what PyTorch computes; see `gpt_in_torch.main`."""
    values = OPTIONS | options | {"file": str(folder / "gpt.pt")}
    script = pathlib.Path(__file__).with_name("gpt_in_torch.py")
    arrays = {
        "options": np.frombuffer(json.dumps(values).encode(), np.uint8),
        "classes": np.asarray(classes, np.int64),
        "codes": np.asarray(codes, np.int64),
    }
    return peers.run_peer(script, arrays)


def random_gpt(seed: int = 0, **options) -> dict[str, np.ndarray]:
    """Returns random tensors under the names of LlamaGen, without PyTorch."""
    values = OPTIONS | options
    width, hidden = values["dim"], values["hidden"]
    fused = width + 2 * values["kv_heads"] * width // values["heads"]
    shapes = {
        "cls_embedding.embedding_table.weight": (values["classes"] + 1, width),
        "tok_embeddings.weight": (values["codes"], width),
        "norm.weight": (width,),
        "output.weight": (values["codes"], width),
    }
    for layer in range(values["layers"]):
        shapes |= {
            f"layers.{layer}.attention.wqkv.weight": (fused, width),
            f"layers.{layer}.attention.wo.weight": (width, width),
            f"layers.{layer}.feed_forward.w1.weight": (hidden, width),
            f"layers.{layer}.feed_forward.w3.weight": (hidden, width),
            f"layers.{layer}.feed_forward.w2.weight": (width, hidden),
            f"layers.{layer}.attention_norm.weight": (width,),
            f"layers.{layer}.ffn_norm.weight": (width,),
        }
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def convert(capsys, *arguments) -> tuple[int, str, str]:
    """Runs `leon convert`, and returns its exit code and what it printed."""
    code = main.run(["convert", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def flags(folder: pathlib.Path, out: str = "model") -> list[str]:
    """Returns the flags that convert gpt.pt and vqgan.pt of a folder."""
    return [
        "--from=llamagen", f"--source={folder}/gpt.pt", f"--vqgan={folder}/vqgan.pt",
        "--resolution=32", "--heads=4", f"--out={folder}/{out}",
    ]  # fmt: skip
