"""A model in this process, asked through ``LLM``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import EngineConfig
from ..engine.build import build_parts
from ..engine.engine import Engine
from ..errors import EvaluationStopped
from ..llm import LLM, RequestResult
from ..request import FinishReason, SamplingParams
from .ablation import Ablation, ablate
from .subject import Answer, Question


class InProcess:
    """``Subject`` of an engine in this process."""

    def __init__(self, llm: LLM, *, ablation: Ablation | None = None) -> None:
        self._llm = llm
        self._ablation = ablation

    @classmethod
    def load(cls, config: EngineConfig, ablation: Ablation | None = None) -> InProcess:
        """The model that ``config`` names, with a part of it taken out by ``ablation``.

        Raises ``ConfigError`` or ``CheckpointError``.
        """
        if ablation is None:
            return cls(LLM.over(Engine.from_config(config), config))
        parts = build_parts(config)
        ablate(parts.worker.model, ablation)
        return cls(LLM.over(Engine.of(parts), config), ablation=ablation)

    @property
    def description(self) -> dict[str, Any]:
        known = self._llm.description
        return {
            "through": "in process",
            "model": known.model_name,
            "attention": known.attention,
            "trained_sparse": known.trained_sparse,
            "dtype": known.dtype,
            "device": known.device,
            "max_model_len": self.max_model_len,
            "ablation": None if self._ablation is None else self._ablation.value,
        }

    @property
    def max_model_len(self) -> int:
        known = self._llm.description
        return min(known.max_model_len, known.cache_tokens)

    def encode(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text, add_special=False)

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self._llm.tokenizer.encode_batch(texts, add_special=False)]

    def count_chat(self, text: str) -> int:
        return len(self._encode_chats([text])[0])

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        prompts = self._encode_chats([question.text for question in questions])
        sampling = [SamplingParams(temperature=0.0, max_tokens=q.max_tokens) for q in questions]
        results = self._llm.generate(prompts, sampling)
        return [Answer(_checked(r).text, r.usage.prompt_tokens) for r in results]

    def logprobs(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        found = []
        # One at a time: a window's records take more memory than its cache.
        for window in windows:
            (result,) = self._llm.generate([list(window)], sampling)
            entries = _checked(result).prompt_logprobs
            assert entries is not None
            found.append([entry.logprob for entry in entries if entry is not None])
        return found

    def _encode_chats(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = self._llm.tokenizer
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": x}]) for x in texts]
        # All at once: long prompts take longer to encode than some models to read.
        return tokenizer.encode_batch(chats, add_special=False)


def _checked(result: RequestResult) -> RequestResult:
    if result.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise EvaluationStopped(f"a prompt was not answered: {result.error}")
    return result
