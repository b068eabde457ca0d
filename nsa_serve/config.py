"""The engine's configuration: frozen, whole, checked once. Derived values are properties."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from .errors import ConfigError

EMBEDDED_MODEL = "smollm2-135m-instruct"
NSA_MODEL = "smollm2-135m-nsa"  # the embedded one trained with NSA, where the package holds it
_NSA_FOLDER = Path(__file__).parent / "models" / "smollm2_135m_nsa"
GIB = 1 << 30


class AttentionMode(StrEnum):
    AUTO = "auto"  # NSA for checkpoints trained with it, dense for others
    NSA = "nsa"
    DENSE = "dense"


class Policy(StrEnum):
    FCFS = "fcfs"
    PRIORITY = "priority"
    DEADLINE = "deadline"


class DType(StrEnum):
    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which checkpoint is served, and how it is read."""

    model: str = EMBEDDED_MODEL  # a folder, a .gguf file, a Hub id, or the embedded name
    served_model_name: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: DType = DType.AUTO
    attention: AttentionMode = AttentionMode.AUTO
    max_model_len: int | None = None  # None: the checkpoint's context
    chat_template: str | None = None  # a file
    random_weights: bool = False  # benchmarks of a shape without a checkpoint
    mock_token_rate: float | None = None  # no model at all: tokens/s of each request
    cpu_offload_bytes: int = 0  # of layers' weights, in host memory and copied for every step
    seed: int = 0

    @property
    def public_name(self) -> str:
        return self.served_model_name or self.model


@dataclass(frozen=True, slots=True)
class CacheConfig:
    enable_prefix_caching: bool = True
    kv_cache_memory_bytes: int | None = None  # None: a share of the free memory
    gpu_memory_utilization: float = 0.9
    kv_host_memory_bytes: int = 0  # pages that the device lacks room for; 0: no host tier
    kv_runners_up: int = 0  # blocks all but selected that a decode step fetches from there too
    kv_disk_dir: str | None = None  # where pages of prefixes are kept that the cache gives up
    kv_disk_bytes: int = 32 * GIB


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    policy: Policy = Policy.FCFS
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # the step's token budget; None: by device
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 16 << 20
    request_timeout: float | None = None  # seconds that a request may take at most
    interactive: bool = True  # somebody waits for single tokens, not only for all answers


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    tensor_parallel_size: int = 1


@dataclass(frozen=True, slots=True)
class GraphConfig:
    enforce_eager: bool = False
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine needs to start. ``validate`` is called once, by whoever builds it."""

    source: ModelSource = field(default_factory=ModelSource)
    cache: CacheConfig = field(default_factory=CacheConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    device: str = "auto"  # auto, cpu or cuda

    @classmethod
    def from_flags(cls, **flags: Any) -> EngineConfig:
        """The checked configuration that flat flags describe: ``max_num_seqs=8`` and the like.

        Names are the fields' own, and ``scheduling_policy`` for the policy; None means not given.
        Raises ``ConfigError`` for an unknown name or a value of a wrong type.
        """
        sections: dict[str, dict[str, Any]] = {}
        for name, value in flags.items():
            section, key = _find_flag(name)
            if value is not None:
                sections.setdefault(section, {})[key] = _convert_flag(name, section, key, value)
        top = sections.pop("", {})
        built = {name: _SECTIONS[name](**values) for name, values in sections.items()}
        return cls(**built, **top).validate()

    def for_throughput(self) -> EngineConfig:
        """The same for whoever waits for all answers and for no single token."""
        return replace(self, schedule=replace(self.schedule, interactive=False))

    def validate(self) -> EngineConfig:
        """Return self, or raise ``ConfigError`` with the flag and the number that can't work."""
        s = self.schedule
        _need(
            self.device in ("auto", "cpu", "cuda"),
            f"--device is auto, cpu or cuda, not {self.device!r}",
        )
        _need(
            self.parallel.tensor_parallel_size == 1,
            "--tensor-parallel-size above 1 is not built yet; use 1",
        )
        _need(0 < s.max_num_seqs <= 4096, f"--max-num-seqs must be 1 to 4096, not {s.max_num_seqs}")
        budget = s.max_num_batched_tokens
        _need(
            budget is None or budget >= s.max_num_seqs,
            f"--max-num-batched-tokens {budget} is less than --max-num-seqs {s.max_num_seqs}: "
            "a step could not hold one token of each request",
        )
        _need(s.max_num_queued_reqs > 0, "--max-num-queued-reqs must be at least 1")
        _need(s.max_num_queued_tokens > 0, "--max-num-queued-tokens must be at least 1")
        timeout = s.request_timeout
        _need(
            timeout is None or 0 < timeout < float("inf"),
            f"--request-timeout must be more than 0 seconds, not {timeout}",
        )
        share = self.cache.gpu_memory_utilization
        _need(0 < share <= 1, f"--gpu-memory-utilization must be in (0, 1], not {share}")
        kv = self.cache.kv_cache_memory_bytes
        _need(kv is None or kv > 0, f"--kv-cache-memory-bytes must be positive, not {kv}")
        host = self.cache.kv_host_memory_bytes
        _need(host >= 0, f"--kv-host-memory-bytes must not be negative, not {host}")
        ahead = self.cache.kv_runners_up
        _need(0 <= ahead <= 64, f"--kv-runners-up must be 0 to 64, not {ahead}")
        offload = self.source.cpu_offload_bytes
        _need(offload >= 0, f"--cpu-offload-bytes must not be negative, not {offload}")
        disk = self.cache.kv_disk_bytes
        _need(disk > 0, f"--kv-disk-dir: its size must be positive, not {disk}")
        _need(
            self.cache.kv_disk_dir is None or self.cache.enable_prefix_caching,
            "--kv-disk-dir keeps prefixes: it needs --enable-prefix-caching",
        )
        rate = self.source.mock_token_rate
        _need(rate is None or 0 < rate <= 1e6, f"--mock-engine must be tokens/s, not {rate}")
        length = self.source.max_model_len
        _need(length is None or length > 0, f"--max-model-len must be positive, not {length}")
        return self


_SECTIONS: dict[str, type] = {
    "source": ModelSource,
    "cache": CacheConfig,
    "schedule": ScheduleConfig,
    "parallel": ParallelConfig,
    "graph": GraphConfig,
}
_RENAMED = {"scheduling_policy": ("schedule", "policy")}


def shipped_model() -> Path | None:
    """The folder of ``NSA_MODEL`` in this package, if it is there."""
    return _NSA_FOLDER if (_NSA_FOLDER / "adapter.json").is_file() else None


def default_model() -> str:
    """What the command line serves unless told otherwise."""
    return EMBEDDED_MODEL if shipped_model() is None else NSA_MODEL


def _find_flag(name: str) -> tuple[str, str]:
    """(section, field) of a flag; the section is "" for fields of ``EngineConfig`` itself."""
    if name in _RENAMED:
        return _RENAMED[name]
    for section, kind in _SECTIONS.items():
        if (section, name) not in _RENAMED.values() and name in {f.name for f in fields(kind)}:
            return section, name
    _need(name == "device", f"unknown setting {name!r}")
    return "", name


def _convert_flag(name: str, section: str, key: str, value: Any) -> Any:
    kind = get_type_hints(_SECTIONS.get(section, EngineConfig))[key]
    flag = f"--{name.replace('_', '-')}"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        choices = [member.value for member in kind]
        _need(value in choices, f"{flag} is one of {', '.join(choices)}, not {value!r}")
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{flag} {value!r}: {error}") from None


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
