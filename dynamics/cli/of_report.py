"""The verb that writes a page for a browser: report."""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynamics.cli.options import (
    AdapterOption,
    AlphaOption,
    BaseOption,
    BlocksOption,
    ComponentsOption,
    DeviceOption,
    FormatOption,
    FusedOption,
    KindsOption,
    NoCacheOption,
    OverwriteOption,
    RefPatternOption,
    RevisionsOption,
    SchedulerOption,
    SelectOption,
    StepsOption,
    StrictOption,
    WorkersOption,
    YesOption,
)
from dynamics.cli.output import agree_to, print_line, progress_bar, report_problems
from dynamics.cli.running import command_line, goes_on
from dynamics.cli.values import (
    choice_of,
    execution_of,
    interrupted,
    named_paths,
    opener_of,
    refuse_unused,
)
from dynamics.errors import DynamicsError

if TYPE_CHECKING:
    from dynamics.exports.report.sources import Source


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs, or results that 'analyze' or 'compare' saved; NAME=RUN gives one a name.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file.")] = Path(
        "report.html"
    ),
    title: Annotated[
        str | None, typer.Option("--title", help="The heading; by default it names the runs.")
    ] = None,
    no_audit: Annotated[
        bool, typer.Option("--no-audit", help="Do not check the runs for defects.")
    ] = False,
    components: ComponentsOption = None,
    kinds: KindsOption = None,
    steps: StepsOption = None,
    select: SelectOption = None,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    lora_alpha: AlphaOption = None,
    expert_blocks: BlocksOption = False,
    revisions: RevisionsOption = None,
    ref_pattern: RefPatternOption = None,
    keep_fused: FusedOption = False,
    overwrite: OverwriteOption = False,
    strict: StrictOption = False,
    no_cache: NoCacheOption = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow",
            help="Show the report of a run in progress at http://127.0.0.1:PORT, until Ctrl-C.",
        ),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            min=0,
            max=65535,
            help="For --follow; 8000 by default, 0 for any that is free.",
        ),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(
            "--interval",
            min=0.1,
            help="Seconds that --follow waits between two looks; 10 by default.",
        ),
    ] = None,
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    device: DeviceOption = "cpu",
    yes: YesOption = False,
) -> None:
    """Write one HTML file that shows what happened, whether to trust it, and what is broken."""
    from dynamics.analysis.storage import is_analysis
    from dynamics.exports.report.report import report_and_problems
    from dynamics.exports.report.sources import names_of

    if not follow:
        for name, value in (("--port", port), ("--interval", interval)):
            if value is not None:
                raise DynamicsError(
                    f"{name} has no effect without --follow; leave one out, or add the other."
                )
    opened = opener_of(
        format, base, adapter, lora_alpha, expert_blocks, revisions, ref_pattern, keep_fused
    )
    paths = [text for text in runs if not _has_name(text)]
    labels = dict(zip(names_of(paths), paths, strict=True)) if paths else {}
    named = labels | named_paths([text for text in runs if _has_name(text)])
    if len(named) < len(runs):
        raise DynamicsError("Two runs have the same name; give each its own, NAME=RUN.")
    execution = execution_of(
        output.with_suffix(".zarr"), no_cache, strict, workers, scheduler, device
    )
    choice = choice_of(None, components, kinds, steps, select, None)
    options = {name: each for name, each in choice.items() if name not in ("metrics", "lag")}
    saved = [name for name, path in named.items() if is_analysis(path)]
    if len(saved) == len(named):
        why = "saved results, which are not measured again"
        refuse_unused({**options, **opened.keywords}, why)
    if follow:
        if len(named) > 1 or saved:
            raise DynamicsError("--follow takes one run in progress, and no saved result.")
        ((name, path),) = named.items()
        from dynamics.cli.following import until_signalled
        from dynamics.exports.report.following import follow_report

        with until_signalled() as stopped:
            return follow_report(
                partial(opened, path),
                output,
                execution,
                name=name,
                stopped=stopped,
                say=print_line,
                port=8000 if port is None else port,
                interval=10.0 if interval is None else interval,
                title=title,
                audit=not no_audit,
                overwrite=overwrite,
                command=command_line(),
                **choice,
            )
    if len(saved) < len(named):
        goes_on(interrupted(execution.cache))
    given: dict[str, Source] = {
        name: Path(path) if name in saved else opened(path) for name, path in named.items()
    }
    with progress_bar(", ".join(named)) as progress:
        written, problems = report_and_problems(
            given,
            output,
            title=title,
            audit=not no_audit,
            overwrite=overwrite,
            progress=progress,
            agree=partial(agree_to, yes=yes),
            execution=execution,
            command=command_line(),
            **choice,
        )
    print_line(f"Saved to {written} ({written.stat().st_size / 1e6:.1f} MB)")
    report_problems(problems)


def _has_name(text: str) -> bool:
    """Whether this is NAME=RUN; a path may have "=" in it, too."""
    return "=" in text and not re.match(r"\w+://", text) and not Path(text).exists()
