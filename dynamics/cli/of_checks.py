"""The verbs that look at runs and measure nothing: inspect, audit."""

from itertools import product
from typing import Annotated

import typer

from dynamics.cli.options import (
    AdapterOption,
    AlphaOption,
    BaseOption,
    BlocksOption,
    FormatOption,
    FusedOption,
    RefPatternOption,
    RevisionsOption,
    RunPaths,
    YesOption,
)
from dynamics.cli.output import (
    agree_to,
    print_line,
    print_table,
    print_warning,
    report_problems,
)
from dynamics.cli.values import opener_of, run_of
from dynamics.errors import DynamicsError


def inspect(
    run: RunPaths,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    lora_alpha: AlphaOption = None,
    expert_blocks: BlocksOption = False,
    revisions: RevisionsOption = None,
    ref_pattern: RefPatternOption = None,
    keep_fused: FusedOption = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read every number of a recording. Exit code 1: it is damaged."
        ),
    ] = False,
) -> None:
    """Show what a run holds: its format, steps, kinds, matrices, scalars and events."""
    from dynamics.cli.tables import (
        contents_table,
        matrices_table,
        passed_over_lines,
        verification_lines,
    )
    from dynamics.formats.recording import RecordingRun

    keep_fused = keep_fused or verify
    opener = opener_of(
        format, base, adapter, lora_alpha, expert_blocks, revisions, ref_pattern, keep_fused
    )
    opened = opener(run_of(run))
    print_table(contents_table(opened))
    for line in passed_over_lines(opened.passed_over):
        print_line(line)
    print_table(matrices_table(opened))
    problems = [*opened.problems.values(), *dict.fromkeys(opened.absent_kinds.values())]
    if verify:
        if not isinstance(opened, RecordingRun):
            raise DynamicsError(
                f"{opened.path} is not a recording (its format is {opened.format!r}). Only "
                "recordings have checksums to verify; leave --verify out."
            )
        verification = opened.verify()
        for line in verification_lines(verification, len(opened.steps)):
            print_line(line)
        problems = [*verification.damaged, *problems]
    if opened.account is not None and (warning := opened.account.warning()):
        print_warning(warning)
    report_problems(problems)


def audit(
    run: RunPaths,
    format: FormatOption = None,
    base: BaseOption = None,
    adapter: AdapterOption = None,
    lora_alpha: AlphaOption = None,
    expert_blocks: BlocksOption = False,
    revisions: RevisionsOption = None,
    ref_pattern: RefPatternOption = None,
    hashes: Annotated[
        bool,
        typer.Option(
            "--hashes", help="Of a model on the hub: compare stated hashes, and read nothing."
        ),
    ] = False,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="OTHER",
            help="Another run, whose records this one must not hold. May be repeated.",
        ),
    ] = None,
    yes: YesOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print every verdict as JSON instead of a table.")
    ] = False,
) -> None:
    """Check a run for defects, such as wrong merges, dead layers, NaN. Exit code 1: one failed."""
    from dynamics.auditing import audit as audit_run
    from dynamics.cli.tables import audit_table
    from dynamics.formats import open_run
    from dynamics.formats.hub.cost import expect

    opener = opener_of(format, base, adapter, lora_alpha, expert_blocks, revisions, ref_pattern)
    opened = opener(run_of(run))
    others = [open_run(each) for each in against or ()]
    for each in () if hashes else (opened, *others):
        cells = product(each.matrices, each.steps.tolist(), each.stored_kinds)
        if (cost := expect(each, cells)) is not None:
            agree_to(cost, yes)
    report = audit_run(opened, hashes_only=hashes, against=others)
    if as_json:
        print(report.to_json())
    else:
        print_table(audit_table(report))
        print_line(report.line)
    if report.failed:
        raise typer.Exit(1)
