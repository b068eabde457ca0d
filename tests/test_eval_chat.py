"""Chat beside the base: what is measured, what people judge, and that both go together."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from nsa_serve.config import EngineConfig
from nsa_serve.engine.engine import Engine
from nsa_serve.errors import ConfigError, EvaluationStopped
from nsa_serve.evaluate.chat import ChatSet, divergence, read_prompts, run_chat
from nsa_serve.evaluate.flags import ChatFlags
from nsa_serve.evaluate.in_process import InProcess
from nsa_serve.evaluate.over_http import OverHTTP
from nsa_serve.evaluate.record import Record
from nsa_serve.evaluate.verdicts import (
    as_markdown,
    judge,
    open_record,
    read_verdicts,
    write_verdicts,
)
from nsa_serve.llm import LLM
from nsa_serve.server import cli
from nsa_serve.train.held_out_prompts import HELD_OUT_PROMPTS
from tests.eval_served import ADDRESS, asked_both_ways
from tests.server_process import write_small_model

CHATS = ChatSet(HELD_OUT_PROMPTS[:3], max_tokens=10)
LENGTH = 512


def config_of(folder: Path, seed: int) -> EngineConfig:
    return EngineConfig.from_flags(
        model=str(folder), random_weights=True, device="cpu", attention="dense", dtype="float32",
        kv_cache_memory_bytes=4 << 20, max_model_len=LENGTH, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    folder = write_small_model(tmp_path_factory.mktemp("model"))
    config = config_of(folder, 0)
    return InProcess(LLM.over(Engine.from_config(config), config))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Another model of bytes, in process and behind the server's routes."""
    config = config_of(write_small_model(tmp_path_factory.mktemp("other")), 1)
    with asked_both_ways(config) as subjects:
        yield subjects


def run(subject: Any, base: InProcess, path: Path, chats: ChatSet = CHATS) -> Record:
    record = Record.open(path, "chat", subject.description, chats.settings(base))
    record.finish(run_chat(chats, subject, base, record, lambda count: None))
    return record


def summary_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["summary"]
    return found


def test_a_model_beside_itself_is_equal_and_not_apart(base: InProcess, tmp_path: Path) -> None:
    record = run(base, base, tmp_path / "r.json")
    assert [item["prompt"] for item in record.items.values()] == list(HELD_OUT_PROMPTS[:3])
    found = summary_of(tmp_path / "r.json")
    assert found["verdicts"] == {"better": 0, "equal": 3, "worse": 0, "open": 0}
    assert found["same"] == 3
    assert found["divergence"] == pytest.approx(0, abs=1e-5)
    assert found["base_logprob_of_answers"] == found["base_logprob_of_own"] < 0


def test_another_model_is_measured_alike_through_http(
    base: InProcess, others: dict[str, Any], tmp_path: Path
) -> None:
    through_http, in_process = (run(s, base, tmp_path / n).items for n, s in others.items())
    for name, item in in_process.items():
        other = through_http[name]
        for key in ("prompt", "answer", "base_answer", "tokens", "base_tokens", "verdict"):
            assert item[key] == other[key]
        for key in ("base_logprob", "base_logprob_of_own", "divergence"):
            assert item[key] == pytest.approx(other[key], abs=2e-5)
        assert item["verdict"] == ("equal" if item["answer"] == item["base_answer"] else None)
        assert item["divergence"] > 0
        assert 0 < item["tokens"] <= CHATS.max_tokens
    found = summary_of(tmp_path / "http")
    assert found["verdicts"]["open"] == 3 - found["same"] > 0


def test_likelihood_is_that_of_the_answers_tokens(base: InProcess, tmp_path: Path) -> None:
    (item, *_) = run(base, base, tmp_path / "r.json").items.values()
    asked, said = base.encode_answered(item["prompt"], item["answer"])
    said = said[: CHATS.max_tokens]
    (logprobs,) = base.logprobs([asked + said])
    assert len(said) == item["tokens"] == item["base_tokens"]
    wanted = math.fsum(logprobs[len(asked) - 1 :]) / len(said)
    assert item["base_logprob_of_own"] == pytest.approx(wanted, abs=1e-5)


def test_what_is_there_is_not_asked_again(base: InProcess, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    before = dict(run(base, base, path, ChatSet(HELD_OUT_PROMPTS[:2], 4)).items)
    record = Record.open(
        path, "chat", base.description, ChatSet(HELD_OUT_PROMPTS[:2], 4).settings(base)
    )
    told: list[int] = []
    run_chat(ChatSet(HELD_OUT_PROMPTS[:2], 4), base, base, record, told.append)
    assert told == [2]
    assert record.items == before


def candidates(probabilities: torch.Tensor, count: int) -> dict[int, float]:
    best = probabilities.topk(count)
    return dict(zip(best.indices.tolist(), best.values.log().tolist(), strict=True))


def test_divergence_is_a_lower_bound_that_is_met_where_all_tokens_are_candidates() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p, q = torch.randn(2, 40, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
        whole = float((p * (p / q).log()).sum())
        assert divergence(candidates(p, 40), candidates(q, 40)) == pytest.approx(whole, abs=1e-4)
        part = divergence(candidates(p, 10), candidates(q, 10))
        assert -1e-9 <= part <= whole + 1e-9
        assert divergence(candidates(p, 10), candidates(p, 10)) == pytest.approx(0, abs=1e-9)


def test_another_tokenizer_is_refused(base: InProcess, tmp_path: Path) -> None:
    class Words:
        description = base.description

        def encode(self, text: str) -> list[int]:
            return list(range(len(text.split())))

    with pytest.raises(ConfigError, match="has another tokenizer"):
        run(Words(), base, tmp_path / "r.json")


@pytest.mark.parametrize("entries", [None, [], [None]])
def test_a_server_without_prompt_logprobs_is_told_of(entries: Any) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("models"):
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        return httpx.Response(200, json={"choices": [{"text": "", "prompt_logprobs": entries}]})

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://test") as client:
        subject = OverHTTP(ADDRESS, client)
        with pytest.raises(EvaluationStopped, match="gives no prompt_logprobs"):
            subject.candidates([[1, 2, 3]])


@pytest.fixture
def judged(base: InProcess, others: dict[str, Any], tmp_path: Path) -> Path:
    """A record of three answers, and its empty verdicts."""
    record = run(others["in process"], base, tmp_path / "r.json")
    write_verdicts(tmp_path / "r.csv", record.items)
    return tmp_path / "r.json"


def fill_in(path: Path, words: list[str]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, word in zip(rows, words, strict=True):
        row["verdict"] = word
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_verdicts_are_read_as_they_were_filled_in(judged: Path) -> None:
    table, record = judged.with_suffix(".csv"), open_record(judged)
    wanted = [item["verdict"] for item in record.items.values()]
    assert list(read_verdicts(table, record.items).values()) == wanted
    fill_in(table, ["better", " Worse ", ""])
    judge(record, read_verdicts(table, record.items))
    assert [item["verdict"] for item in record.items.values()] == ["better", "worse", None]


def test_verdicts_on_other_answers_or_of_other_words_are_refused(judged: Path) -> None:
    table, record = judged.with_suffix(".csv"), open_record(judged)
    fill_in(table, ["good", "", ""])
    with pytest.raises(ConfigError, match="number 01 is 'good', and not one of better, equal"):
        read_verdicts(table, record.items)
    other = {name: {**item, "answer": "!"} for name, item in record.items.items()}
    with pytest.raises(ConfigError, match="number 01 is of other answers"):
        read_verdicts(table, other)
    with pytest.raises(ConfigError, match="one line for each of the 2 prompts"):
        read_verdicts(table, dict(list(record.items.items())[:2]))
    table.write_text("number;verdict\n01;better\n")
    with pytest.raises(ConfigError, match="is no file of verdicts"):
        read_verdicts(table, record.items)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1, "kind": "ppl", "items": {}}'])
def test_what_is_no_record_of_chat_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match="is no record of eval chat"):
        open_record(tmp_path / "r.json")


def test_the_table_is_whole_whatever_the_answers_hold(judged: Path) -> None:
    record = open_record(judged)
    record.items["01"] = {**record.items["01"], "answer": "a | b\n<b>c</b>\r\n\\| d"}
    text = as_markdown(record, summary_of(judged))
    rows = [line for line in text.splitlines() if line.startswith("| 0")]
    assert len(rows) == 3
    assert "a \\| b<br>&lt;b>c&lt;/b><br>\\\\\\| d" in rows[0]


@pytest.fixture
def invoke(
    base: InProcess, others: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """The command line over models that are loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ChatFlags, "subject", lambda self: nullcontext(others["in process"]))
    monkeypatch.setattr(ChatFlags, "open_base", lambda self: base)
    return lambda *arguments: CliRunner().invoke(cli.app, ["eval", *arguments])


def test_the_command_writes_what_people_judge_and_keeps_their_verdicts(
    invoke: Any, tmp_path: Path
) -> None:
    asked = ("chat", "--prompts", "2", "--max-tokens", "6")
    shown = invoke(*asked)
    assert shown.exit_code == 0, shown.output
    assert "divergence" in shown.output
    path = tmp_path / "eval-chat.json"
    assert "What is the capital of France?" in path.with_suffix(".md").read_text()
    fill_in(path.with_suffix(".csv"), ["equal", "worse"])
    shown = invoke("verdicts", str(path))
    assert shown.exit_code == 0, shown.output
    wanted = {"better": 0, "equal": 1, "worse": 1, "open": 0}
    assert summary_of(path)["verdicts"] == wanted
    assert "1 equal, 1 worse" in path.with_suffix(".md").read_text()
    assert invoke(*asked).exit_code == 0  # all is there; what was judged stays
    assert summary_of(path)["verdicts"] == wanted


def test_prompts_of_a_file_are_asked_in_place_of_the_held_out_ones(
    invoke: Any, tmp_path: Path
) -> None:
    (tmp_path / "q.txt").write_text("How do tides work?\n\n  Name a tree.  \nWhy?\n")
    asked = ("chat", "--questions", "q.txt", "--prompts", "2", "--max-tokens", "6")
    shown = invoke(*asked)
    assert shown.exit_code == 0, shown.output
    items = open_record(tmp_path / "eval-chat.json").items
    assert [item["prompt"] for item in items.values()] == ["How do tides work?", "Name a tree."]
    (tmp_path / "q.txt").write_text("How do tides work?\nName a river.\n")
    refused = invoke(*asked)  # other prompts are no run to go on with
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff", b"x" * 2001, b"a\n" * 1001])
def test_a_file_of_no_prompts_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(content)
    with pytest.raises(ConfigError, match="--questions"):
        read_prompts(tmp_path / "q.txt")
    with pytest.raises(ConfigError, match="can't be read"):
        read_prompts(tmp_path / "absent.txt")


def test_a_missing_record_is_told_in_one_line(invoke: Any) -> None:
    result = invoke("verdicts", "absent.json")
    assert result.exit_code == 2
    assert "is no record of eval chat" in result.stderr
    assert result.stderr.count("\n") == 1


def test_two_models_share_a_device_with_small_caches_and_the_base_is_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(ChatFlags().chats().prompts) == 50
    assert ChatSet() == ChatFlags().chats()
    assert ChatFlags().engine_config().cache.kv_cache_memory_bytes == 512 << 20
    given = ChatFlags(kv_cache_memory_bytes="1GiB", device="cpu", base="some/base")
    assert given.engine_config().cache.kv_cache_memory_bytes == 1 << 30
    seen: list[EngineConfig] = []
    monkeypatch.setattr(InProcess, "load", seen.append)
    given.open_base()
    assert seen[0].source.model == "some/base"
    assert seen[0].source.attention == "dense"
    assert seen[0].cache.kv_cache_memory_bytes == 1 << 30
