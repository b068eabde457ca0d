"""The flags of ``bench serve`` and ``bench sweep``, in vLLM's spelling where vLLM has them."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import ConfigError
from .arrivals import Arrivals, RampUp
from .datasets import DatasetName, DatasetSettings
from .endpoint import CHAT, COMPLETIONS
from .metrics import METRICS, parse_goodput

_SERVER, _DATA, _LOAD, _SAMPLING, _REPORT = (
    "Server",
    "Dataset",
    "Load",
    "Sampling",
    "Report",
)
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logprobs",
)


def _flag(panel: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, show_default=True, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """Everything that both commands take. Fields are flags, their defaults the flags' defaults."""

    more_goodput: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="METRIC:MS")] = (
        None
    )

    base_url: Annotated[str | None, _flag(_SERVER, "--base-url", help="Address of the server.")] = (
        None
    )
    host: Annotated[str, _flag(_SERVER, "--host", help="Without --base-url.")] = "127.0.0.1"
    port: Annotated[int, _flag(_SERVER, "--port", help="Without --base-url.")] = 8000
    backend: Annotated[
        str, _flag(_SERVER, "--backend", help="openai (text completions) or openai-chat.")
    ] = "openai"
    endpoint: Annotated[
        str | None, _flag(_SERVER, "--endpoint", help="Path; default: the backend's.")
    ] = None
    model: Annotated[
        str | None, _flag(_SERVER, "--model", help="Name in the API; default: the first one.")
    ] = None
    tokenizer: Annotated[
        str | None,
        _flag(_SERVER, "--tokenizer", help="Folder or Hub id; default: the server's /tokenize."),
    ] = None
    api_key: Annotated[
        str | None,
        _flag(_SERVER, "--api-key", envvar="OPENAI_API_KEY", help="Key of the server."),
    ] = None
    header: Annotated[
        list[str] | None, _flag(_SERVER, "--header", metavar="KEY=VALUE", help="Repeat for more.")
    ] = None
    insecure: Annotated[bool, _flag(_SERVER, "--insecure", help="Accept any TLS certificate.")] = (
        False
    )
    request_timeout: Annotated[
        float, _flag(_SERVER, "--request-timeout", min=0.001, help="Seconds for a whole answer.")
    ] = 6 * 3600.0
    ready_check_timeout_sec: Annotated[
        float, _flag(_SERVER, "--ready-check-timeout-sec", min=0, help="Wait for the server.")
    ] = 0.0

    dataset_name: Annotated[DatasetName, _flag(_DATA, "--dataset-name", help="What is asked.")] = (
        DatasetName.RANDOM
    )
    dataset_path: Annotated[
        Path | None, _flag(_DATA, "--dataset-path", help="File of sharegpt or custom.")
    ] = None
    num_prompts: Annotated[int, _flag(_DATA, "--num-prompts", min=1, help="Requests.")] = 1000
    seed: Annotated[int, _flag(_DATA, "--seed", help="Of texts and arrivals.")] = 0
    input_len: Annotated[
        int | None, _flag(_DATA, "--input-len", min=1, help="Prompt tokens, of any dataset.")
    ] = None
    output_len: Annotated[
        int | None, _flag(_DATA, "--output-len", min=1, help="Output tokens, of any dataset.")
    ] = None
    random_input_len: Annotated[int, _flag(_DATA, "--random-input-len", min=1)] = 1024
    random_output_len: Annotated[int, _flag(_DATA, "--random-output-len", min=1)] = 128
    random_range_ratio: Annotated[
        float, _flag(_DATA, "--random-range-ratio", min=0, max=1, help="Lengths vary by ±.")
    ] = 0.0
    random_prefix_len: Annotated[
        int, _flag(_DATA, "--random-prefix-len", min=0, help="Tokens that all prompts share.")
    ] = 0
    sharegpt_output_len: Annotated[
        int | None, _flag(_DATA, "--sharegpt-output-len", min=1, help="Default: the answers'.")
    ] = None
    custom_output_len: Annotated[
        int | None, _flag(_DATA, "--custom-output-len", min=1, help="Default: the rows', or 256.")
    ] = None
    prefix_repetition_prefix_len: Annotated[
        int, _flag(_DATA, "--prefix-repetition-prefix-len", min=1)
    ] = 256
    prefix_repetition_suffix_len: Annotated[
        int, _flag(_DATA, "--prefix-repetition-suffix-len", min=1)
    ] = 256
    prefix_repetition_num_prefixes: Annotated[
        int, _flag(_DATA, "--prefix-repetition-num-prefixes", min=1)
    ] = 10
    prefix_repetition_output_len: Annotated[
        int, _flag(_DATA, "--prefix-repetition-output-len", min=1)
    ] = 128
    conversation_turns: Annotated[
        int, _flag(_DATA, "--conversation-turns", min=1, help="Turns of a conversation.")
    ] = 4
    conversation_system_len: Annotated[
        int, _flag(_DATA, "--conversation-system-len", min=0, help="Shared system prompt.")
    ] = 0
    conversation_think_time: Annotated[
        float, _flag(_DATA, "--conversation-think-time", min=0, help="Seconds between turns.")
    ] = 0.0
    no_oversample: Annotated[
        bool, _flag(_DATA, "--no-oversample", help="Don't repeat rows of a short file.")
    ] = False

    burstiness: Annotated[
        float, _flag(_LOAD, "--burstiness", help="1: Poisson; less: bursts; more: steadier.")
    ] = 1.0
    max_concurrency: Annotated[
        int | None, _flag(_LOAD, "--max-concurrency", min=1, help="Most requests under way.")
    ] = None
    num_warmups: Annotated[
        int | None, _flag(_LOAD, "--num-warmups", min=0, help="Requests before, not measured.")
    ] = None
    goodput: Annotated[
        list[str] | None,
        _flag(_LOAD, "--goodput", metavar="METRIC:MS", help="ttft:200 tpot:50 e2el:9000"),
    ] = None

    ignore_eos: Annotated[
        bool, _flag(_SAMPLING, "--ignore-eos", help="Answers as long as asked for.")
    ] = False
    temperature: Annotated[float | None, _flag(_SAMPLING, "--temperature", min=0)] = None
    top_p: Annotated[float | None, _flag(_SAMPLING, "--top-p")] = None
    top_k: Annotated[int | None, _flag(_SAMPLING, "--top-k")] = None
    min_p: Annotated[float | None, _flag(_SAMPLING, "--min-p")] = None
    frequency_penalty: Annotated[float | None, _flag(_SAMPLING, "--frequency-penalty")] = None
    presence_penalty: Annotated[float | None, _flag(_SAMPLING, "--presence-penalty")] = None
    repetition_penalty: Annotated[float | None, _flag(_SAMPLING, "--repetition-penalty")] = None
    logprobs: Annotated[int | None, _flag(_SAMPLING, "--logprobs", min=0)] = None
    extra_body: Annotated[
        str | None, _flag(_SAMPLING, "--extra-body", metavar="JSON", help="Added to each request.")
    ] = None

    percentile_metrics: Annotated[
        str, _flag(_REPORT, "--percentile-metrics", help="Of ttft, tpot, itl, e2el.")
    ] = ",".join(METRICS)
    metric_percentiles: Annotated[
        str, _flag(_REPORT, "--metric-percentiles", help="Such as 50,90,99.")
    ] = "99"
    label: Annotated[str | None, _flag(_REPORT, "--label", help="Begins the file's name.")] = None
    metadata: Annotated[
        list[str] | None,
        _flag(_REPORT, "--metadata", metavar="KEY=VALUE", help="Kept in the JSON; repeat."),
    ] = None
    result_dir: Annotated[Path, _flag(_REPORT, "--result-dir", help="Where files go.")] = Path(".")
    result_filename: Annotated[
        str | None, _flag(_REPORT, "--result-filename", help="Default: label, rate, model, date.")
    ] = None
    plot: Annotated[bool, _flag(_REPORT, "--plot", help="Save PNGs.")] = False
    disable_tqdm: Annotated[bool, _flag(_REPORT, "--disable-tqdm", help="No progress line.")] = (
        False
    )

    @property
    def url(self) -> str:
        return self.base_url or f"http://{self.host}:{self.port}"

    @property
    def path(self) -> str:
        """The route: ``--endpoint``, else the backend's own."""
        paths = {"openai": COMPLETIONS, "vllm": COMPLETIONS, "openai-chat": CHAT}
        if self.backend not in paths:
            raise ConfigError(f"--backend is one of {', '.join(paths)}, not {self.backend}")
        path = self.endpoint or paths[self.backend]
        if not path.startswith("/") or not path.endswith("/completions"):
            raise ConfigError(f"--endpoint {path} is neither {COMPLETIONS} nor {CHAT}")
        return path

    @property
    def headers(self) -> dict[str, str]:
        key = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {**key, **_pairs("--header", self.header)}

    @property
    def metadata_pairs(self) -> dict[str, str]:
        return _pairs("--metadata", self.metadata)

    @property
    def limits(self) -> dict[str, float]:
        """``--goodput`` in milliseconds; words after it belong to it, as in vLLM."""
        return parse_goodput([*(self.goodput or ()), *(self.more_goodput or ())])

    @property
    def extra(self) -> dict[str, Any]:
        """What each request's body has beside its prompt and length."""
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        body = {name: value for name, value in given.items() if value is not None}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return {**body, **_json_object("--extra-body", self.extra_body)}

    @property
    def metrics(self) -> tuple[str, ...]:
        names = tuple(name.strip() for name in self.percentile_metrics.split(","))
        unknown = set(names) - set(METRICS)
        if unknown:
            raise ConfigError(
                f"--percentile-metrics knows {', '.join(METRICS)}, not {', '.join(sorted(unknown))}"
            )
        return names

    @property
    def percentiles(self) -> tuple[float, ...]:
        try:
            values = tuple(float(part) for part in self.metric_percentiles.split(","))
        except ValueError:
            values = (-1.0,)
        if not all(0 <= value <= 100 for value in values):
            raise ConfigError(
                f"--metric-percentiles {self.metric_percentiles} must be numbers from 0 to 100"
            )
        return values

    def check(self) -> None:
        """Raise ``ConfigError`` for what could not be reported after a long run."""
        for _ in (self.metrics, self.percentiles, self.limits, self.metadata_pairs):
            pass
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("--plot needs matplotlib: pip install 'nsa-serve[bench]'")

    def dataset(self) -> DatasetSettings:
        """The dataset's settings; the general lengths go before its own."""
        name = self.dataset_name
        inputs, outputs = self.random_input_len, self.random_output_len
        own: dict[DatasetName, int | None] = {
            DatasetName.SHAREGPT: self.sharegpt_output_len,
            DatasetName.CUSTOM: self.custom_output_len,
            DatasetName.PREFIX_REPETITION: self.prefix_repetition_output_len,
        }
        prefixes = {
            DatasetName.RANDOM: self.random_prefix_len,
            DatasetName.PREFIX_REPETITION: self.prefix_repetition_prefix_len,
            DatasetName.CONVERSATION: self.conversation_system_len,
        }
        return DatasetSettings(
            name=name,
            path=self.dataset_path,
            num_prompts=self.num_prompts,
            seed=self.seed,
            input_len=self.input_len or inputs,
            output_len=self.output_len or own.get(name, outputs),
            range_ratio=self.random_range_ratio,
            prefix_len=prefixes.get(name, 0),
            num_prefixes=self.prefix_repetition_num_prefixes,
            suffix_len=self.prefix_repetition_suffix_len,
            num_turns=self.conversation_turns,
            no_oversample=self.no_oversample,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLoadFlags(LoadFlags):
    """The flags of ``bench serve``."""

    request_rate: Annotated[
        float, _flag(_LOAD, "--request-rate", help="Requests a second; inf: all at once.")
    ] = math.inf
    ramp_up_strategy: Annotated[
        RampUp | None, _flag(_LOAD, "--ramp-up-strategy", help="Let the rate climb.")
    ] = None
    ramp_up_start_rps: Annotated[float | None, _flag(_LOAD, "--ramp-up-start-rps")] = None
    ramp_up_end_rps: Annotated[float | None, _flag(_LOAD, "--ramp-up-end-rps")] = None
    save_result: Annotated[bool, _flag(_REPORT, "--save-result", help="Save a JSON file.")] = False
    save_detailed: Annotated[
        bool, _flag(_REPORT, "--save-detailed", help="With every request in it.")
    ] = False
    append_result: Annotated[
        bool, _flag(_REPORT, "--append-result", help="Add a line to --result-filename.")
    ] = False

    def arrivals(self) -> Arrivals:
        """The process of arrivals. Raises ``ConfigError`` for one that can't be."""
        return arrivals(
            self.request_rate,
            self.burstiness,
            ramp=self.ramp_up_strategy,
            start=self.ramp_up_start_rps,
            end=self.ramp_up_end_rps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFlags(LoadFlags):
    """The flags of ``bench sweep``."""

    start_rate: Annotated[
        float, _flag(_LOAD, "--start-rate", help="First rate, requests/s; then doubled.")
    ] = 1.0
    max_rate: Annotated[
        float, _flag(_LOAD, "--max-rate", help="No rate beyond this, requests/s.")
    ] = 1024.0
    step_seconds: Annotated[
        float, _flag(_LOAD, "--step-seconds", min=0.1, help="Seconds of arrivals of a step.")
    ] = 30.0
    precision: Annotated[
        float, _flag(_LOAD, "--precision", help="Bisect until the ends differ by this share.")
    ] = 0.05


def arrivals(
    rate: float,
    burstiness: float,
    *,
    ramp: RampUp | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Arrivals:
    """``Arrivals`` of flags. Raises ``ConfigError`` for what can't be."""
    if not rate > 0:
        raise ConfigError(f"--request-rate must be positive, not {rate:g}")
    if not burstiness > 0:
        raise ConfigError(f"--burstiness must be positive, not {burstiness:g}")
    if ramp is None:
        return Arrivals(rate, burstiness)
    if not math.isinf(rate):
        raise ConfigError("--ramp-up-strategy sets the rate: leave --request-rate out")
    if start is None or end is None or not 0 < start <= end:
        raise ConfigError("--ramp-up-strategy needs 0 < --ramp-up-start-rps ≤ --ramp-up-end-rps")
    return Arrivals(rate, burstiness, ramp, start, end)


def _pairs(flag: str, items: list[str] | None) -> dict[str, str]:
    pairs = [item.partition("=") for item in items or ()]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ConfigError(f"{flag} {key!r} is not KEY=VALUE")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"{flag} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{flag} must be a JSON object")
    return value
