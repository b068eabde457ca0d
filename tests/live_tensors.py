"""Bytes of the tensors that are alive while code runs, from every op that makes one."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """``now`` and ``peak``: bytes of storage made under this mode and not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_owner(t)[0] for t in _tensors((args, kwargs or {}))}
        for tensor in _tensors(result):
            key, owner, num_bytes = _owner(tensor)
            if key not in known and key not in self._live:
                self._live.add(key)
                self.now += num_bytes
                self.peak = max(self.peak, self.now)
                weakref.finalize(owner, self._free, key, num_bytes)
        return result

    def _free(self, key: int, num_bytes: int) -> None:
        self._live.discard(key)
        self.now -= num_bytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _owner(tensor: torch.Tensor) -> tuple[int, Any, int]:
    """(key, what holds the bytes, how many); oneDNN's packed tensors have no storage to ask."""
    if tensor.is_mkldnn:
        return id(tensor), tensor, tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage._cdata, storage, storage.nbytes()
