"""Programs that load a server: how each is asked for the same load, and how its report is read."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import EMBEDDED_MODEL, ModelSource
from ..models.checkpoint import resolve
from ..tokenizer import read_source
from ..tokenizer.source import DEFAULT_TEMPLATE
from .server_process import COMMAND


@dataclass(frozen=True, slots=True)
class Load:
    """What every tester is asked for. Either so many at a time, or so many a second, evenly."""

    path: str  # of the route, such as /v1/completions
    concurrency: int | None = None
    rate: float | None = None  # requests/s
    num_requests: int = 80
    prompt_len: int = 512  # tokens of the text, without the chat template's
    output_len: int = 16

    @property
    def is_chat(self) -> bool:
        return "chat" in self.path

    def __str__(self) -> str:
        pace = f"{self.concurrency} at a time" if self.concurrency else f"{self.rate:g}/s"
        return f"{'chat' if self.is_chat else 'completions'}, {pace}"


@dataclass(frozen=True, slots=True)
class Figures:
    """What a tester says of one run. Times are means over requests, in milliseconds."""

    completed: int
    prompt_tokens: float  # of a request, as the tester counts or is told
    output_tokens: float
    ttft: float
    tpot: float
    output_throughput: float  # tokens/s


@dataclass(frozen=True, slots=True)
class Site:
    """A server under load, and a folder with what testers read and write."""

    url: str
    model: str
    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"


class Tester(ABC):
    """One program. ``command`` is its executable, with leading arguments if it needs any."""

    name: str

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)

    def environment(self) -> dict[str, str]:
        """Variables of its process."""
        return dict(os.environ)

    @abstractmethod
    def row(self, prompt: str, load: Load) -> dict[str, Any]:
        """A prompt as a line of its JSONL file."""

    @abstractmethod
    def arguments(self, load: Load, site: Site, prompts: Path, out: Path) -> list[str]:
        """Its words for ``load``; reports go into the folder ``out``."""

    @abstractmethod
    def read(self, out: Path) -> Figures:
        """The report of its last run."""

    def command(self, load: Load, site: Site, prompts: Path, out: Path) -> list[str]:
        return [*self._command, *self.arguments(load, site, prompts, out)]


class BenchServe(Tester):
    """``nsa-serve bench serve``."""

    name = "bench serve"

    def __init__(self) -> None:
        super().__init__([*COMMAND, "bench", "serve"])

    def row(self, prompt: str, load: Load) -> dict[str, Any]:
        return {"prompt": prompt, "output_tokens": load.output_len}

    def arguments(self, load: Load, site: Site, prompts: Path, out: Path) -> list[str]:
        pace = ["--max-concurrency", str(load.concurrency)]
        if load.rate is not None:
            pace = ["--request-rate", str(load.rate), "--burstiness", "inf"]
        return [
            "--base-url", site.url, "--model", site.model, *pace,
            "--backend", "openai-chat" if load.is_chat else "openai",
            "--dataset-name", "custom", "--dataset-path", str(prompts),
            "--num-prompts", str(load.num_requests), "--ignore-eos", "--disable-tqdm",
            "--save-result", "--result-dir", str(out), "--result-filename", "report.json",
        ]  # fmt: skip

    def read(self, out: Path) -> Figures:
        found = json.loads((out / "report.json").read_text())
        done = found["completed"]
        return Figures(
            completed=done,
            prompt_tokens=found["total_input_tokens"] / done,
            output_tokens=found["total_output_tokens"] / done,
            ttft=found["mean_ttft_ms"],
            tpot=found["mean_tpot_ms"],
            output_throughput=found["output_throughput"],
        )


class GuideLLM(Tester):
    """guidellm. Its ``inter_token_latency_ms`` is TPOT; what it calls TPOT has the TTFT in it."""

    name = "guidellm"

    def row(self, prompt: str, load: Load) -> dict[str, Any]:
        return {"prompt": prompt, "output_tokens_count": load.output_len}

    def arguments(self, load: Load, site: Site, prompts: Path, out: Path) -> list[str]:
        pace = f"kind=concurrent,streams={load.concurrency}"
        if load.rate is not None:
            pace = f"kind=constant,rate={load.rate}"
        target = f"target={site.url},model={site.model},request_format={load.path}"
        return [
            "run", "--backend", f"kind=openai_http,{target}", "--profile", pace,
            "--constraint", f"kind=max_requests,count={load.num_requests}",
            "--tokenizer", f"kind=huggingface_auto,model={site.tokenizer}",
            "--data", f"kind=json_file,path={prompts}",
            "--output", f"kind=json,path={out / 'report.json'}", "--disable-console-interactive",
        ]  # fmt: skip

    def read(self, out: Path) -> Figures:
        (run,) = json.loads((out / "report.json").read_text())["benchmarks"]
        found = {name: value["successful"] for name, value in run["metrics"].items()
                 if isinstance(value, dict) and "successful" in value}  # fmt: skip
        return Figures(
            completed=run["scheduler_metrics"]["requests_made"]["successful"],
            prompt_tokens=found["prompt_token_count"]["mean"],
            output_tokens=found["output_token_count"]["mean"],
            ttft=found["time_to_first_token_ms"]["mean"],
            tpot=found["inter_token_latency_ms"]["mean"],
            output_throughput=found["output_tokens_per_second"]["mean"],
        )


class AIPerf(Tester):
    """aiperf. Its ``inter_token_latency`` is TPOT; our ITL is its ``inter_chunk_latency``."""

    name = "aiperf"

    def environment(self) -> dict[str, str]:
        # Seconds that its many processes have to start; a small machine needs more than it gives.
        return {**os.environ, "AIPERF_SERVICE_REGISTRATION_TIMEOUT": "200"}

    def row(self, prompt: str, load: Load) -> dict[str, Any]:
        return {"text": prompt}

    def arguments(self, load: Load, site: Site, prompts: Path, out: Path) -> list[str]:
        pace = ["--concurrency", str(load.concurrency)]
        if load.rate is not None:
            pace = ["--request-rate", str(load.rate), "--arrival-pattern", "constant"]
        # It would count the bare text of a message, where the server counts the template as well.
        counts = ["--use-server-token-count"] if load.is_chat else []
        return [
            "profile", "--model", site.model, "--url", site.url, "--streaming", *pace, *counts,
            "--endpoint-type", "chat" if load.is_chat else "completions",
            "--tokenizer", str(site.tokenizer), "--request-count", str(load.num_requests),
            "--input-file", str(prompts), "--custom-dataset-type", "single-turn",
            "--extra-inputs", f"max_tokens:{load.output_len}", "--extra-inputs", "ignore_eos:true",
            "--ui", "none", "--artifact-dir", str(out),
        ]  # fmt: skip

    def read(self, out: Path) -> Figures:
        found = json.loads((out / "profile_export_aiperf.json").read_text())
        return Figures(
            completed=int(found["request_count"]["avg"]),
            prompt_tokens=found["input_sequence_length"]["avg"],
            output_tokens=found["output_sequence_length"]["avg"],
            ttft=found["time_to_first_token"]["avg"],
            tpot=found["inter_token_latency"]["avg"],
            output_throughput=found["output_token_throughput"]["avg"],
        )


def write_tokenizer(folder: Path, model: str = EMBEDDED_MODEL) -> None:
    """A model's tokenizer and chat template as files that ``transformers`` reads.

    ``model`` as in ``nsa-serve serve``. The embedded one's are inside its GGUF file. Raises
    ``CheckpointError`` where there is none.
    """
    source = read_source(resolve(ModelSource(model=model)))
    settings: Mapping[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": source.chat_templates.get(DEFAULT_TEMPLATE),
        **source.special_tokens,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(source.tokenizer_json)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
