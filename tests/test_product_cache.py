"""Compiled products on a CPU are kept up to a number, however many shapes steps have."""

from __future__ import annotations

import os
import subprocess
import sys

from nsa_serve.models.product_cache import bound_product_caches

# A process of its own: the caches are sized at the first product. Prints MiB by which the second
# hundred of shapes makes it grow.
PROGRAM = """
import os
import torch
from nsa_serve.bench.server_process import resident_bytes
from nsa_serve.models.config import ModelConfig
from nsa_serve.models.decoder import Decoder
from nsa_serve.models.loader import random_weights

config = ModelConfig("llama", 64, 64, 1, 2, 2, 32, 32, 128, max_position=64)
weights = random_weights(config, device=torch.device("cpu"), dtype=torch.bfloat16, seed=1)
layer = Decoder(config, weights).layers[0]

def resident_after(rows):
    for count in rows:
        layer.qkv(torch.ones(count, 64, dtype=torch.bfloat16))
        layer.gate_up(torch.ones(count, 64, dtype=torch.bfloat16))
    return resident_bytes(os.getpid())

before = resident_after(range(17, 67))
print((resident_after(range(67, 117)) - before) / 2**20)
"""


def grown_mib(**environment: str) -> float:
    """MiB, in a process with these variables and no others of the caches."""
    others = {k: v for k, v in os.environ.items() if "CACHE_CAPACITY" not in k}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**others, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return float(found.stdout)


def test_a_process_levels_off_whatever_shapes_its_steps_have():
    assert grown_mib() < 16  # without bounds: 54


def test_the_environment_may_set_other_bounds(monkeypatch):
    environment = {"LRU_CACHE_CAPACITY": "7"}
    monkeypatch.setattr(os, "environ", environment)
    bound_product_caches()
    assert environment == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
