"""A tiny dense model to grow, a corpus of a few sentences, and trainers over both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
import torch

from nsa_serve.config import ModelSource
from nsa_serve.models.checkpoint import AdapterBase, resolve
from nsa_serve.models.config import RopeConfig
from nsa_serve.models.loader import load_weights
from nsa_serve.tokenizer import Tokenizer, read_source
from nsa_serve.train.adapter import Adapter, AdapterConfig, grown_config, stacked
from nsa_serve.train.batches import BatchPlan, BatchSource, Stage
from nsa_serve.train.corpus import Corpus, tokenise
from nsa_serve.train.sequences import SequenceWriter
from nsa_serve.train.tasks import ReferenceEntry
from nsa_serve.train.trainer import LossWeights, Rates, Trainer

from .checkpoints import CPU, TINY_LLAMA, TINY_NSA, open_model, write_checkpoint

PASSAGES = ["The ship left at dawn with the tide.", "Snow fell on the hills for a week."]
VOCAB = 49_152  # of the embedded model's tokenizer
BASE = AdapterBase("tiny.gguf", "0" * 64)
RANKS = {"qkv": 8, "o": 4, "gate_up": 4, "down": 4}
_SENTENCES = (
    "The harvest was late that year.", "Nobody in the village could say why.",
    "A letter came from the coast.", "It was read aloud twice!", "The bridge had fallen again.",
)  # fmt: skip


def write_base(folder: Path) -> Path:
    """A dense Llama of two layers with the embedded model's vocabulary."""
    config = {**TINY_LLAMA, "vocab_size": VOCAB, "tie_word_embeddings": True}
    return write_checkpoint(folder, config)


def make_trainer(base: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Trainer:
    checkpoint, config = open_model(base)
    adapter_config = AdapterConfig(RANKS, phi_rank=4, shape=TINY_NSA)
    model = grown_config(config, RopeConfig(theta=30_000.0), 2048, adapter_config)
    weights = load_weights(checkpoint, config, device=CPU, dtype=torch.float32)
    return Trainer(
        Adapter.create(model, adapter_config, device=CPU, seed=seed),
        stacked(weights, config.num_layers),
        config,
        dtype=dtype,
        weights=LossWeights(),
        rates=Rates(),
    )


def disturb(adapter: Adapter, seed: int = 0) -> None:
    """Give every trained tensor random values, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter.tensors.values():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)


def load_tokenizer() -> Tokenizer:
    return Tokenizer(read_source(resolve(ModelSource())))


def make_corpus(tokenizer: Tokenizer) -> Corpus:
    text = " ".join(_SENTENCES * 40)
    ids = tokenise([text], tokenizers.Tokenizer.from_str(tokenizer.source.tokenizer_json))
    records = tuple(
        ReferenceEntry(
            name, f"The river of {name} is the {river}.", f"What is the river of {name}?",
            f"The river of {name} is the {river}.", river,
        )
        for name, river in (("Arran", "Lisk"), ("Borovia", "Tamm"), ("Cresta", "Olve"))
    )  # fmt: skip
    return Corpus({"story": ids, "again": np.roll(ids, 7)}, {"country": records})


def make_source(tokenizer: Tokenizer, *, num_tokens: int = 512, longest: int = 256) -> BatchSource:
    plan = BatchPlan(
        num_tokens=num_tokens, num_learnt=64, teacher_limit=longest // 2, teacher_past=32,
        probe_tokens=8,
        curriculum=(Stage(0.5, ((longest // 2, 1.0),)), Stage(1.0, ((longest, 1.0),))),
    )  # fmt: skip
    return BatchSource(SequenceWriter(make_corpus(tokenizer), tokenizer), plan, TINY_NSA, seed=3)
