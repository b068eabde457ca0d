"""Dialogues of the base: no prompt that judges chat, no loops, and what is learnt from them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from string import Formatter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from typer.testing import CliRunner

from nsa_serve.errors import CheckpointError, ConfigError, TrainingFailed
from nsa_serve.kernels.training.packed import PackedBatch
from nsa_serve.request import FinishReason
from nsa_serve.train import __main__ as commands
from nsa_serve.train import decoder
from nsa_serve.train.batches import BatchPlan, BatchSource
from nsa_serve.train.corpus import Corpus, write_corpus
from nsa_serve.train.decoder import DenseCausalAttention
from nsa_serve.train.dialogue_writer import hold_dialogues, summary, without_loop
from nsa_serve.train.dialogues import Dialogues, draw_to_length
from nsa_serve.train.grow import Growth, build_source
from nsa_serve.train.held_out_prompts import HELD_OUT_PROMPTS, is_held_out
from nsa_serve.train.prompt_templates import FOLLOW_UPS, TEMPLATES
from nsa_serve.train.prompt_words import WORDS
from nsa_serve.train.prompts import Prompt, draw_prompt, draw_prompts, fill, read_topics
from nsa_serve.train.sequences import PADDING, SPOKEN, SYSTEM

from .server_process import write_small_model
from .tiny_training import load_tokenizer, make_corpus, make_source, make_trainer, write_base

NUMBERS = {"n", "big", "few"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def topics(tokenizer):
    return read_topics(make_corpus(tokenizer), tokenizer)


def folded(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def test_no_prompt_by_which_chat_is_judged_is_drawn(topics):
    assert len(set(HELD_OUT_PROMPTS)) == 50
    judged = {folded(prompt) for prompt in HELD_OUT_PROMPTS}
    rng = random.Random(0)
    drawn = [turn for _ in range(30_000) for turn in draw_prompt(rng, topics).turns]
    assert not judged & {folded(turn) for turn in drawn}
    assert not any(is_held_out(turn) for turn in drawn)
    # The templates would give them, were they not left out.
    sea = "Write a two-line poem about {theme}."
    assert sea in TEMPLATES["creative"]
    assert any(folded(fill(rng, sea, {"theme": ("fog", "the sea")})) in judged for _ in range(50))


@pytest.mark.parametrize("prompt", HELD_OUT_PROMPTS)
def test_a_held_out_prompt_is_known_in_other_case_order_and_company(prompt):
    assert is_held_out(prompt)
    assert is_held_out(prompt.upper())
    assert is_held_out(f"Please, {' '.join(reversed(prompt.split()))} Thank you!")


def test_prompts_like_held_out_ones_are_not_held_out():
    for prompt in ("What is the capital of Peru?", "Write a haiku about fog.", "How are you?"):
        assert not is_held_out(prompt)


def test_every_template_can_be_filled_and_every_word_has_its_place(topics):
    templates = [template for own in TEMPLATES.values() for template in own]
    assert len(set(templates)) >= 150
    places = {
        place.rstrip("0123456789")
        for template in (*templates, *FOLLOW_UPS)
        for _, place, _, _ in Formatter().parse(template)
        if place is not None
    }
    assert places <= {*topics, *NUMBERS}
    assert {*WORDS} - places == {"role"}
    for template in templates:
        text = fill(random.Random(1), template, topics)
        assert "{" not in text
        assert text[0] == text[0].upper()
    for name, words in WORDS.items():
        assert len(set(words)) == len(words), name


def test_a_prompt_holds_no_word_twice(topics):
    template = "Compare a {animal} with a {animal2}."
    for seed in range(200):
        words = fill(random.Random(seed), template, topics)[:-1].split()
        assert words[2] != words[-1]


def test_prompts_differ_and_are_the_same_for_the_same_seed(topics):
    prompts = draw_prompts(1, 400, topics)
    assert prompts == draw_prompts(1, 400, topics)
    assert prompts != draw_prompts(2, 400, topics)
    assert len({prompt.turns for prompt in prompts}) == 400
    greedy = sum(prompt.temperature == 0 for prompt in prompts)
    assert 150 < greedy < 250
    assert {prompt.temperature for prompt in prompts} == {0.0, 0.7}
    assert 60 < sum(len(prompt.turns) == 2 for prompt in prompts) < 140
    assert {"", None} < {prompt.system for prompt in prompts}


def test_more_prompts_than_there_are_is_refused(topics, monkeypatch):
    monkeypatch.setattr("nsa_serve.train.prompts.TEMPLATES", {"small_talk": ("Hi!", "Good day!")})
    monkeypatch.setattr("nsa_serve.train.prompts.FOLLOW_UPS", ("Why?",))
    with pytest.raises(ConfigError, match="no more than 4 prompts"):
        draw_prompts(0, 5, topics)


def test_topics_come_from_the_corpus(tokenizer, topics):
    assert topics["country"] == ("Arran", "Borovia", "Cresta")
    assert "Nobody in the village could say why." in topics["sentence"]
    with pytest.raises(ConfigError, match="no source of the corpus has a plain sentence"):
        read_topics(Corpus({"code": np.array(tokenizer.encode("x = y + 1"))}, {}), tokenizer)


ROUND = [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ([*range(100, 160)], [*range(100, 160)]),
        ([1, 2, 3, *ROUND * 3], [1, 2, 3, *ROUND]),
        ([1, 2, 3, *ROUND * 2, 5, 6], [1, 2, 3, *ROUND * 2, 5, 6]),
        ([4] * 30, [4]),
        ([1, *[4] * 11, 2], [1, *[4] * 11, 2]),
        ([1, *[4] * 12, 2], [1, 4]),
        ([], []),
        ([3], [3]),
    ],
)  # fmt: skip
def test_a_loop_is_cut_after_its_first_round(said, kept):
    assert without_loop(said) == kept


def test_an_answer_that_circles_without_a_period_is_dropped():
    runs = ([1, 2, 3, 4], [5, 6, 7])
    # The Thue-Morse sequence has no part three times in a row.
    said = [token for at in range(32) for token in runs[at.bit_count() % 2]]
    assert without_loop(said) == []
    assert without_loop(said[:40]) == said[:40]  # too few to tell


@given(st.lists(st.integers(0, 2), max_size=60))
def test_what_is_kept_begins_the_answer_and_has_no_loop(said):
    kept = without_loop(said)
    assert kept == said[: len(kept)]
    for period in range(1, len(kept) // 3 + 1):
        rounds = max(3, -(-12 // period))
        for at in range(len(kept) - rounds * period + 1):
            window = kept[at : at + rounds * period]
            assert window != window[:period] * rounds


class Scripted:
    """Answers in turn with the given texts; ``asked`` are its prompts."""

    def __init__(self, tokenizer, answers) -> None:
        self.tokenizer = tokenizer
        self.answers = list(answers)
        self.asked: list[str] = []

    def generate(self, prompts, sampling, *, progress) -> list[Any]:
        assert len(prompts) == len(sampling)
        self.asked += [self.tokenizer.decode(ids, skip_special=False) for ids in prompts]
        return [self._result(self.answers.pop(0)) for _ in prompts]

    def _result(self, text: str) -> Any:
        ended = text.endswith("<|im_end|>")
        reason = FinishReason.STOP if ended else FinishReason.LENGTH
        ids = self.tokenizer.encode(text, add_special=False)
        return SimpleNamespace(
            token_ids=ids, finish_reason=FinishReason.ERROR if text == "!" else reason, error=text
        )


def talk_of(tokenizer, prompt: Prompt, *answers: str) -> tuple[list[Any], Scripted]:
    llm = Scripted(tokenizer, answers)
    return hold_dialogues(llm, [prompt], seed=0), llm  # type: ignore[arg-type]


def test_a_dialogue_is_what_the_template_makes_of_it_and_the_bases_words_are_marked(tokenizer):
    prompt = Prompt(("Who sings?", "Why?"), None, 0.0)
    (talk,), llm = talk_of(tokenizer, prompt, "The bird.<|im_end|>", "Ask it.<|im_end|>")
    said = ["Who sings?", "The bird.", "Why?", "Ask it."]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert tokenizer.decode(list(talk.tokens), skip_special=False) == wanted.removesuffix("\n")
    spoken = [t for t, own in zip(talk.tokens, talk.spoken, strict=True) if own]
    assert tokenizer.decode(spoken, skip_special=False) == "The bird.<|im_end|>Ask it.<|im_end|>"
    assert llm.asked[1].startswith(llm.asked[0] + "The bird.<|im_end|>\n<|im_start|>user\nWhy?")
    assert talk.is_open


@pytest.mark.parametrize(
    ("system", "begins"),
    [(None, SYSTEM), ("", "<|im_start|>user\n"), ("Be kind.", "<|im_start|>system\nBe kind.")],
)
def test_the_system_prompt_is_the_templates_another_or_none(tokenizer, system, begins):
    _, llm = talk_of(tokenizer, Prompt(("Hi",), system, 0.0), "Hello.<|im_end|>")
    assert llm.asked[0].startswith(begins)
    assert llm.asked[0].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("answer", ["It goes on and", "Boil it. " * 9 + "<|im_end|>"])
def test_no_second_turn_follows_an_answer_that_did_not_end(tokenizer, answer):
    (talk,), llm = talk_of(tokenizer, Prompt(("Go on", "Why?"), "", 0.0), answer)
    assert len(llm.asked) == 1
    text = tokenizer.decode(list(talk.tokens), skip_special=False)
    assert text.count("Boil it.") <= 1
    assert not talk.is_open


def test_dialogues_without_an_answer_or_too_long_are_dropped(tokenizer):
    prompt = Prompt(("Hi",), None, 0.0)
    assert talk_of(tokenizer, prompt, "<|im_end|>")[0] == []
    long = " ".join(str(number) for number in range(1000))
    assert talk_of(tokenizer, prompt, long)[0] == []


def test_an_engine_that_fails_is_told(tokenizer):
    with pytest.raises(TrainingFailed, match="did not answer: !"):
        talk_of(tokenizer, Prompt(("Hi",), None, 0.0), "!")


def made(count: int = 40, seed: int = 0) -> Dialogues:
    """Dialogues of 4 to 60 tokens; the base said the second half of each."""
    rng = random.Random(seed)
    lengths = [rng.randrange(4, 60) for _ in range(count)]
    return Dialogues.of(
        [
            ([rng.randrange(100, 49_000) for _ in range(n)], [i >= n // 2 for i in range(n)])
            for n in lengths
        ]
    )


def test_dialogues_are_read_as_they_were_written(tmp_path):
    dialogues = made()
    dialogues.save(tmp_path / "new" / "d.npz")
    read = Dialogues.open(tmp_path / "new" / "d.npz")
    assert len(read) == 40
    for index in range(40):
        for one, other in zip(read[index], dialogues[index], strict=True):
            assert np.array_equal(one, other)


def test_what_holds_no_dialogues_is_refused(tmp_path):
    path = tmp_path / "d.npz"
    for content in (b"", b"PK\x03\x04 broken", b"text"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no dialogues there"):
            Dialogues.open(path)
    with pytest.raises(CheckpointError, match="no dialogues there"):
        Dialogues.open(tmp_path / "absent.npz")
    with path.open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(CheckpointError, match="no dialogues there"):
        Dialogues.open(path)
    Dialogues.of([]).save(path)
    with pytest.raises(CheckpointError, match="empty or do not add up"):
        Dialogues.open(path)
    np.savez(
        path, tokens=np.zeros(3, np.uint16), spoken=np.zeros(2, bool), offsets=np.array([0, 3])
    )
    with pytest.raises(CheckpointError, match="empty or do not add up"):
        Dialogues.open(path)
    with pytest.raises(ConfigError, match="token 65536: dialogues hold vocabularies"):
        Dialogues.of([([65_536], [True])])


def test_drawn_dialogues_are_whole_pages_that_fill_the_batch():
    dialogues = made()
    for seed in range(20):
        sequences = draw_to_length(random.Random(seed), dialogues.draw, 512, 16)
        lengths = [len(sequence.tokens) for sequence in sequences]
        assert sum(lengths) == 512
        assert all(length % 16 == 0 for length in lengths)
        for sequence in sequences[:-1]:
            kept = sequence.kinds != PADDING
            own, spoken = next(
                pair for pair in (dialogues[i] for i in range(len(dialogues)))
                if np.array_equal(pair[0], sequence.tokens[kept])
            )  # fmt: skip
            assert np.array_equal(sequence.kinds[: len(own)] == SPOKEN, spoken)
            assert not kept[len(own) :].any()


@pytest.fixture(scope="module")
def plain(tokenizer):
    return make_source(tokenizer, num_tokens=256, longest=128)


@pytest.fixture(scope="module")
def mixed(plain):
    plan = replace(plain.plan, known_share=0.0)
    return BatchSource(plain.writer, plan, plain.nsa, plain.seed, made())


def test_a_share_of_micro_batches_is_dialogues_and_the_others_are_what_they_were(plain, mixed):
    found = [mixed.draw(index, 0.0) for index in range(120)]
    talks = [batch for batch in found if bool(batch.spoken.any())]
    assert 16 <= len(talks) <= 46  # a quarter
    for batch in found:
        same = mixed.draw(batch.index, 0.0)
        assert torch.equal(batch.token_ids, same.token_ids)
        assert torch.equal(batch.rows, same.rows)
        if not bool(batch.spoken.any()):
            assert torch.equal(batch.token_ids, plain.draw(batch.index, 0.0).token_ids)
    assert torch.equal(talks[0].token_ids, mixed.draw(talks[0].index, 0.9).token_ids)


def test_of_dialogues_the_bases_words_are_learnt_and_padding_is_not(mixed):
    dialogues = [mixed.dialogues[i][0].tolist() for i in range(len(mixed.dialogues))]
    pairs = {pair for tokens in dialogues for pair in pairwise(tokens)}
    for index in range(40):
        batch = mixed.draw(index, 0.0)
        if not bool(batch.spoken.any()):
            continue
        assert bool(batch.taught.all())
        assert batch.probes == ()
        assert not bool(batch.answers.any())
        assert len(batch.rows) == mixed.plan.num_learnt
        assert bool(batch.spoken.all())  # more than enough of them
        assert torch.equal(batch.targets, batch.token_ids[batch.rows + 1])
        known = zip(batch.token_ids[batch.rows].tolist(), batch.targets.tolist(), strict=True)
        assert all(pair in pairs for pair in known)


def test_training_on_dialogues_brings_the_model_closer_to_the_base(mixed, tmp_path):
    trainer = make_trainer(write_base(tmp_path))
    index = next(i for i in range(40) if bool(mixed.draw(i, 0.0).spoken.any()))
    batch = mixed.draw(index, 0.0)
    seen = [trainer.step([batch], 1.0)[0][0] for _ in range(6)]
    divergence = [float(losses.dialogue) for losses in seen]
    assert divergence[-1] < 0.9 * divergence[0]
    assert all(value == value for value in divergence)
    losses = trainer.losses(mixed.draw_texts(index, 0.0))
    assert torch.isnan(losses.dialogue)
    assert torch.isfinite(losses.teacher)


def test_the_loss_of_dialogues_is_divergence_and_a_little_cross_entropy(mixed, tmp_path):
    trainer = make_trainer(write_base(tmp_path))
    batch = next(b for b in (mixed.draw(i, 0.0) for i in range(40)) if bool(b.spoken.any()))
    packed = PackedBatch.build(batch.seq_lens, nsa=trainer.nsa, device="cpu")
    with torch.no_grad():
        logits = trainer.hidden(trainer.merged(), batch, packed)[batch.rows] @ trainer.head.T
        taught = trainer.taught(batch)[batch.rows] @ trainer.head.T
        losses = trainer.losses(batch)
    entropy = F.cross_entropy(logits, batch.targets)
    given, told = logits.log_softmax(-1), taught.log_softmax(-1)
    divergence = F.kl_div(given, told, log_target=True, reduction="batchmean")
    assert float(losses.dialogue) == pytest.approx(float(divergence), rel=1e-4)
    wanted = trainer.weights.dialogue * divergence + trainer.weights.spoken * entropy
    assert trainer.weights.spoken == pytest.approx(trainer.weights.dialogue / 10)
    assert float(losses.loss) == pytest.approx(float(wanted), rel=1e-4)


def test_attention_of_many_short_sequences_is_that_of_each(monkeypatch):
    monkeypatch.setattr(decoder, "_SHORT", 40)
    lens = [16, 33, 1, 70, 40, 17, 64, 16]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lens), h, 8, generator=generator) for h in (4, 2, 2))
    found = DenseCausalAttention(lens, torch.device("cpu"))(0, q, k, v, q)
    pieces = zip(*(x.split(lens) for x in (q, k, v)), strict=True)
    wanted = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in piece), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        for piece in pieces
    ]
    torch.testing.assert_close(found, torch.cat(wanted))


def test_the_command_writes_dialogues_of_a_model(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    model = write_small_model(tmp_path / "model")
    corpus = make_corpus(tokenizer)
    write_corpus(tmp_path / "corpus", corpus.sources, corpus.records)
    # The model of bytes can't read the corpus's tokens.
    topics = read_topics(corpus, tokenizer)
    monkeypatch.setattr(commands, "read_topics", lambda *_: topics)
    out = tmp_path / "d.npz"
    settings = {"random_weights": True, "dtype": "float32"}
    llm = commands.LLM
    monkeypatch.setattr(commands, "LLM", lambda name, **flags: llm(name, **flags, **settings))
    given = ["dialogues", "--corpus", str(tmp_path / "corpus"), "--out", str(out)]
    options = ["--model", str(model), "--count", "6", "--device", "cpu", "--max-num-seqs", "8"]
    options += ["--kv-cache-memory-bytes", str(16 << 20)]
    result = CliRunner().invoke(commands.app, [*given, *options])
    assert result.exit_code == 0, result.output
    assert '"prompts": 6' in result.output
    written = Dialogues.open(out)
    assert 0 < len(written) <= 6
    assert all(spoken.any() and not spoken[0] for _, spoken in map(written.__getitem__, range(1)))


def test_a_run_draws_the_dialogues_of_its_file(tokenizer, tmp_path):
    corpus = make_corpus(tokenizer)
    write_corpus(tmp_path / "corpus", corpus.sources, corpus.records)
    made(7).save(tmp_path / "d.npz")
    trainer = make_trainer(write_base(tmp_path / "base"))
    plan = BatchPlan(num_tokens=256, num_learnt=16, dialogue_share=1.0)
    growth, folder = Growth(), tmp_path / "corpus"
    source = build_source(growth, folder, plan, trainer, tmp_path / "d.npz")
    assert len(source.dialogues) == 7
    batch = source.draw(0, 0.0)
    assert bool((batch.spoken | batch.answers).all())
    assert bool(batch.spoken.any())
    assert build_source(growth, folder, plan, trainer).dialogues is None


def test_a_summary_counts_what_was_made(tokenizer):
    prompt = Prompt(("Hi",), "", 0.0)
    talks, _ = talk_of(tokenizer, prompt, "Hello there.<|im_end|>")
    found = summary([prompt], talks)
    assert found["dialogues"] == found["prompts"] == 1
    assert found["spoken"] == 4 < found["tokens"] == found["longest"]
