"""Tests that collectives are counted correctly from a program's HLO text."""

import json
import subprocess
import sys
from pathlib import Path

from leon_jax.plan.collectives import Collective, collectives
from tests import tpu

# A loop of 5 iterations has an asynchronous gather (pieces of one channel), a permute and a piece
# of a gather that starts outside the loop. Outside are also two reductions with one channel and a
# fused reduce-scatter.
HLO = """\
HloModule example

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%start (p: bf16[2,64]) -> (bf16[2,64], bf16[8,64]) {
  %gather.1 = bf16[8,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
  ROOT %c = (bf16[2,64], bf16[8,64]) custom-call(%gather.1), custom_call_target="Start"
}

%done (p: bf16[2,64]) -> bf16[8,64] {
  ROOT %gather.2 = bf16[8,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
}

%all-reduce-scatter.3 (p: f32[8,16]) -> f32[2,16] {
  %all-reduce.9 = f32[8,16]{1,0} all-reduce(%p), channel_id=9, replica_groups={{0,1,2,3}}
  ROOT %slice = f32[2,16]{1,0} dynamic-slice(%all-reduce.9)
}

%meanwhile (p: bf16[4,64]) -> bf16[16,64] {
  ROOT %gather.4 = bf16[16,64]{1,0:T(8,128)} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4]
}

%body (state: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {
  %fusion.1 = (bf16[2,64], bf16[8,64]) fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = bf16[8,64] fusion(%fusion.1), kind=kCustom, calls=%done
  %send = (bf16[2,64], bf16[2,64], u32[]) collective-permute-start(%x), channel_id=8
  %piece = bf16[16,64] fusion(%x), kind=kCustom, calls=%meanwhile
  %sent = bf16[2,64] collective-permute-done(%send)
  ROOT %t = (s32[], bf16[2,64]) tuple(%i, %sent)
}

%condition (state: (s32[], bf16[2,64])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8,16]) -> f32[] {
  %loop = (s32[], bf16[2,64]) while(%init), condition=%condition, body=%body
  %whole = bf16[16,64]{0,1} all-gather(%b), channel_id=5, replica_groups=[1,4]<=[4]
  %other = f32[] all-reduce(%c), channel_id=1, replica_groups=[1,4]<=[4]
  %both = (f32[10], s32[6]) all-reduce(%a), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a'}
  %part = f32[2,16] fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_loops_asynchronous_pieces_and_fusions_are_counted_correctly():
    gathered, permuted, reduced, scattered = 8 * 64 * 2, 2 * 64 * 2, 10 * 4 + 6 * 4, 8 * 16 * 4
    gathered_outside, scalar = 16 * 64 * 2, 4
    assert collectives(HLO) == {
        "all-gather": Collective(2, 6, (5 * gathered + gathered_outside) * 3 / 4, asynchronous=2),
        "reduce-scatter": Collective(1, 1, scattered * 3 / 4),
        "all-reduce": Collective(2, 2, 2 * reduced * 1 / 2 + 2 * scalar * 3 / 4),
        "all-to-all": Collective(0, 0, 0),
        "collective-permute": Collective(1, 5, 5 * permuted, asynchronous=1),
    }


def test_collectives_on_sparse_cores_are_asynchronous():
    config = 'backend_config={"device_type":"DEVICE_TYPE_SPARSECORE"}'
    gather = "all-gather(%a), channel_id=5, replica_groups=[1,4]<=[4]"
    hlo = f"""\
ENTRY %main (a: f32[8]) -> f32[32] {{
  %one = f32[32] {gather}, {config}
  ROOT %other = f32[32] {gather.replace("=5", "=6")}
}}
"""
    assert collectives(hlo)["all-gather"] == Collective(2, 2, 2 * 96, asynchronous=1)


def test_the_collectives_of_a_compiled_scan_count_once_per_layer():
    """Six gathers of a 1,024 x 1,024 bfloat16 weight over four chips, and a reduction."""
    program = Path(__file__).with_name("on_four_chips.py")
    result = subprocess.run(
        [sys.executable, program], env=tpu.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    # XLA may gather with a ring of permutes, which sends the same bytes.
    gathered = sum(counts[kind]["bytes_sent"] for kind in ("all-gather", "collective-permute"))
    assert gathered == 6 * 1024 * 1024 * 2 * 3 / 4
    assert counts["all-reduce"]["bytes_sent"] == 2 * 1024 * 4 * 3 / 4
