"""The record of what NSA looked at: right for whoever asked, nothing for others, and bounded."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nsa_serve.engine.output import OutputState
from nsa_serve.request import EngineRequest, FinishReason, SamplingParams, TokenTrace
from nsa_serve.runner import trace as trace_room

from .runner_driver import Driver, Recorder
from .test_runner_model import DECODERS, SHAPE, driver_of, prompt_of

TRACED = SamplingParams(temperature=0.0, trace=True)


def selection_of(token: TokenTrace) -> np.ndarray:
    return np.frombuffer(token.selection, np.int32).reshape(token.shape)


def gates_of(token: TokenTrace) -> np.ndarray:
    assert token.gates is not None
    return np.frombuffer(token.gates, np.float32).reshape(*token.shape[:2], 3)


def seen_again(driver: Driver) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Each layer's selection and gate logits in the runner's last step, computed once more."""
    recorder = driver.runner.model
    assert isinstance(recorder, Recorder)
    layers: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    inputs = replace(recorder.inputs[-1], observer=lambda layer, *seen: layers.append(seen))
    recorder.model.hidden(inputs)
    return layers


@pytest.mark.parametrize("name", ["untrained", "trained"])
def test_the_record_is_what_each_layer_selected_for_the_token_that_sampled(name: str) -> None:
    driver = driver_of(DECODERS[name])
    driver.add(1, prompt_of(40, seed=1))
    driver.add(0, prompt_of(110), TRACED)
    (other, token) = driver.step({1: 40, 0: 110}).tokens
    assert other.trace is None
    assert token.trace is not None
    assert token.trace.token_id == token.token_id
    assert token.trace.position == 109
    layers = seen_again(driver)
    selection = selection_of(token.trace)
    assert selection.shape == (2, 2, SHAPE.num_selected)
    for layer, (chosen, gate_logits) in enumerate(layers):
        assert (selection[layer] == chosen[149].numpy()).all()
        if gate_logits is None:
            assert token.trace.gates is None
        else:
            by_head = 1 / (1 + np.exp(-gate_logits[149].double().numpy()))  # [Hq, 3]
            groups = by_head.reshape(2, 3, 3).mean(1)
            assert gates_of(token.trace)[layer] == pytest.approx(groups, abs=1e-6)


def test_a_record_has_the_blocks_that_nsa_always_reads() -> None:
    driver = driver_of(DECODERS["trained"])
    driver.add(0, prompt_of(110), TRACED)
    driver.finish_prompt(0, 50, 30)
    for _ in range(20):
        (token,) = driver.step({0: 1}).tokens
        assert token.trace is not None
        current = token.trace.position // SHAPE.page
        for chosen in selection_of(token.trace).reshape(-1, SHAPE.num_selected):
            assert {0, current - 1, current} <= set(chosen.tolist())
            assert (np.diff(chosen) > 0).all()


def test_asking_changes_no_token_of_anybody() -> None:
    prompts = {row: prompt_of(70 + row, seed=row) for row in range(3)}

    def texts(sampling: SamplingParams) -> list[list[int]]:
        driver = driver_of(DECODERS["trained"])
        for row, prompt in prompts.items():
            driver.add(row, prompt, sampling if row == 1 else replace_trace(sampling))
        driver.step({row: len(prompt) for row, prompt in prompts.items()})
        driver.generate(prompts, 12)
        return [driver.rows[row].output for row in prompts]

    assert texts(TRACED) == texts(replace_trace(TRACED))


def replace_trace(sampling: SamplingParams) -> SamplingParams:
    return SamplingParams(temperature=sampling.temperature)


def test_a_dense_model_has_nothing_to_show() -> None:
    driver = driver_of(DECODERS["dense"])
    driver.add(0, prompt_of(20), TRACED)
    (token,) = driver.finish_prompt(0).tokens
    assert token.trace is None


def test_a_record_ends_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_per_token = 2 * 2 * (SHAPE.num_selected + 3) * 4
    monkeypatch.setattr(trace_room, "MAX_TRACE_BYTES", 3 * bytes_per_token)
    driver = driver_of(DECODERS["trained"])
    driver.add(0, prompt_of(20), TRACED)
    recorded = [driver.finish_prompt(0).tokens[0].trace is not None]
    recorded += [driver.step({0: 1}).tokens[0].trace is not None for _ in range(5)]
    assert recorded == [True] * 3 + [False] * 3


def test_a_request_that_resumes_goes_on_where_its_record_stood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bytes_per_token = 2 * 2 * (SHAPE.num_selected + 3) * 4
    monkeypatch.setattr(trace_room, "MAX_TRACE_BYTES", 3 * bytes_per_token)
    driver = driver_of(DECODERS["trained"])
    driver.add(0, prompt_of(20), TRACED)
    driver.finish_prompt(0)
    driver.generate([0], 1)
    row = driver.end(0)
    driver.add(0, row.prompt, TRACED, output=row.output)
    (third,) = driver.finish_prompt(0).tokens
    (fourth,) = driver.step({0: 1}).tokens
    assert third.trace is not None
    assert third.trace.position == 21
    assert fourth.trace is None


def test_a_row_forgets_that_its_last_request_asked() -> None:
    driver = driver_of(DECODERS["trained"])
    driver.add(0, prompt_of(20), TRACED)
    driver.finish_prompt(0)
    driver.end(0)
    driver.add(0, prompt_of(30, seed=2))
    (token,) = driver.finish_prompt(0).tokens
    assert token.trace is None


def test_the_final_output_alone_carries_the_record_in_order() -> None:
    request = EngineRequest(request_id="r", prompt_token_ids=[1, 2], sampling=TRACED)
    state = OutputState(request, None, 0.0)
    pieces = [TokenTrace(at, (1, 1, 1), b"\0\0\0\0", None, token_id=at) for at in (1, 2)]
    for piece in pieces:
        state.add_trace(piece)
        state.add_token(piece.token_id, None, 1.0)
        output = state.take()
        assert output is not None
        assert output.trace is None
    state.finish(FinishReason.LENGTH)
    final = state.take()
    assert final is not None
    assert final.trace == pieces
