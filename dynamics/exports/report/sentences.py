"""Five sentences about a result: is it broken, what was measured, what happened, is it right?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.auditing.report import Severity
from dynamics.exports.report.audits import Check, audits_of
from dynamics.exports.report.facts import cell_counts, floor_facts
from dynamics.exports.report.numbers import amount, cut, number, shortened, with_interval
from dynamics.exports.report.runs import (
    Group,
    at_end,
    groups_of,
    in_layers,
    layer_means,
    mean_over,
    modules_of,
    of_matrices,
)
from dynamics.schema import Status

LIMIT = 200  # letters of a sentence, so that five of them fit on the first screen of a phone
_NAMED = 4  # groups that a sentence names; of more, the first and the last
# What training changed, in the order in which it is asked for.
LEARNED = {
    schema.DISPLACEMENT: "What training changed",
    schema.CYCLE_UPDATE: "What the last cycle changed",
    schema.UPDATE: "What the last interval changed",
    schema.ADAPTER: "The adapter",
}


@dataclass(frozen=True)
class Sentence:
    """One of the five.

    Attributes:
        question: what it answers, in one to three words.
        text: at most `LIMIT` letters.
        tone: "good", "warn", "bad" or "plain".
    """

    question: str
    text: str
    tone: str = "plain"


def sentences_of(comparison: xr.Dataset) -> list[Sentence]:
    """The five sentences.

    Args:
        comparison: a result with the dimension `run`, see `comparison_of`.
    """
    groups = groups_of(comparison)
    return [
        _broken(comparison, groups),
        _measured(comparison, groups),
        _weights(comparison, groups),
        _learned(comparison, groups),
        _trust(comparison),
    ]


def _fitting(*candidates: str) -> str:
    """The first text that is short enough; the last one is cut."""
    return next((each for each in candidates if len(each) <= LIMIT), cut(candidates[-1], LIMIT))


def _broken(comparison: xr.Dataset, groups: Sequence[Group]) -> Sentence:
    audits = audits_of(comparison)
    done = {run: checks for run, checks in audits.items() if any(map(_is_verdict, checks))}
    spoiled = _spoiled(comparison)
    total = len(audits)
    if not done:
        reason = next((each.meaning for checks in audits.values() for each in checks), None)
        text = "No verdicts are in this result. 'dynamics report RUN' checks the run itself."
        text = f"Not audited: {reason}" if reason else text
        return Sentence("Broken?", _fitting(f"{spoiled}{text}"), "bad" if spoiled else "warn")
    for severity, verb, tone in ((Severity.FAIL, "fail", "bad"), (Severity.WARN, "warn", "warn")):
        hit = {r: c for r, c in done.items() if any(e.severity is severity for e in c)}
        if hit:
            who = _who(list(hit), total, groups, comparison, verb)
            worst = [c for checks in hit.values() for c in checks if c.severity is severity]
            text = _failing(spoiled, who, worst, single=total == 1)
            return Sentence("Broken?", text, "bad" if spoiled else tone)
    if len(done) < total:
        text = f"{len(done)} of {total} runs were audited, and all of them pass."
    elif total > 1:
        who = f"all {total}" if total > 2 else "both"
        text = f"Nothing is broken: {who} runs pass the audit."
    else:
        text = "Nothing is broken: the run passes the audit."
    checks = [each for of_run in done.values() for each in of_run]
    passed = len({each.check for each in checks if each.severity is Severity.PASS})
    others = len({each.check for each in checks}) - passed
    rest = f", {others} did not apply" if others else ""
    text = f"{spoiled}{text} {passed} checks were made{rest}."
    return Sentence("Broken?", _fitting(text), "bad" if spoiled else "good")


def _is_verdict(check: Check) -> bool:
    return check.severity is not Severity.NOT_CHECKED


def _who(
    runs: Sequence[str], total: int, groups: Sequence[Group], comparison: xr.Dataset, verb: str
) -> str:
    if total == 1:
        return "The run fails the audit" if verb == "fail" else "The audit of the run warns"
    names = comparison[schema.RUN].values.tolist()
    hit = [g.name for g in groups if any(names[i] in runs for i in g.runs)]
    listed = ", ".join(shortened(each) for each in hit[:2])
    more = f" and {len(hit) - 2} more" if len(hit) > 2 else ""
    verb = verb if len(runs) > 1 else f"{verb}s"
    if verb.startswith("warn"):
        return f"{len(runs)} of {total} audits {verb} ({listed}{more})"
    return f"{len(runs)} of {total} runs {verb} the audit ({listed}{more})"


def _failing(spoiled: str, who: str, worst: Sequence[Check], *, single: bool) -> str:
    counts = Counter(each.check for each in worst)
    named = [check if single else f"{check} in {n}" for check, n in counts.items()]
    first = worst[0]
    meanings = (first.meaning, first.cause)
    texts = [
        f"{spoiled}{who}: {listed}. {meaning[:1].upper()}{meaning[1:]}"
        for listed in (", ".join(named), _abridged(named, 2))
        for meaning in meanings
    ]
    return _fitting(*texts)


def _abridged(names: Sequence[str], at_most: int) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _spoiled(comparison: xr.Dataset) -> str:
    """What holds NaN or cannot be read, as a sentence of its own; "" for nothing."""
    if schema.STATUS not in comparison:
        return ""
    status = comparison[schema.STATUS].values
    parts = [
        f"{found:,} of {status.size:,} matrices {what}"
        for what, which in (
            ("hold NaN or Inf", Status.NON_FINITE),
            ("cannot be read", Status.UNREADABLE),
        )
        if (found := int((status == which).sum()))
    ]
    return f"{', '.join(parts)}. " if parts else ""


def _measured(comparison: xr.Dataset, groups: Sequence[Group]) -> Sentence:
    runs, steps = comparison.sizes[schema.RUN], comparison[schema.STEP].values
    inside = in_layers(comparison)
    places = zip(
        *(of_matrices(comparison, name)[inside] for name in ("stack", "layer")), strict=True
    )
    layers = len({(stack, layer) for stack, layer in places if layer != schema.NO_LAYER})
    what = f"{inside.sum()} matrices"
    what += f" in {layers} layers" if layers > 1 else " in 1 layer" if layers else ""
    per_group = {len(each.runs) for each in groups}
    if runs == 1:
        who = "1 run"
    elif per_group in ({1}, {runs}) or len(per_group) > 1:
        who = f"{runs} runs"
    else:
        who = f"{runs} runs ({len(groups)} × {per_group.pop()} seeds)"
    when = (
        f"{steps.size} records from step {steps[0]} to {steps[-1]}"
        if steps.size > 1
        else f"1 record at step {steps[0]}"
    )
    tokens = comparison["tokens"].max().item() if "tokens" in comparison else np.nan
    if np.isfinite(tokens) and tokens > 0:
        when += f" ({amount(tokens)} tokens)"
    text = f"{who}, {what}, {when}."
    return Sentence("Measured.", _fitting(f"{text} {_cells(comparison)}".rstrip(), text))


def _cells(comparison: xr.Dataset) -> str:
    """How many cells hold a number, of those that there could be, and why the others do not."""
    if schema.STATUS not in comparison:
        return ""
    counts = cell_counts(comparison)
    there = sum(counts.values()) - counts["does not apply"]
    said = f"{counts['measured']:,} of {there:,} spectra measured"
    rest = [
        f"{counts[name]:,} {name}"
        for name in ("not recorded", "undefined", "non finite", "unreadable")
        if counts[name]
    ]
    return f"{said} ({', '.join(rest)})." if rest else f"{said}."


def _weights(comparison: xr.Dataset, groups: Sequence[Group]) -> Sentence:
    question = "The weights."
    for kind in (schema.WEIGHT, schema.BASE):
        means = layer_means(comparison, "effective_rank", kind)
        if means is not None:
            break
    else:
        return Sentence(question, "The result has no effective ranks of weights.", "plain")
    possible = _possible(comparison, kind)
    several = means[schema.STEP].size > 1
    began, ended = (at_end(means, position) for position in (0, -1))
    ends = [
        (group.name, number(first.value), with_interval(last.value, last.half))
        for group in groups
        if (first := mean_over(began, group.runs)) is not None
        if (last := mean_over(ended, group.runs)) is not None
    ]
    begin = "Effective rank, mean of the layers"
    begin += f" ({number(possible)} possible)" if np.isfinite(possible) else ""
    firsts = {first for _, first, _ in ends}
    if several and len(firsts) == 1 and len(ends) > 1:
        begin += f", from {firsts.pop()} to"
        parts = [(name, last) for name, _, last in ends]
    else:
        parts = [(name, f"{first} → {last}" if several else last) for name, first, last in ends]
    most = _most_changed(comparison, kind, groups)
    return Sentence(question, _listing(begin, parts, most))


def _listing(begin: str, parts: Sequence[tuple[str, str]], end: str = "") -> str:
    """BEGIN: name text; name text. END, with as many of the names as there is room for."""
    if len(parts) == 1:
        return _fitting(f"{begin}: {parts[0][1]}.{end}", f"{begin}: {parts[0][1]}.")
    chosen = list(parts) if len(parts) <= _NAMED else [parts[0], parts[-1]]
    more = f"; {len(parts) - len(chosen)} more below" if len(chosen) < len(parts) else ""
    texts = []
    for letters in (24, 16):
        listed = "; ".join(f"{shortened(name, letters)} {text}" for name, text in chosen)
        texts += [f"{begin}: {listed}{more}.{end}", f"{begin}: {listed}{more}."]
    few = [parts[0], parts[-1]]
    listed = "; ".join(f"{shortened(name, 16)} {text}" for name, text in few)
    texts.append(f"{begin}: {listed}; {len(parts) - 2} more below.")
    return _fitting(*sorted(texts[:-1], key=len, reverse=True), texts[-1])


def _possible(comparison: xr.Dataset, kind: str) -> float:
    """The mean of min(m, n) over the matrices of the layers."""
    if not {"rows", "cols"} <= set(comparison.coords):
        return float("nan")
    sides = xr.where(
        comparison["rows"] < comparison["cols"], comparison["rows"], comparison["cols"]
    )
    return float(sides.isel({schema.MATRIX: in_layers(comparison)}).mean())


def _most_changed(comparison: xr.Dataset, kind: str, groups: Sequence[Group]) -> str:
    values = comparison["effective_rank"].sel({schema.KIND: kind})
    values = values.isel({schema.MATRIX: in_layers(comparison)})
    change = at_end(values, -1) - at_end(values, 0)
    means = np.stack(
        [change.isel({schema.RUN: list(g.runs)}).mean(schema.RUN).values for g in groups]
    )
    if not np.isfinite(means).any() or not np.nanmax(np.abs(means)) > 0:
        return ""
    group, matrix = divmod(int(np.nanargmax(np.abs(means))), means.shape[1])
    name = _short_matrix(comparison, str(change[schema.MATRIX].values[matrix]))
    of = f" of {shortened(groups[group].name)}" if len(groups) > 1 else ""
    return f" Most in {name}{of} ({number(float(means[group, matrix]), 3)})."


def _short_matrix(comparison: xr.Dataset, name: str) -> str:
    position = comparison[schema.MATRIX].values.tolist().index(name)
    layer = int(of_matrices(comparison, "layer")[position])
    module = modules_of(comparison)[position]  # with its stack, where there are several
    return f"layer {layer} {module}" if layer != schema.NO_LAYER and module else shortened(name)


def _learned(comparison: xr.Dataset, groups: Sequence[Group]) -> Sentence:
    question = "What was learned."
    found = ((kind, layer_means(comparison, "numerical_rank", kind)) for kind in LEARNED)
    kind, ranks = next(((k, each) for k, each in found if each is not None), ("", None))
    if ranks is None:
        return Sentence(question, "One record says nothing of it: there is no difference to see.")
    ended = at_end(ranks, -1)
    bounds, effective = (
        None if each is None else at_end(each, -1)
        for each in (
            layer_means(comparison, name, kind) for name in ("rank_bound", "effective_rank")
        )
    )
    parts = []
    for group in groups:
        rank = mean_over(ended, group.runs)
        if rank is None:
            continue
        bound = None if bounds is None else mean_over(bounds, group.runs)
        used = None if effective is None else mean_over(effective, group.runs)
        text = with_interval(rank.value, rank.half)
        text += "" if bound is None else f" of {number(bound.value)}"
        text += "" if used is None else f" ({number(used.value, 3)})"
        parts.append((group.name, text))
    what = LEARNED[kind]
    if len(parts) == 1:
        return Sentence(
            question, f"{what} has rank {parts[0][1].replace(' (', ' possible (effective rank ')}."
        )
    begin = f"Rank of {what[:1].lower()}{what[1:]}, of what is possible"
    begin += " (effective rank)" if effective is not None else ""
    return Sentence(question, _listing(begin, parts))


def _trust(comparison: xr.Dataset) -> Sentence:
    question = "Can I trust it?"
    facts = floor_facts(comparison)
    if facts is None:
        text = (
            "The result holds no spectra, so how much ranks depend on the noise floor is unknown."
        )
        return Sentence(question, text, "warn")
    share = facts.changed / facts.spectra
    texts = [
        f"A noise floor twice as high would change the rank in {facts.changed:,} of "
        f"{facts.spectra:,} spectra."
    ]
    if np.isfinite(facts.margin):
        texts.append(
            f"The smallest value counted is {number(facts.margin, 3)} × its floor (median)."
        )
    else:
        texts.append("No floor is needed: no stored number was rounded.")
    if facts.beyond:
        texts.append(f"{facts.beyond:,} ranks exceed their bound!")
    elif facts.noise:
        texts.append(f"Without it, rounding adds up to {facts.noise} directions.")
    tone = "bad" if facts.beyond else "warn" if share > 0.05 else "good"
    return Sentence(question, _fitting(" ".join(texts), " ".join(texts[:2])), tone)
