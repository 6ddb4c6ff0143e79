"""The engine on meshes of eight devices, beside the same on one.

`test_engine.py` and `test_forms.py` start it. The argument is the name of a form
(`tests/models/forms.py`); without it, the form is CM3Leon's.
"""

import sys

import jax
import numpy as np

from leon_jax import sharding
from leon_jax.engine.engine import Engine
from leon_jax.engine.grammar import ImageSpan
from leon_jax.engine.scheduler import generate
from leon_jax.models.weight_conversion import convert_weights, unstack
from tests.engine.small import VOCABULARY, make
from tests.engine.test_engine import UNLIKE
from tests.models.forms import FORMS

FORM = FORMS[sys.argv[1] if sys.argv[1:] else "cm3leon"]
# The form changes how weights and caches are split, but not how the rows are.
MESHES = [(2, 2, 1, 2)] if sys.argv[1:] else [(2, 2, 1, 2), (8, 1, 1, 1)]
REQUESTS = UNLIKE
if "form" in FORM and FORM["form"].head_ids:  # no text can be generated
    REQUESTS = [each for each in UNLIKE if all(isinstance(s, ImageSpan) for s in each.grammar)]


def answers(shape: tuple[int, ...], weights: str = "float32", kept: str = "compute") -> list:
    """What every sample of `REQUESTS` wrote on a mesh."""
    with jax.set_mesh(sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])):
        decoder = jax.jit(lambda model: unstack(convert_weights(model, weights)))(
            make(4, **FORM).decoder
        )
        engine = Engine(decoder, VOCABULARY, buckets=(8, 16), cache_dtype=kept)
        return [parts for samples in generate(engine, REQUESTS) for parts in samples]


for kind in (("float32", "compute"), ("int8", "int8")):
    expected = answers((1, 1, 1, 1), *kind)
    for shape in MESHES:
        for found, wanted in zip(answers(shape, *kind), expected, strict=True):
            for ours, theirs in zip(found, wanted, strict=True):
                # In 8 bits a number at the border of two steps may fall on either side.
                if kind[0] == "float32":
                    np.testing.assert_array_equal(ours.ids, theirs.ids)
                    np.testing.assert_allclose(
                        ours.log_probabilities, theirs.log_probabilities, atol=1e-4
                    )
                else:
                    np.testing.assert_allclose(
                        ours.log_probabilities[:1], theirs.log_probabilities[:1], atol=0.05
                    )
        print(shape, *kind, "equal", flush=True)
