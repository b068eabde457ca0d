"""Which implementation of the ops runs: the reference on CPU tensors, Triton on CUDA tensors.

``ops_for(device)`` is asked once, when a model is built; ``use("reference")`` overrides it for a
``with`` block, so that tests and benchmarks can run the twin on the same tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from .contracts import check

_BACKENDS = {"reference": ".reference", "gpu": ".gpu"}
_forced: str | None = None


def ops_for(device: torch.device | str) -> ModuleType:
    """The module that holds every op under its public name, for tensors on ``device``."""
    name = _forced or ("gpu" if torch.device(device).type == "cuda" else "reference")
    return importlib.import_module(_BACKENDS[name], __package__)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block, ``ops_for`` answers the backend ``name``: "reference" or "gpu"."""
    global _forced
    check(name in _BACKENDS, "no such backend", name=name, known=sorted(_BACKENDS))
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
