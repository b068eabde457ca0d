"""The engine's loop and its messages: every command has its report, and nothing spins."""

import pytest

from nsa_serve.config import EngineConfig, ModelSource
from nsa_serve.engine.loop import IDLE_SECONDS, EngineLoop
from nsa_serve.engine.messages import (
    Abort,
    Command,
    Fatal,
    LoadProgress,
    Ping,
    Report,
    Shutdown,
    Submit,
    Survey,
    Unreadable,
    command_decoder,
    config_decoder,
    encoder,
    event_decoder,
    frame,
    read_frame,
)
from nsa_serve.request import FinishReason, RequestOutput, TokenLogprob, Usage
from tests.scripted_engine import Bench, make_request


class ListPort:
    """Hands out one batch of commands a turn; keeps the reports and how long it might wait."""

    def __init__(self, batches: list[list[Command | Unreadable]]) -> None:
        self.batches = batches
        self.reports: list[Report] = []
        self.timeouts: list[float | None] = []

    def receive(self, timeout: float | None) -> list[Command | Unreadable]:
        self.timeouts.append(timeout)
        if self.batches:
            return self.batches.pop(0)
        return [Shutdown()] if timeout is None else []

    def send(self, report: Report) -> None:
        self.reports.append(report)


def run(bench: Bench, *batches: list[Command | Unreadable]) -> ListPort:
    port = ListPort(list(batches))
    EngineLoop(bench.engine, port, bench.clock).run()
    return port


def outputs_of(port: ListPort, name: str) -> list[RequestOutput]:
    return [o for report in port.reports for o in report.outputs if o.request_id == name]


def test_a_submitted_request_is_reported_step_by_step_then_the_loop_waits() -> None:
    port = run(Bench({"a": [9]}), [Submit(make_request("a", max_tokens=3))])
    outputs = outputs_of(port, "a")
    assert [o.token_ids for o in outputs] == [[9], [9], [9]]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    # No waiting while there is work; then one idle second, the check of the books, then for ever.
    assert port.timeouts == [None, 0.0, 0.0, IDLE_SECONDS, None]


def test_before_its_first_step_an_idle_engine_tells_what_has_come() -> None:
    submitted = Submit(make_request("a", range(3, 11), max_tokens=1))
    first, *rest = run(Bench({"a": [9]}), [submitted]).reports
    assert (first.stats.num_waiting, first.stats.num_queued_tokens, first.outputs) == (1, 8, [])
    assert len(rest[0].outputs) == 1


@pytest.mark.parametrize(("sent", "arrival"), [(None, 20.0), (17.5, 17.5), (21.0, 20.0)])
def test_a_request_has_arrived_when_it_was_sent_and_not_when_the_loop_turned(
    sent: float | None, arrival: float
) -> None:
    bench = Bench({"a": [9]})
    bench.clock.now = 20.0
    (output,) = outputs_of(run(bench, [Submit(make_request("a", max_tokens=1), sent)]), "a")
    assert output.times is not None
    assert output.times.arrival == arrival


def test_a_survey_is_answered_once_with_who_holds_what() -> None:
    port = run(
        Bench({"a": [9]}, num_blocks=8),
        [Submit(make_request("a", range(3, 11), max_tokens=3))],
        [Survey(), Survey()],
        [],
        [Survey()],
    )
    running, ended = [report.cache for report in port.reports if report.cache is not None]
    assert sorted(running.holders) == [0] * 6 + [1] * 2
    assert sorted(ended.holders) == [0] * 6 + [255] * 2
    assert running.spilled == ended.spilled == []


def test_outputs_of_one_step_travel_in_one_report() -> None:
    submits = [Submit(make_request(f"r{i}", max_tokens=2)) for i in range(8)]
    port = run(Bench({f"r{i}": [9] for i in range(8)}), list(submits))
    assert [len(report.outputs) for report in port.reports] == [0, 8, 8, 0]


def test_a_refused_request_is_rejected_with_everything_about_the_error() -> None:
    bench = Bench({"a": [9]}, max_num_queued_reqs=1)
    submits = [
        Submit(make_request("a", max_tokens=2)),
        Submit(make_request("b")),
        Submit(make_request("c", top_p=7.0)),
        Submit(make_request("d", range(5, 200))),
        Unreadable("e", "Expected `int`, got `str`"),
    ]
    port = run(bench, list(submits))
    rejections = {r.request_id: r for report in port.reports for r in report.rejections}
    assert rejections["b"].kind == "Overloaded"
    assert (rejections["b"].retry_after or 0) >= 1
    assert (rejections["c"].kind, rejections["c"].param) == ("InvalidParameter", "top_p")
    assert rejections["d"].kind == "PromptTooLong"
    assert rejections["e"].message == "Expected `int`, got `str`"
    assert outputs_of(port, "a")[-1].finish_reason is FinishReason.LENGTH


def test_an_abort_is_answered_with_a_final_output_once() -> None:
    port = run(
        Bench({"a": [9]}),
        [Submit(make_request("a", max_tokens=50))],
        [Abort("a")],
        [Abort("a"), Abort("never was")],
    )
    assert [o.finish_reason for o in outputs_of(port, "a")] == [None, FinishReason.ABORT]


def test_a_ping_is_answered_even_when_there_is_no_work() -> None:
    ping, shutdown = run(Bench({}), [Ping()]).reports
    assert ping == shutdown


def test_books_that_do_not_balance_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench({"a": [9]})
    bench.cache._pool.take()
    with pytest.raises(AssertionError):
        run(bench, [Submit(make_request("a", max_tokens=1))])


MESSAGES = [
    Submit(make_request("a", stop=("x",), logit_bias={3: -1.5}, seed=7, logprobs=2), 12.5),
    Abort("a"),
    Ping(),
    Shutdown(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_commands_survive_the_wire(message: Command) -> None:
    assert command_decoder.decode(encoder.encode(message)) == message


def test_events_survive_the_wire() -> None:
    output = RequestOutput(
        request_id="a",
        text="é👩",
        token_ids=[1, 2],
        logprobs=[TokenLogprob(1, -0.5, 1, [(1, -0.5), (2, -1.5)])],
        prompt_logprobs=[None, TokenLogprob(5, -0.25, 3, [])],
        finish_reason=FinishReason.STOP,
        stop_reason="x",
        usage=Usage(3, 2, 1),
    )
    for event in (
        Report(Bench({}).engine.stats(), [output]),
        LoadProgress(1, 2),
        Fatal("ConfigError", "no"),
    ):
        assert event_decoder.decode(encoder.encode(event)) == event


def test_a_configuration_survives_the_pipe(tmp_path) -> None:
    config = EngineConfig(source=ModelSource(model="x", max_model_len=7))
    pipe = tmp_path / "pipe"
    pipe.write_bytes(frame(encoder.encode(config)) + b"later")
    with pipe.open("rb") as stream:
        assert config_decoder.decode(read_frame(stream)) == config
    pipe.write_bytes(frame(b"abc")[:-1])
    with pipe.open("rb") as stream, pytest.raises(EOFError):
        read_frame(stream)
