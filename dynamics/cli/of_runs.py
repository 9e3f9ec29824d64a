"""The verbs that measure runs: analyze, compare."""

import json
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
    LagOption,
    MetricsOption,
    NoCacheOption,
    OverwriteOption,
    RefPatternOption,
    RevisionsOption,
    RunPaths,
    SchedulerOption,
    SelectOption,
    StepsOption,
    StrictOption,
    WorkersOption,
    YesOption,
)
from dynamics.cli.output import (
    agree_to,
    print_accounts,
    print_line,
    print_table,
    progress_bar,
    report_problems,
)
from dynamics.cli.running import command_line, goes_on
from dynamics.cli.values import (
    choice_of,
    execution_of,
    interrupted,
    named_paths,
    opener_of,
    refuse_unused,
    run_name,
    run_of,
)
from dynamics.errors import DynamicsError

if TYPE_CHECKING:
    from dynamics.runs.run import Run


def analyze(
    run: RunPaths,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Where to save the result; RUN.analysis.zarr by default."
        ),
    ] = None,
    metrics: MetricsOption = None,
    components: ComponentsOption = None,
    kinds: KindsOption = None,
    steps: StepsOption = None,
    select: SelectOption = None,
    lag: LagOption = None,
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
        typer.Option("--follow", help="Measure a run in progress again and again, until Ctrl-C."),
    ] = False,
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
    """Measure a run and save the result. What an earlier result has is not measured again."""
    from dynamics.analysis.saved import analyze_and_save, follow_and_save
    from dynamics.cli.tables import passed_over_lines, summary_table

    if interval is not None and not follow:
        raise DynamicsError(
            "--interval has no effect without --follow; leave one out, or add the other."
        )
    output = output or Path(f"{run_name(run)}.analysis.zarr")
    execution = execution_of(output, no_cache, strict, workers, scheduler, device)
    goes_on(interrupted(execution.cache))
    choice = choice_of(metrics, components, kinds, steps, select, lag)
    opener = opener_of(
        format, base, adapter, lora_alpha, expert_blocks, revisions, ref_pattern, keep_fused
    )
    opened = partial(opener, run_of(run))
    if follow:
        from dynamics.cli.following import until_signalled

        with until_signalled() as stopped:
            problems = follow_and_save(
                opened,
                output,
                execution,
                stopped=stopped,
                say=print_line,
                interval=10.0 if interval is None else interval,
                overwrite=overwrite,
                command=command_line(),
                **choice,
            )
        return report_problems(problems)
    with progress_bar(run_name(run)) as progress:
        result = analyze_and_save(
            opened,
            output,
            execution,
            overwrite=overwrite,
            progress=progress,
            agree=partial(agree_to, yes=yes),
            command=command_line(),
            **choice,
        )
    print_table(summary_table(result))
    print_accounts(result)
    for line in passed_over_lines(json.loads(result.attrs["passed_over"])):
        print_line(line)
    print_line(f"Saved to {output}")
    report_problems(json.loads(result.attrs["problems"]))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=RUN...", help="Two or more runs or saved analyses, each with a name."
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where to save the result.")
    ] = Path("comparison.zarr"),
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Save the differences from this run instead.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(
            "--pair",
            help="With --baseline: subtract, of each run, the one with the same value of this "
            "setting, such as seed.",
        ),
    ] = None,
    metrics: MetricsOption = None,
    components: ComponentsOption = None,
    kinds: KindsOption = None,
    steps: StepsOption = None,
    select: SelectOption = None,
    lag: LagOption = None,
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
    workers: WorkersOption = 1,
    scheduler: SchedulerOption = None,
    device: DeviceOption = "cpu",
    yes: YesOption = False,
) -> None:
    """Measure runs, or take saved analyses, and align them side by side."""
    from dynamics.analysis.saved import compare_and_save
    from dynamics.analysis.storage import is_analysis
    from dynamics.cli.tables import summary_table

    opened = opener_of(
        format, base, adapter, lora_alpha, expert_blocks, revisions, ref_pattern, keep_fused
    )
    given: dict[str, Path | Run] = {
        name: Path(path) if is_analysis(path) else opened(path)
        for name, path in named_paths(runs).items()
    }
    execution = execution_of(output, no_cache, strict, workers, scheduler, device)
    goes_on(interrupted(execution.cache))
    choice = choice_of(metrics, components, kinds, steps, select, lag)
    if all(isinstance(each, Path) for each in given.values()):
        refuse_unused({**choice, **opened.keywords}, "saved analyses, which are not measured again")
    with progress_bar(", ".join(given)) as progress:
        both = compare_and_save(
            given,
            output,
            execution,
            baseline=baseline,
            pair=pair,
            overwrite=overwrite,
            progress=progress,
            agree=partial(agree_to, yes=yes),
            command=command_line(),
            **choice,
        )
    print_table(summary_table(both))
    print_accounts(both)
    what = "" if baseline is None else f" the differences from {baseline}"
    print_line(f"Saved{what} to {output}")
    measured = [name for name, each in given.items() if not isinstance(each, Path)]
    problems = json.loads(both.attrs["problems"])
    report_problems([f"{name}: {each}" for name in measured for each in problems[name]])
