"""Weights of some layers in host memory, copied to the device ahead of their use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..kernels.dispatch import ops_for

Tensor = torch.Tensor

# What a layer's products read. Norms, biases and φ are small and stay on the device.
_PARTS = ("qkv.weight", "o.weight", "gate_up.weight", "down.weight")
# One buffer is read while the other is filled.
NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """Which layers are streamed, and what one of them holds; all layers are alike."""

    layers: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]  # by part
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, tuple[int, ...]],
        num_layers: int,
        dtype: torch.dtype,
        num_bytes: int,
    ) -> StreamPlan:
        """As many layers as ``num_bytes`` of host memory hold, spread evenly over the model.

        ``parameters``: shapes of all of the model's, by name. Raises ``ConfigError`` where that
        takes nothing off the device.
        """
        shapes = {part: parameters[f"layers.0.{part}"] for part in _PARTS}
        layer_bytes = sum(map(math.prod, shapes.values())) * dtype.itemsize
        count = min(num_bytes // layer_bytes, num_layers)
        if count <= NUM_BUFFERS:
            raise ConfigError(
                f"--cpu-offload-bytes {num_bytes} holds {num_bytes // layer_bytes} of "
                f"{num_layers} layers of {layer_bytes} bytes, and streaming takes "
                f"{NUM_BUFFERS} buffers of that size on the GPU: offload at least "
                f"{NUM_BUFFERS + 1} layers, {(NUM_BUFFERS + 1) * layer_bytes} bytes"
            )
        # Layers that stay lie between them, so that there is time to copy; the last one streams,
        # since the first one's copy is waited for.
        last = num_layers - 1
        layers = tuple(last - (count - 1 - k) * num_layers // count for k in range(count))
        return cls(layers, shapes, dtype)

    @property
    def layer_elements(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def layer_bytes(self) -> int:
        return self.layer_elements * self.dtype.itemsize

    @property
    def host_bytes(self) -> int:
        return len(self.layers) * self.layer_bytes

    @property
    def saved_bytes(self) -> int:
        """What the device is spared."""
        return (len(self.layers) - NUM_BUFFERS) * self.layer_bytes

    def views(self, flat: Tensor, layer: int) -> Iterator[tuple[str, Tensor]]:
        """(parameter's name, its place in ``flat`` [layer_elements]) of a layer."""
        start = 0
        for part, shape in self.shapes.items():
            size = math.prod(shape)
            yield f"layers.{layer}.{part}", flat[start : start + size].view(shape)
            start += size


class WeightStream:
    """Copies the planned layers' weights from ``host`` into two buffers in turn, every step.

    A layer's copy begins when the buffer's last reader is done, and computation waits for it only
    where it needs it. On a GPU copies run on a stream of their own, with events between the two:
    a CUDA graph that captures a step captures them as well. On a CPU copies run in their place.
    """

    def __init__(self, plan: StreamPlan, host: Tensor, device: torch.device) -> None:
        self.plan = plan
        self._host = host.view(len(plan.layers), plan.layer_elements)
        shape = (NUM_BUFFERS, plan.layer_elements)
        self._buffers = torch.zeros(shape, dtype=plan.dtype, device=device)
        self._order = {layer: at for at, layer in enumerate(plan.layers)}
        self._ops = ops_for(device)
        # Nanoseconds that copies took, and that computation waited for them.
        self._copying = torch.zeros(1, dtype=torch.int64, device=device)
        self._waiting = torch.zeros(1, dtype=torch.int64, device=device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copied = [_event() for _ in plan.layers]
            self._read = [_event() for _ in plan.layers]
        # One set, so that what was loaded into it is known again.
        self._homes = {
            name: view
            for layer, at in self._order.items()
            for name, view in plan.views(self._host[at], layer)
        }

    @property
    def nanoseconds(self) -> Tensor:
        """Time that copies took and that computation waited for them [2] int64, on the device."""
        return torch.cat([self._copying, self._waiting])

    def host_weights(self) -> dict[str, Tensor]:
        """Where the streamed parameters are loaded to, by name."""
        return self._homes

    def adopt(self, weights: dict[str, Tensor]) -> None:
        """Keep the streamed ones of ``weights``, by name, and put there where they are read."""
        for name, home in self._homes.items():
            if weights[name] is not home:
                home.copy_(weights[name])
        for layer, at in self._order.items():
            weights.update(self.plan.views(self._buffers[at % NUM_BUFFERS], layer))

    def begin(self) -> None:
        """A step starts: fill both buffers."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        for at in range(NUM_BUFFERS):
            self._copy(at)

    def enter(self, layer: int) -> None:
        """What is computed from here on reads the layer's weights."""
        at = self._order.get(layer)
        if at is not None and self._stream is not None:
            self._ops.add_clock(self._waiting, -1)
            torch.cuda.current_stream().wait_event(self._copied[at])
            self._ops.add_clock(self._waiting, 1)

    def leave(self, layer: int) -> None:
        """The layer is computed: its buffer takes the weights of the next but one."""
        at = self._order.get(layer)
        if at is None or at + NUM_BUFFERS >= len(self.plan.layers):
            return
        if self._stream is not None:
            self._read[at].record()
            self._stream.wait_event(self._read[at])
        self._copy(at + NUM_BUFFERS)

    def _copy(self, at: int) -> None:
        with self._beside():
            self._ops.add_clock(self._copying, -1)
            self._buffers[at % NUM_BUFFERS].copy_(self._host[at], non_blocking=True)
            self._ops.add_clock(self._copying, 1)
            if self._stream is not None:
                self._copied[at].record()

    def _beside(self) -> AbstractContextManager[object]:
        stream: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            stream = torch.cuda.stream(self._stream)
        return stream


def _event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    return event
