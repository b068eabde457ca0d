"""From a configuration to the parts of an engine: the one place that knows how they are joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from ..cache.manager import CacheManager
from ..config import EngineConfig
from ..models.checkpoint import Checkpoint, resolve
from ..models.loader import Progress
from ..runner.worker import Worker
from ..schedule.scheduler import Scheduler
from ..tokenizer import Tokenizer, read_source
from .followers import Followers
from .grammar import GrammarCompiler
from .messages import EngineDescription
from .mock import MockWorker
from .tiers import near_pages, residence_sizes

W = TypeVar("W", Worker, MockWorker)


@dataclass(frozen=True, slots=True)
class EngineParts(Generic[W]):
    """What ``Engine`` owns, made for each other."""

    scheduler: Scheduler
    cache: CacheManager
    worker: W
    tokenizer: Tokenizer | None
    depth: int
    description: EngineDescription
    followers: Followers | None  # None where no grammar can be followed


def build_parts(config: EngineConfig, on_progress: Progress | None = None) -> EngineParts[Worker]:
    """Load the model and size everything by it.

    Raises ``ConfigError`` or ``CheckpointError`` where that can't be done; the tokenizer is read
    first, since it is quickly known to be missing.
    """
    checkpoint = resolve(config.source)
    tokenizer = read_tokenizer(config, checkpoint)
    worker = Worker(config, on_progress)
    return _join(config, checkpoint, tokenizer, worker, _followers(worker, tokenizer))


def build_mock_parts(config: EngineConfig) -> EngineParts[MockWorker]:
    """The same around a worker without a model."""
    checkpoint = resolve(config.source)
    tokenizer = read_tokenizer(config, checkpoint)
    return _join(config, checkpoint, tokenizer, MockWorker(config), None)


def _followers(worker: Worker, tokenizer: Tokenizer | None) -> Followers | None:
    model = worker.model_config
    if tokenizer is None or not model.eos_token_ids:
        return None
    return Followers(
        GrammarCompiler(tokenizer, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
    )


def _join(
    config: EngineConfig,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    worker: W,
    followers: Followers | None,
) -> EngineParts[W]:
    cache = CacheManager(
        worker.num_blocks,
        worker.page,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        tiers=residence_sizes(worker.tiers),
        near=near_pages(worker.tiers),
        shelf=worker.disk,
    )
    # On a GPU a launch only queues, so the next step is planned while this one runs.
    depth = 1 if worker.device.type == "cuda" else 0
    scheduler = Scheduler(
        config.schedule,
        cache,
        max_model_len=worker.max_model_len,
        token_budget=worker.token_budget,
        eos_token_ids=frozenset(worker.model_config.eos_token_ids),
        depth=depth,
    )
    description = describe(config, checkpoint, worker, tokenizer)
    return EngineParts(scheduler, cache, worker, tokenizer, depth, description, followers)


def read_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer | None:
    """The checkpoint's tokenizer. A shape served with random weights may have none."""
    folder = checkpoint.tokenizer_path
    has_none = folder is not None and not (folder / "tokenizer.json").is_file()
    if config.source.random_weights and has_none:
        return None
    return Tokenizer(read_source(checkpoint, config.source.chat_template))


def describe(
    config: EngineConfig,
    checkpoint: Checkpoint,
    worker: Worker | MockWorker,
    tokenizer: Tokenizer | None,
) -> EngineDescription:
    model = worker.model_config
    return EngineDescription(
        model_name=config.source.public_name,
        family=model.family,
        attention="dense" if model.nsa is None else "nsa",
        # Other families are dense checkpoints, served with NSA untrained if at all.
        trained_sparse=model.nsa is not None and model.family == "nsa_serve",
        dtype=worker.dtype_name,
        device=worker.device_name,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        max_model_len=worker.max_model_len,
        page_size=worker.page,
        num_blocks=worker.num_blocks,
        token_budget=worker.token_budget,
        bos_token_id=model.bos_token_id,
        eos_token_ids=model.eos_token_ids,
        generation_config=dict(checkpoint.generation_config),
        tokenizer=None if tokenizer is None else tokenizer.source,
    )
