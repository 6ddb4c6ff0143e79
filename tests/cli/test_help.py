"""`leon --help` and `leon VERB --help`: what they load; a flag has the choices of its type."""

import subprocess
import sys
from typing import get_args

import pytest

from leon_jax.cli import plan, prepare
from leon_jax.cli.main import VERBS
from leon_jax.decode.cache import CacheType
from leon_jax.decode.library import HERE
from leon_jax.models.decoder import WeightType

# Packages that take long to load. Help needs none of them.
HEAVY = {
    "PIL", "flax", "grain", "jax", "jaxlib", "numpy", "optax", "orbax", "tensorflow_datasets",
}  # fmt: skip
# Verbs whose module still loads them.
LOADS_ALL = {"generate"}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS if verb not in LOADS_ALL)],
    ids=" ".join,
)
def test_help_loads_no_heavy_package(arguments):
    program = (
        "import sys\n"
        "from leon_jax.cli import main\n"
        f"code = main.run({arguments})\n"
        f"loaded = {HEAVY} & {{name.split('.')[0] for name in sys.modules}}\n"
        "sys.exit(code or (f'loaded: {sorted(loaded)}' if loaded else 0))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("leon") or "flags of leon" in done.stdout


@pytest.mark.parametrize(
    ("values", "flag", "type_"),
    [(plan.FLAGS, "weights", WeightType), (plan.FLAGS, "cache", CacheType)],
)
def test_the_choices_of_a_flag_are_those_of_the_type(values, flag, type_):
    assert tuple(values[flag].parser.enum_values) == get_args(type_)


def test_the_default_folder_of_prepare_is_the_one_that_models_look_in():
    assert f"(default: {HERE}, for the emoji)" in prepare.FLAGS["out"].help
