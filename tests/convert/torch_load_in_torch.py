"""Loads a file that our writer wrote, for tests/convert/test_torch_file.py; runs with the peers."""

import torch


def main(arrays):
    path = bytes(arrays["file"]).decode()
    tensors = torch.load(path, weights_only=True)["state_dict"]
    assert tensors["bfloat16"].dtype == torch.bfloat16 and tensors["transposed"].is_contiguous()
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }
