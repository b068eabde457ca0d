"""Requests with grammars in the engine: beside others, preempted, cut, aborted, and failing."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_serve.engine import followers as followers_module
from nsa_serve.engine.engine import Engine
from nsa_serve.engine.followers import COMPILE_SECONDS, MASK_SECONDS
from nsa_serve.engine.grammar import MAX_GRAMMAR_BYTES, GrammarCompiler
from nsa_serve.errors import InvalidParameter
from nsa_serve.request import JSON_OBJECT, FinishReason, GrammarSpec
from tests.byte_grammars import (
    EOS,
    VOCAB,
    GrammarBench,
    byte_compiler,
    byte_tokenizer,
    choice,
    grammar,
    regex,
    schema,
)
from tests.fake_runner import DEPTHS

COMPILER = byte_compiler()
CODE = regex(r"[a-f]{3}-[0-9]{4}")


def bench(**options: Any) -> GrammarBench:
    return GrammarBench(COMPILER, **options)


leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-500, 500),
        st.integers(0, 200),
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 12)),
    st.builds(lambda n: {"type": "string", "pattern": f"^[a-c]{{1,{n}}}$"}, st.integers(1, 5)),
    st.lists(
        st.one_of(st.text("ab é\"\\", max_size=4), st.integers(-99, 99), st.none(), st.booleans()),
        min_size=1, max_size=4, unique_by=repr,
    ).map(lambda values: {"enum": values}),
    st.text("xy ", max_size=4).map(lambda value: {"const": value}),
)  # fmt: skip


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text('kl "é', min_size=1, max_size=3)
    return st.builds(
        lambda properties, count: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:count],
            "additionalProperties": False,
        },
        st.dictionaries(names, inner, max_size=3),
        st.integers(0, 3),
    )


def lists(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda items, low, span: {
            "type": "array", "items": items, "minItems": low, "maxItems": low + span
        },
        inner, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        lists(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda any_of: {"anyOf": any_of}),
    ),
    max_leaves=5,
)


@given(
    st.lists(st.tuples(schemas, st.integers(0, 1 << 20)), min_size=1, max_size=3),
    st.sampled_from([0, 1]),
)
@settings(max_examples=60)
def test_whatever_the_model_says_its_text_satisfies_the_schema(asked, depth):
    run = bench(depth=depth, token_budget=16)
    for number, (wanted, seed) in enumerate(asked):
        run.add(f"r{number}", schema(wanted), seed=seed, max_tokens=900)
    run.drain()
    for number, (wanted, _) in enumerate(asked):
        name = f"r{number}"
        assert run.final(name).finish_reason is FinishReason.STOP, run.text(name)
        jsonschema.validate(json.loads(run.text(name)), wanted)


@DEPTHS
def test_a_request_says_the_same_alone_and_among_others(depth):
    specs = [CODE, JSON_OBJECT, None, choice("yes", "no"), schema({"type": "integer"})]
    alone = [
        bench(depth=depth).run("alone", spec, seed=7, max_tokens=30, prompt=b"p%d" % number)
        for number, spec in enumerate(specs)
    ]
    together = bench(depth=depth, token_budget=8)
    for number, spec in enumerate(specs):
        together.add(f"r{number}", spec, seed=7, max_tokens=30, prompt=b"p%d" % number)
    together.drain()
    assert [together.text(f"r{number}") for number in range(len(specs))] == alone


@DEPTHS
def test_a_preempted_request_goes_on_in_its_grammar(depth):
    wanted = {"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 12}
    alone = [
        bench(depth=depth).run("alone", schema(wanted), seed=seed, prompt=b"p%d" % seed)
        for seed in range(3)
    ]
    longest = max(map(len, alone)) + 1
    run = bench(depth=depth, num_blocks=(longest + 2) // 4 * 3 // 2 + 1)  # one text and a half
    for number in range(9):  # so that outputs are expected to be short
        run.run(f"short{number}", choice("x"), max_tokens=9)
    for seed in range(3):
        run.add(f"r{seed}", schema(wanted), seed=seed, prompt=b"p%d" % seed, max_tokens=longest)
    run.drain()
    assert run.scheduler.stats.num_preemptions > 0
    assert [run.text(f"r{seed}") for seed in range(3)] == alone


def test_a_step_that_lacked_memory_is_computed_again_behind_the_same_masks():
    alone = bench().run("r0", CODE, seed=3)
    run = bench()
    run.runner.errors[4] = RuntimeError("can't allocate memory: you tried to allocate 8 bytes")
    run.add("r0", CODE, seed=3)
    run.add("r1", CODE, seed=4)
    run.drain()
    assert run.text("r0") == alone
    assert run.final("r1").finish_reason is FinishReason.ERROR


def test_the_next_token_waits_for_the_mask_though_steps_are_launched_ahead():
    run = bench(depth=1)
    run.add("bound", CODE, seed=1)
    run.add("free", None, max_tokens=30, ignore_eos=True)
    run.drain()
    for earlier, later in zip(run.runner.plans, run.runner.plans[1:], strict=False):
        sampled = {chunk.request_id for chunk in earlier.chunks if chunk.samples}
        assert "bound" not in sampled & {chunk.request_id for chunk in later.chunks}
    masked = [c for plan in run.runner.plans for c in plan.chunks if c.request_id == "bound"]
    assert all((chunk.mask is not None) == chunk.samples for chunk in masked)


def test_a_finished_grammar_ends_its_request_without_another_step():
    run = bench()
    assert run.run("r", CODE, min_tokens=50, ignore_eos=True)
    assert run.final("r").finish_reason is FinishReason.STOP
    assert run.final("r").usage.completion_tokens == len("abc-1234")
    assert EOS not in run.token_ids("r")


def test_an_end_token_is_a_stop_where_the_grammar_could_go_on():
    run = bench()
    text = run.run("r", regex("a+"), seed=2)
    assert text == "a" * len(text)
    assert run.token_ids("r") == [*text.encode(), EOS]
    assert run.final("r").finish_reason is FinishReason.STOP


def test_a_grammar_of_nothing_leaves_the_end_token_alone():
    run = bench()
    assert run.run("r", regex("")) == ""
    assert run.final("r").finish_reason is FinishReason.STOP
    assert run.token_ids("r") == [EOS]


def test_a_text_cut_by_max_tokens_ends_by_length():
    run = bench()
    assert len(run.run("r", CODE, max_tokens=5)) == 5
    assert run.final("r").finish_reason is FinishReason.LENGTH


def test_a_stop_string_ends_a_grammar_that_is_not_complete():
    run = bench()
    text = run.run("r", CODE, stop=("-",))
    assert (len(text), run.final("r").stop_reason) == (3, "-")


FAILURES = {
    "regex": (regex("(["), "unclosed character class"),
    "regex-bomb": (regex("(a{1000}){1000}"), "1000000"),
    "recursion": (schema({"$ref": "#"}), "NoExtension"),
    "schema-bomb": (
        schema({"allOf": [
            {"anyOf": [{"properties": {f"{c}{i}": {"type": "string"}}} for c in "ab"]}
            for i in range(14)
        ]}),
        "too large",
    ),
    "enum": (schema({"enum": [f"value {i}" for i in range(20_000)]}), str(MAX_GRAMMAR_BYTES)),
    "keyword": (schema({"not": {"type": "null"}}), "not"),
    "grammar": (grammar("start: foo"), "unknown name"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_grammar_fails_its_request_only(name):
    spec, words = FAILURES[name]
    run = bench()
    run.add("other", CODE, seed=5)
    failure = None
    try:
        run.add("bad", spec)
    except InvalidParameter as error:
        failure = str(error)
    run.drain()
    if failure is None:
        final = run.final("bad")
        assert (final.finish_reason, final.error_param) == (FinishReason.ERROR, "grammar")
        assert run.text("bad") == ""
        failure = final.error or ""
    assert words in failure
    assert run.final("other").finish_reason is FinishReason.STOP
    assert run.run("next", CODE, seed=5) == run.text("other")


class SlowCompiler(GrammarCompiler):
    """Compiles, or makes masks, once it is told to."""

    def __init__(self) -> None:
        super().__init__(byte_tokenizer(), vocab_size=VOCAB, eos_token_ids=[EOS])
        self.compiles, self.masks = threading.Event(), threading.Event()
        self.compiles.set()
        self.masks.set()

    def _compile(self, spec: GrammarSpec) -> Any:
        assert self.compiles.wait(60)
        return super()._compile(spec)

    def mask_of(self, matcher: Any) -> bytes:
        assert self.masks.wait(60)
        return super().mask_of(matcher)


def begin(run: GrammarBench, name: str) -> None:
    """A request with a grammar that has said its first token."""
    run.add(name, CODE)
    while not run.token_ids(name):
        run.step()


def test_others_run_while_a_grammar_is_compiled():
    compiler = SlowCompiler()
    run = GrammarBench(compiler)
    compiler.compiles.clear()
    run.add("bound", CODE)
    assert run.run_others(5)
    assert run.scheduler.num_waiting == 1
    assert not run.outputs["bound"]
    compiler.compiles.set()
    run.drain()
    assert run.final("bound").finish_reason is FinishReason.STOP


def test_others_run_while_a_mask_is_made():
    compiler = SlowCompiler()
    run = GrammarBench(compiler)
    begin(run, "bound")
    compiler.masks.clear()
    num_said = len(run.token_ids("bound"))
    assert run.run_others(5)
    assert len(run.token_ids("bound")) <= num_said + 1  # the mask before was there
    compiler.masks.set()
    run.drain()
    assert len(run.text("bound")) == len("abc-1234")


def test_a_grammar_that_is_not_compiled_in_time_ends_its_request():
    compiler = SlowCompiler()
    run = GrammarBench(compiler)
    compiler.compiles.clear()
    run.add("bound", CODE)
    run.step()
    run.step(COMPILE_SECONDS + 1)
    compiler.compiles.set()
    check_overdue(run, COMPILE_SECONDS)


def test_a_mask_that_is_not_made_in_time_ends_its_request():
    compiler = SlowCompiler()
    run = GrammarBench(compiler)
    begin(run, "bound")
    compiler.masks.clear()
    run.step()
    run.step(MASK_SECONDS + 1)
    compiler.masks.set()
    check_overdue(run, MASK_SECONDS)


def check_overdue(run: GrammarBench, seconds: float) -> None:
    final = run.final("bound")
    assert (final.finish_reason, final.error_param) == (FinishReason.ERROR, "grammar")
    assert f"{seconds:g} s" in (final.error or "")
    run.drain()
    assert run.run("next", choice("x")) == "x"


def test_a_request_is_aborted_while_its_grammar_is_compiled():
    compiler = SlowCompiler()
    run = GrammarBench(compiler)
    compiler.compiles.clear()
    run.add("bound", CODE)
    run.step()
    final = run.engine.abort("bound", run.clock())
    assert final is not None
    assert final.finish_reason is FinishReason.ABORT
    assert not run.engine.has_work
    assert len(run.followers) == 0
    compiler.compiles.set()
    assert run.run("bound", choice("again")) == "again"  # the id is free


def test_what_fails_on_our_side_is_no_fault_of_the_request(monkeypatch, caplog):
    run = bench()
    monkeypatch.setattr(followers_module, "_advance", lambda *_: 1 / 0)
    run.add("bound", CODE)
    run.drain()
    final = run.final("bound")
    assert (final.finish_reason, final.error_param) == (FinishReason.ERROR, None)
    assert "ZeroDivisionError" in caplog.text


def test_an_engine_that_follows_no_grammars_refuses_them():
    run = bench()
    engine = Engine(run.scheduler, run.cache, run.runner, None, vocab_size=VOCAB)
    run.engine = engine
    with pytest.raises(InvalidParameter, match="not supported here"):
        run.add("bound", CODE)
    assert not engine.has_work


@given(st.integers(0, 1 << 30), st.sampled_from([0, 1]))
@settings(max_examples=15)
def test_any_mix_of_requests_aborts_and_shortage_leaves_nothing_behind(seed, depth):
    rng = random.Random(seed)
    run = bench(depth=depth, num_blocks=rng.randint(30, 60), token_budget=16, max_num_seqs=4)
    specs = [CODE, JSON_OBJECT, None, regex("(["), choice("yes", "no"), grammar("start: foo")]
    for number in range(12):
        run.add(
            f"r{number}", rng.choice(specs), seed=number, max_tokens=rng.randint(1, 60),
            prompt=bytes(rng.choices(b"ab", k=rng.randint(1, 40))),
        )  # fmt: skip
        for _ in range(rng.randint(0, 6)):
            run.step()
        gone = f"r{rng.randint(0, number)}"
        if rng.random() < 0.3 and not run.is_ended(gone):
            final = run.engine.abort(gone, run.clock())
            assert final is not None
            run.outputs[gone].append(final)
    run.drain()
    for name, outputs in run.outputs.items():
        assert sum(output.finish_reason is not None for output in outputs) == 1, name
