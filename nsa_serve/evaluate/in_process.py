"""A model in this process, asked through ``LLM``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import EngineConfig
from ..engine.build import build_parts
from ..engine.engine import Engine
from ..errors import ConfigError, EvaluationStopped
from ..llm import LLM, RequestResult
from ..request import MAX_LOGPROBS, FinishReason, SamplingParams, TokenLogprob
from .ablation import Ablation, ablate
from .subject import Answer, Candidates, Question


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
        config = config.for_throughput()
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
        # One at a time: a window's records take more memory than its cache.
        return [[entry.logprob for entry in self._entries(window, 0)] for window in windows]

    def candidates(self, windows: Sequence[Sequence[int]]) -> list[list[Candidates]]:
        return [
            [{**dict(e.top), e.token_id: e.logprob} for e in self._entries(window, MAX_LOGPROBS)]
            for window in windows
        ]

    def encode_answered(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of a chat whose one user turn is ``text``, and of the turn that answers it.

        Raises ``ConfigError`` where the chat template writes an asked question otherwise once it
        is answered.
        """
        tokenizer = self._llm.tokenizer
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        asked = tokenizer.apply_chat_template(turns[:1])
        whole = tokenizer.apply_chat_template(turns, add_generation_prompt=False)
        if not whole.startswith(asked):
            raise ConfigError("the base's chat template changes a question once it is answered")
        # What stands after the end of a turn is the template's, not the model's.
        said = whole[len(asked) :].rstrip()
        return tokenizer.encode(asked, add_special=False), tokenizer.encode(said, add_special=False)

    def _entries(self, window: Sequence[int], num_candidates: int) -> list[TokenLogprob]:
        """Of every token but the first."""
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=num_candidates)
        (result,) = self._llm.generate([list(window)], sampling)
        entries = _checked(result).prompt_logprobs
        assert entries is not None
        return [entry for entry in entries if entry is not None]

    def _encode_chats(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = self._llm.tokenizer
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": x}]) for x in texts]
        # All at once: long prompts take longer to encode than some models to read.
        return tokenizer.encode_batch(chats, add_special=False)


def _checked(result: RequestResult) -> RequestResult:
    if result.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        raise EvaluationStopped(f"a prompt was not answered: {result.error}")
    return result
