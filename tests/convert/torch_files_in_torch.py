"""Writes files of `torch.save` for tests/convert/test_torch_file.py; runs with the peers."""

import argparse
import collections
import fractions
import pathlib

import numpy as np
import torch


def main(arrays):
    folder = pathlib.Path(bytes(arrays["folder"]).decode())
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    tensors = {
        "float32": base,
        "transposed": base.T,
        "part": base[1:4, 2:7:2],
        "same storage": base[2],
        "parameter": torch.nn.Parameter(base + 1),
        "float64": base.double(),
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "int64": torch.arange(10) - 5,
        "int32": torch.arange(7, dtype=torch.int32),
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "uint8": torch.arange(9, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "expanded": torch.arange(3.0).expand(4, 3),
    }
    checkpoint = {
        "epoch": 3,
        "callbacks": {
            fractions.Fraction: fractions.Fraction(1, 3),
            "namespace": argparse.Namespace(rate=0.1),
        },
        "numpy": np.float64(1.5),
        "hyper": [torch.float32, torch.device("cpu"), {1, 2}],
        "state_dict": collections.OrderedDict(tensors),
        "optimizer": {"state": [tensors["float32"] * 2], "step": 7},
    }
    torch.save(checkpoint, folder / "new.ckpt")
    torch.save(checkpoint, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    torch.save(tensors, folder / "bare.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "linear.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "script.pt")
    return {
        name: (tensor.detach().float() if tensor.dtype == torch.bfloat16 else tensor.detach())
        .contiguous()
        .numpy()
        .copy()
        for name, tensor in tensors.items()
    }
