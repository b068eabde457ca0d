"""Settings every test shares: few threads, and Triton's interpreter where there is no GPU."""

import os

import torch

# Triton reads this when it is first imported, which is when a GPU op is first asked for.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# For the processes that tests start; threads that spin on a shared core wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# Parallel test processes share the cores; more threads would only make them wait for each other.
torch.set_num_threads(1)

settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: make test-gpu")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
