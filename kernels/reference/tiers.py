"""Pages of the device and of the host as one pool, which a CPU reads alike."""

from __future__ import annotations

import torch

from ..shapes import PagedKV

Tensor = torch.Tensor


def joined(kv: PagedKV) -> PagedKV:
    """``kv`` with the host's pages behind the device's: no copy where they lie so in memory."""
    if kv.host is None:
        return kv
    return PagedKV(_joined(kv.k, kv.host.k), _joined(kv.v, kv.host.v))


def _joined(device: Tensor, host: Tensor) -> Tensor:
    count, step = device.shape[0], device.stride(0)
    same_storage = device.untyped_storage().data_ptr() == host.untyped_storage().data_ptr()
    if not same_storage or host.storage_offset() != device.storage_offset() + count * step:
        return torch.cat([device, host.to(device.device)])
    return device.as_strided((count + host.shape[0], *device.shape[1:]), device.stride())
