"""A number hidden in a long text is found through the HTTP API: nothing is lost on the way."""

from __future__ import annotations

import asyncio

import httpx
import pytest
import torch

from nsa_serve.config import NSA_MODEL, EngineConfig, ModelSource
from nsa_serve.engine.build import build_parts
from nsa_serve.engine.engine import Engine
from nsa_serve.evaluate.ablation import Ablation, ablate
from nsa_serve.models.checkpoint import resolve
from nsa_serve.server.app import create_app
from nsa_serve.server.settings import ServerSettings
from nsa_serve.tokenizer import Tokenizer, read_source
from tests.in_process import InProcessEngine
from tests.model_steps import PagedModel
from tests.needle import NUM_TRIALS, Needle, needles
from tests.server_process import running
from tests.true_mass import TrueMassOps

# Minutes of computing on one core, for which the limit of other tests is too tight.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MODEL = "smollm2-135m-instruct"
CHUNK = 1024  # tokens of a step: prompts come in several chunks, at borders of their own
FLAGS = ("--kv-cache-memory-bytes", "512M", "--max-num-batched-tokens", str(CHUNK))


def ask(needle: Needle, **more: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": needle.prompt, "max_tokens": 10, "temperature": 0, **more}


def engine_for(*, ablation: Ablation | None = None, **flags: object) -> tuple[Engine, object]:
    """An engine of the embedded model or another in this process, and its decoder."""
    config = EngineConfig.from_flags(
        device="cpu", attention="nsa", kv_cache_memory_bytes=1 << 29, max_num_batched_tokens=CHUNK,
        **flags,
    )  # fmt: skip
    parts = build_parts(config)
    if ablation is not None:
        ablate(parts.worker.model, ablation)
    engine = Engine(
        parts.scheduler, parts.cache, parts.worker, parts.tokenizer,
        vocab_size=parts.description.vocab_size, depth=parts.depth,
        description=parts.description,
    )  # fmt: skip
    return engine, parts.worker.model


async def completions(engine: Engine, bodies: list[dict[str, object]]) -> list[dict[str, object]]:
    """The answers of a server over ``engine``, asked one after the other."""
    settings = ServerSettings(
        model_names=(MODEL,), max_model_len=8192, vocab_size=engine.description.vocab_size
    )
    app = create_app(InProcessEngine(engine), engine.tokenizer, settings)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answers = [await client.post("/v1/completions", json=body) for body in bodies]
    app.state.services.workers.close()
    for answer in answers:
        assert answer.status_code == 200, answer.text
    return [answer.json() for answer in answers]


def num_found(url: str, trials: list[Needle]) -> int:
    found = 0
    with httpx.Client(base_url=url, timeout=300) as client:
        for needle in trials:
            answer = client.post("/v1/completions", json=ask(needle))
            assert answer.status_code == 200, answer.text
            found += needle.found_in(answer.json()["choices"][0]["text"])
    return found


@pytest.fixture(scope="module")
def encode():
    return Tokenizer(read_source(resolve(ModelSource()))).encode


def test_at_2k_nsa_finds_within_one_of_what_dense_finds(encode):
    trials = list(needles(2000, encode))
    found = {}
    for attention in ("dense", "nsa"):
        with running(MODEL, "--attention", attention, *FLAGS) as server:
            found[attention] = num_found(server.url, trials)
    assert found["dense"] >= NUM_TRIALS - 1
    assert abs(found["nsa"] - found["dense"]) <= 1, found


def test_at_4k_blocks_chosen_by_their_true_mass_find_every_number(encode):
    engine, model = engine_for()
    for layer in model.layers:
        layer.attention.ops = TrueMassOps(layer.attention.ops)
    trials = list(needles(4000, encode))
    answers = asyncio.run(completions(engine, [ask(needle) for needle in trials]))
    texts = [answer["choices"][0]["text"] for answer in answers]
    found = [n.found_in(text) for n, text in zip(trials, texts, strict=True)]
    assert sum(found) == NUM_TRIALS, list(zip(trials, texts, strict=True))
    assert answers[-1]["usage"]["prompt_tokens"] > 3600


def test_the_trained_model_finds_numbers_by_its_selection_and_not_without(encode):
    trials = list(needles(1700, encode))[4:6]  # beyond the window, behind the first block
    found = {}
    for ablation in (None, Ablation.SELECTION):
        engine, _ = engine_for(model=NSA_MODEL, ablation=ablation)
        answers = asyncio.run(completions(engine, [ask(needle) for needle in trials]))
        texts = [answer["choices"][0]["text"] for answer in answers]
        found[ablation] = sum(n.found_in(t) for n, t in zip(trials, texts, strict=True))
    assert found == {None: 2, Ablation.SELECTION: 0}


@pytest.mark.parametrize("num_tokens", [700, 2000, 4000])
def test_the_servers_nsa_logits_are_those_of_one_whole_prefill(encode, num_tokens):
    """Chunks and prefix hits on one side; one step over poisoned pages on the other."""
    engine, model = engine_for(dtype="float32")
    warm, needle = list(needles(num_tokens, encode))[3:5]
    bodies = [ask(needle, max_tokens=1, logprobs=5) for needle in (warm, needle)]
    answer = asyncio.run(completions(engine, bodies))[1]
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]

    ids = encode(needle.prompt)
    hidden = PagedModel(model, [len(ids)]).step([(0, 0, ids)])[-1:]
    expected = model.logits(hidden).log_softmax(-1)[0].topk(5).values
    given = torch.tensor(sorted(top.values(), reverse=True))
    torch.testing.assert_close(given, expected, atol=1e-3, rtol=0)
