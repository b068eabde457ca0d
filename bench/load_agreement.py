"""The same load by ``bench serve``, guidellm and aiperf in turn: whether they say the same of it.

The mock engine gives every request a token at each multiple of its period, so that the machine has
no part in it. Beside what each program says stands what the server itself counted in that run.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from ..config import EMBEDDED_MODEL
from .load.texts import LocalTokens, exact_text, random_words
from .load_testers import (
    AIPerf,
    BenchServe,
    Figures,
    GuideLLM,
    Load,
    Site,
    Tester,
    write_tokenizer,
)
from .measure import environment
from .report import console, save_json, show_table
from .server_process import serving

TOLERANCE = 0.05
COMPARED = ("ttft", "tpot", "output_throughput")
MEANS = ("prompt_tokens", "output_tokens", *COMPARED)
RESULT = Path(__file__).parent / "results" / "load_agreement.json"
RUN_SECONDS = 600
MIN_SHARE = 0.98  # of the requests; a run that lost more was another load
# A rate whose gaps are no multiple of the period: arrivals come at every phase of a step.
LOADS = (
    Load("/v1/completions", concurrency=8),
    Load("/v1/completions", rate=1.9),
    Load("/v1/chat/completions", concurrency=8),
)
_SUM = re.compile(
    r"^\w+:(time_to_first_token|request_time_per_output_token)_seconds_(sum|count)\S* (\S+)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class ServerTimes:
    """Sums and counts of the server's own histograms; seconds."""

    ttft_sum: float
    ttft_count: float
    tpot_sum: float
    tpot_count: float

    @classmethod
    def read(cls, page: str) -> ServerTimes:
        """From a metrics page in vLLM's names, whatever the prefix."""
        found = {(name, kind): float(value) for name, kind, value in _SUM.findall(page)}
        ttft, tpot = "time_to_first_token", "request_time_per_output_token"
        return cls(*(found[name, kind] for name in (ttft, tpot) for kind in ("sum", "count")))

    def since(self, before: ServerTimes) -> tuple[float, float]:
        """Mean (TTFT, TPOT) of the requests between two looks, in milliseconds."""
        new = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        return (
            1e3 * new["ttft_sum"] / new["ttft_count"],
            1e3 * new["tpot_sum"] / new["tpot_count"],
        )


@dataclass(frozen=True, slots=True)
class Run:
    """One tester under one load."""

    load: Load
    tester: str
    figures: Figures
    server_ttft: float  # ms, as the server saw it
    server_tpot: float

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "load": str(self.load)}


class Trial:
    """Runs testers against one server."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._tokens = LocalTokens(str(site.tokenizer))
        self._count = 0

    def run(self, tester: Tester, load: Load) -> Run:
        """Raises ``AssertionError`` where the tester fails, or does not do what was asked."""
        self._count += 1
        out = self._site.folder / f"{self._count}"
        out.mkdir()
        prompts = out / "prompts.jsonl"
        rows = [tester.row(prompt, load) for prompt in asyncio.run(self._prompts(load))]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        before = self._server_times()
        _finish(tester.command(load, self._site, prompts, out), tester.environment())
        times = self._server_times().since(before)
        figures = tester.read(out)
        assert figures.completed >= MIN_SHARE * load.num_requests, (str(load), tester.name, figures)
        console.print(f"{load}, {tester.name}: {figures}")
        return Run(load, tester.name, figures, *times)

    async def _prompts(self, load: Load) -> list[str]:
        rng = random.Random(0)
        return [
            await exact_text(load.prompt_len, self._tokens, lambda: random_words(rng))
            for _ in range(load.num_requests)
        ]

    def _server_times(self) -> ServerTimes:
        return ServerTimes.read(httpx.get(f"{self._site.url}/metrics").text)


def _finish(command: Sequence[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS
    )
    said = f"{shlex.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, said


def mean_of(runs: Sequence[Run]) -> dict[str, float]:
    """Figure by figure over runs of one tester under one load."""
    return {name: statistics.fmean(getattr(run.figures, name) for run in runs) for name in MEANS}


def differences(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """How much more they say than we, as a share of ours."""
    return {name: theirs[name] / ours[name] - 1 for name in COMPARED}


def compare(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row for each load and tester: means over rounds, and their distance from ours."""
    by_load: dict[Load, dict[str, list[Run]]] = {}
    for run in runs:
        by_load.setdefault(run.load, {}).setdefault(run.tester, []).append(run)
    for load, by_tester in by_load.items():
        ours = mean_of(by_tester[BenchServe.name])
        for name, own in by_tester.items():
            theirs = mean_of(own)
            yield {
                "load": str(load), "tester": name, **theirs,
                "server_ttft": statistics.fmean(run.server_ttft for run in own),
                "server_tpot": statistics.fmean(run.server_tpot for run in own),
                "difference": differences(ours, theirs),
            }  # fmt: skip


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    show_table(
        "means; ms and tokens/s; in brackets the difference from bench serve",
        ("load", "by", "TTFT", "server's TTFT", "TPOT", "server's TPOT", "output tokens/s"),
        [
            (
                row["load"], row["tester"], _shown(row, "ttft"), f"{row['server_ttft']:.1f}",
                _shown(row, "tpot"), f"{row['server_tpot']:.1f}", _shown(row, "output_throughput"),
            )
            for row in rows
        ],
    )  # fmt: skip


def _shown(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.1f} ({100 * row['difference'][name]:+.1f} %)"


def version(command: str) -> str:
    """What a program says of itself, without words before it."""
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def main(
    guidellm: Annotated[str, typer.Option(help="Its executable, in an environment of its own.")],
    aiperf: Annotated[str, typer.Option(help="Its executable, in an environment of its own.")],
    token_rate: Annotated[float, typer.Option(help="Tokens/s of each request.")] = 5.0,
    rounds: Annotated[int, typer.Option(help="Of all loads, testers in turn.")] = 3,
    result: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULT,
) -> None:
    """Load a mock server with three programs; exit with 1 where they differ by more than 5 %."""
    testers: list[Tester] = [BenchServe(), GuideLLM([guidellm]), AIPerf([aiperf])]
    flags = (EMBEDDED_MODEL, "--mock-engine", str(token_rate), "--no-enable-prefix-caching")
    with serving(*flags) as server, tempfile.TemporaryDirectory() as folder:
        model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        site = Site(server.url, model, Path(folder))
        write_tokenizer(site.tokenizer)
        trial = Trial(site)
        trial.run(BenchServe(), Load("/v1/completions", concurrency=8, num_requests=8))
        runs = [
            trial.run(testers[(turn + shift) % len(testers)], load)
            for turn in range(rounds)
            for load in LOADS
            for shift in range(len(testers))
        ]
    rows = list(compare(runs))
    show(rows)
    record = {
        "environment": environment(),
        "versions": {"guidellm": version(guidellm), "aiperf": version(aiperf)},
        "server": list(flags), "num_requests": LOADS[0].num_requests,
        "means": rows, "runs": [run.record() for run in runs],
    }  # fmt: skip
    save_json(result, record)
    worst = max(abs(share) for row in rows for share in row["difference"].values())
    raise typer.Exit(worst > TOLERANCE)


if __name__ == "__main__":
    typer.run(main)
