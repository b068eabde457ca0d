"""``nsa-serve eval needle | ppl | tasks | chat | verdicts``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import ConfigError
from ..server.flags import takes_flags
from .chat import run_chat
from .chat import summary as chat_summary
from .flags import ChatFlags, EvalFlags, NeedleFlags, PerplexityFlags, TaskFlags, parse_contexts
from .haystack import Haystack, read_documents, read_facts, sentences_of
from .heatmap import check_plots, save_heatmap, shown
from .needle import NeedleGrid, run_needles
from .perplexity import Windows, run_perplexity
from .record import Record
from .subject import Advance
from .tasks import COUNTRY_FACTS, DEFAULT_KINDS, KINDS, TaskSet, run_tasks
from .verdicts import OPEN, as_markdown, judge, open_record, read_verdicts, write_verdicts

INTERRUPTED = 130  # what shells report of a command ended by Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Evaluate a model behind an OpenAI API, or in this process.",
)
console = Console(stderr=True, highlight=False)


@app.command()
@takes_flags(NeedleFlags, own_first=True)
def needle(flags: NeedleFlags) -> None:
    """Hide a fact in a long text and ask for it: contexts × depths × keys, as JSON and PNG."""
    _end(lambda: needles(flags))


@app.command()
@takes_flags(PerplexityFlags, own_first=True)
def ppl(flags: PerplexityFlags) -> None:
    """Perplexity of held-out text, the same tokens in windows of every length."""
    _end(lambda: perplexity(flags))


@app.command()
@takes_flags(TaskFlags, own_first=True)
def tasks(flags: TaskFlags) -> None:
    """Several keys, several values, variables, long copies: on words that training has not seen."""
    _end(lambda: retrieval(flags))


@app.command()
@takes_flags(ChatFlags, own_first=True)
def chat(flags: ChatFlags) -> None:
    """Answer 50 short prompts beside the dense base, for people to judge, and measure how far."""
    _end(lambda: conversations(flags))


@app.command()
def verdicts(
    record: Annotated[Path, typer.Argument(help="JSON of eval chat; the CSV lies beside it.")],
) -> None:
    """Count the verdicts that were filled into the CSV of eval chat, and keep them."""
    _end(lambda: counted(record))


def needles(flags: NeedleFlags) -> None:
    """Run ``eval needle``."""
    grid = NeedleGrid(
        flags.text, parse_contexts(flags.contexts), flags.depths, flags.keys, flags.seed
    )
    sentences = sentences_of(read_documents(flags.text, flags.packages))
    check_plots()
    with flags.subject() as subject:
        record = _record(flags, "needle", subject.description, grid.settings())
        haystack = Haystack(sentences, subject)
        found = _with_bar(
            "prompts",
            grid.num_prompts,
            lambda advance: run_needles(grid, subject, haystack, record, advance),
        )
    record.finish(found)
    rows = [(shown(int(c)), f"{share:.1%}") for c, share in found["by_context"].items()]
    _show(f"needles found: {found['found']:.1%}", ("context", "found"), rows, record.path)
    cells = {
        (context, depth): found["by_cell"][f"{context}/{depth}"]
        for context in grid.contexts
        for depth in grid.depths
    }
    picture = flags.plot or record.path.with_suffix(".png")
    title = f"{record.head['subject']['model']}: {found['found']:.1%} of needles found"
    save_heatmap(picture, title, grid.contexts, grid.depths, cells)
    console.print(f"saved {picture}")


def perplexity(flags: PerplexityFlags) -> None:
    """Run ``eval ppl``."""
    windows = Windows(flags.text, parse_contexts(flags.contexts), flags.tokens)
    documents = read_documents(flags.text, flags.packages)
    with flags.subject() as subject:
        record = _record(flags, "ppl", subject.description, windows.settings())
        tokens = subject.encode("\n\n".join(documents))
        found = _with_bar(
            "windows",
            windows.num_windows(windows.run_length(len(tokens))),
            lambda advance: run_perplexity(windows, subject, tokens, record, advance),
        )
    record.finish(found)
    rows = [
        (shown(int(context)), f"{row['perplexity']:.3f}", f"{row['bits_per_token']:.3f}")
        for context, row in found["by_context"].items()
    ]
    _show("perplexity", ("window", "perplexity", "bits/token"), rows, record.path)


def retrieval(flags: TaskFlags) -> None:
    """Run ``eval tasks``."""
    kinds = tuple(flags.task or DEFAULT_KINDS)
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"--task is one of {', '.join(KINDS)}, not {kind!r}")
    contexts = parse_contexts(flags.contexts)
    wanted = TaskSet(flags.text, kinds, contexts, flags.samples, flags.seed)
    facts = read_facts(flags.packages) if COUNTRY_FACTS in kinds else []
    sentences = sentences_of(read_documents(flags.text, flags.packages))
    with flags.subject() as subject:
        record = _record(flags, "tasks", subject.description, wanted.settings())
        haystack = Haystack(sentences, subject, facts)
        found = _with_bar(
            "prompts",
            wanted.num_prompts,
            lambda advance: run_tasks(wanted, subject, haystack, record, advance),
        )
    record.finish(found)
    rows = [
        (kind, *(f"{row[str(c)]['right']:.0%} ({row[str(c)]['share']:.2f})" for c in contexts))
        for kind, row in found["by_kind"].items()
    ]
    _show("right (share)", ("task", *map(shown, contexts)), rows, record.path)


def conversations(flags: ChatFlags) -> None:
    """Run ``eval chat``."""
    chats = flags.chats()
    with flags.subject() as subject:
        base = flags.open_base()
        record = _record(flags, "chat", subject.description, chats.settings(base))
        found = _with_bar(
            "prompts",
            len(chats.prompts),
            lambda advance: run_chat(chats, subject, base, record, advance),
        )
    table = record.path.with_suffix(".csv")
    if table.exists():
        judge(record, read_verdicts(table, record.items))
        found = chat_summary(record)
    else:
        write_verdicts(table, record.items)
    _finish_chat(record, found)
    console.print(f"fill in {table}, then: eval verdicts {record.path}")


def counted(path: Path) -> None:
    """Run ``eval verdicts``."""
    record = open_record(path)
    table = path.with_suffix(".csv")
    judge(record, read_verdicts(table, record.items))
    found = chat_summary(record)
    _finish_chat(record, found)
    if found["verdicts"][OPEN]:
        console.print(f"{found['verdicts'][OPEN]} lines of {table} are still empty")


def _finish_chat(record: Record, found: dict[str, Any]) -> None:
    record.finish(found)
    record.path.with_suffix(".md").write_text(as_markdown(record, found), encoding="utf-8")
    rows = [(name, str(count)) for name, count in found["verdicts"].items()]
    measured = ("base_logprob_of_answers", "base_logprob_of_own", "divergence")
    rows += [(name.replace("_", " "), f"{found[name]:.4f}") for name in measured]
    _show("beside the base", ("", "value"), rows, record.path)


def _record(
    flags: EvalFlags, kind: str, subject: dict[str, Any], settings: dict[str, Any]
) -> Record:
    return Record.open(flags.output or Path(f"eval-{kind}.json"), kind, subject, settings)


def _with_bar(what: str, total: int, run: Callable[[Advance], dict[str, Any]]) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        return run(lambda count: progress.advance(task, count))


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], saved: Path) -> None:
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*row)
    out = Console(highlight=False)
    out.print(title)
    out.print(table)
    console.print(f"saved {saved}")


def _end(run: Callable[[], None]) -> None:
    try:
        run()
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to go on")
        raise typer.Exit(INTERRUPTED) from None
