"""What a model takes and what a card holds, without loading anything.

Weights and cache are counted by the functions that the engine itself counts with. A step's
workspace is estimated from the shapes of its largest tensors, since only a run on the device can
measure it, which is what the engine does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import EngineConfig
from ..errors import ConfigError
from ..memory.layout import KVLayout
from ..models.checkpoint import resolve
from ..models.config import ModelConfig
from ..models.linear import choose_dtype, has_fast_bf16, uses_four_bit
from ..models.loader import num_four_bit_bytes, num_weight_bytes, parameter_shapes
from ..models.weight_stream import StreamPlan
from ..runner.budget import CacheSize, default_cpu_cache, size_cache
from ..runner.staging import StepSizes
from ..runner.tier_sizes import TierSize, size_tiers
from ..runner.worker import served_model, token_budget

# Activations of the MLP, in intermediate sizes a token: the fused product's two halves and their
# SwiGLU, beside which the reference on a CPU holds another one and a half in temporaries.
_MLP_PARTS = {"cuda": 3.0, "cpu": 5.5}
# fp32 copies of the logits while every row samples with everything on: what the ops of each device
# allocate. A CPU sorts, a GPU does not.
_LOGITS_COPIES = {"cuda": 6.0, "cpu": 12.3}
# Counts and marks of penalised requests: int32 and bool.
_PENALTY_BYTES = 5


@dataclass(frozen=True, slots=True)
class Sizing:
    """A model as one configuration serves it. All sizes in bytes."""

    model: ModelConfig
    layout: KVLayout
    device: str  # cuda or cpu
    max_rows: int
    max_tokens: int  # of a step
    utilization: float
    four_bit_bytes: int = 0  # of weights that are multiplied as a GGUF file stores them
    offloaded: StreamPlan | None = None  # layers that are streamed from host memory
    host_bytes: int = 0  # for pages beyond the device's

    @classmethod
    def of(cls, config: EngineConfig, device: str = "cuda") -> Sizing:
        """Raises ``ConfigError`` or ``CheckpointError`` for what can't be served."""
        checkpoint = resolve(config.source)
        model = served_model(checkpoint, config)
        target = torch.device(device)
        dtype = choose_dtype(config.source.dtype, target)
        packs = uses_four_bit(target, dtype) and not config.graph.deterministic
        host = config.cache.kv_host_memory_bytes
        if host and model.nsa is None:
            raise ConfigError("--kv-host-memory-bytes needs Native Sparse Attention")
        return cls(
            model,
            KVLayout.of(model, dtype),
            device,
            config.schedule.max_num_seqs,
            token_budget(config, target),
            config.cache.gpu_memory_utilization,
            num_four_bit_bytes(checkpoint, model) if packs else 0,
            _offloaded(config, model, dtype, device),
            host,
        )

    @property
    def weight_bytes(self) -> int:
        return num_weight_bytes(self.model, self.layout.dtype)

    @property
    def resident_bytes(self) -> int:
        """Weights on the device.

        bf16 on a CPU makes a packed copy of a tied output layer, and has 4-bit weights beside the
        bf16 ones, which longer steps multiply.
        """
        model, dtype = self.model, self.layout.dtype
        packs = self.device == "cpu" and dtype == torch.bfloat16 and has_fast_bf16()
        copied = model.vocab_size * model.hidden_size if packs and model.tie_embeddings else 0
        saved = 0 if self.offloaded is None else self.offloaded.saved_bytes
        return self.weight_bytes - saved + self.four_bit_bytes + copied * dtype.itemsize

    @property
    def raw_bytes_per_token(self) -> float:
        """Keys and values of a token, all layers."""
        return self.layout.bytes_per_slot / self.layout.page

    @property
    def compressed_bytes_per_token(self) -> float:
        """A token's share of its page's compressed entries, all layers."""
        return self.layout.compressed_bytes_per_block / self.layout.page

    def stream_bytes(self, context: int) -> int:
        """The cache of one request of ``context`` tokens."""
        return self.layout.num_pages(context) * self.layout.bytes_per_block

    @property
    def step_bytes(self) -> int:
        """What the heaviest step takes beside weights and cache: an estimate."""
        return max(self._mlp_bytes, self._sampling_bytes) + self._table_bytes

    @property
    def _mlp_bytes(self) -> int:
        model, size = self.model, self.layout.dtype.itemsize
        parts = 2 * model.hidden_size + _MLP_PARTS[self.device] * model.intermediate_size
        return int(self.max_tokens * parts * size)

    @property
    def _sampling_bytes(self) -> int:
        rows = min(self.max_rows, self.max_tokens)
        return int(rows * self.model.vocab_size * 4 * _LOGITS_COPIES[self.device])

    @property
    def _table_bytes(self) -> int:
        """Step arrays, the block table and penalties, as the runner allocates them."""
        rows, tokens = self.max_rows, self.max_tokens
        staged = StepSizes(tokens, rows, tokens + rows, rows).offsets()[1]
        columns = self.layout.num_pages(self.model.max_position)
        return staged + 4 * rows * columns + _PENALTY_BYTES * rows * self.model.vocab_size

    def cache_bytes(self, free: int) -> int:
        """What is left for the cache on a device with ``free`` bytes; 0 if nothing is."""
        if self.device == "cpu":
            return default_cpu_cache(max(free - self.resident_bytes, 0))
        usable = int(free * self.utilization)
        return max(usable - self.resident_bytes - self.step_bytes, 0)

    def cache_size(self, free: int) -> CacheSize | None:
        """The cache that the engine would make there; None where not even one page fits."""
        try:
            tiers = self.tiers(free)
            num_bytes = self.cache_bytes(free)
            if tiers is not None:
                num_bytes = tiers.num_blocks * self.layout.bytes_per_block
            return size_cache(
                num_bytes,
                self.layout,
                max_model_len=self.model.max_position,
                max_num_seqs=self.max_rows,
                is_explicit=False,
            )
        except ConfigError:
            return None

    def tiers(self, free: int) -> TierSize | None:
        """How that cache is divided with the host's memory; None without a host tier.

        Raises ``ConfigError`` where the device's part is too small.
        """
        if not self.host_bytes or self.model.nsa is None:
            return None
        return size_tiers(
            self.cache_bytes(free), self.host_bytes, self.layout, self.model.nsa.shape,
            max_num_seqs=self.max_rows, token_budget=self.max_tokens,
        )  # fmt: skip

    def held_bytes(self, free: int) -> tuple[int, int]:
        """Bytes of that cache on the device and in host memory."""
        size, tiers = self.cache_size(free), self.tiers(free)
        assert size is not None, "nothing fits there"
        if tiers is None:
            return size.num_blocks * self.layout.bytes_per_block, 0
        entries = tiers.num_blocks * self.layout.compressed_bytes_per_block
        raw = self.layout.bytes_per_slot
        return tiers.num_slots * raw + entries, tiers.num_host * raw

    def needed_bytes(self, context: int, streams: int) -> int:
        """Free memory with which a GPU holds this load: everything over the share it may use."""
        if self.host_bytes:
            return self._needed_with_host(context, streams)
        cache = streams * self.stream_bytes(context)
        total = self.resident_bytes + self.step_bytes + cache
        return int(total / self.utilization) if self.device == "cuda" else total

    def streams_that_fit(self, free: int, context: int) -> int:
        """Requests of ``context`` tokens that the cache holds at once."""
        size = self.cache_size(free)
        if size is None or context > size.max_model_len:
            return 0
        streams = min(size.num_blocks // self.layout.num_pages(context), self.max_rows)
        tiers = self.tiers(free)
        if tiers is None:
            return streams
        # All that run have their first and last pages on the device, beside a step's new ones.
        near = tiers.num_initial + self.layout.num_pages(tiers.num_near) + 1
        room = tiers.num_pages - self.layout.num_pages(self.max_tokens)
        return max(min(streams, room // near), 1)

    def _needed_with_host(self, context: int, streams: int) -> int:
        """Found by halving: how host memory divides a device's has no inverse."""
        low, high = 0, 1 << 50
        while high - low > 1 << 20:
            middle = (low + high) // 2
            fits = self.streams_that_fit(middle, context) >= streams
            low, high = (low, middle) if fits else (middle, high)
        return high


def _offloaded(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: str
) -> StreamPlan | None:
    asked = config.source.cpu_offload_bytes
    if not asked:
        return None
    if device != "cuda":
        raise ConfigError("--cpu-offload-bytes needs a GPU")
    return StreamPlan.of(parameter_shapes(model), model.num_layers, dtype, asked)
