"""`RunView`: a run seen through something, which passes on all that it does not change."""

from typing import Any

from dynamics.runs.run import Matrix, Run


def _forwarded(member: str) -> Any:
    return property(
        lambda view: getattr(view.inner, member), doc=f"`Run.{member}` of the run that is viewed."
    )


class RunView(Run):
    """A run in front of another one. Every public member is that of the inner run.

    A view derives from this class and overrides the members that it changes. What it does not
    override cannot get lost: a test compares every public member of `Run` for every view.

    Attributes:
        inner: the run that is viewed.
    """

    path = _forwarded("path")
    format = _forwarded("format")
    steps = _forwarded("steps")
    stored_kinds = _forwarded("stored_kinds")
    spectrum_kinds = _forwarded("spectrum_kinds")
    kinds = _forwarded("kinds")
    matrices = _forwarded("matrices")
    attrs = _forwarded("attrs")
    problems = _forwarded("problems")
    places = _forwarded("places")
    source = _forwarded("source")
    passed_over = _forwarded("passed_over")
    account = _forwarded("account")
    absent_kinds = _forwarded("absent_kinds")
    merges_told_by_events = _forwarded("merges_told_by_events")
    events = _forwarded("events")
    scalars = _forwarded("scalars")
    read_spectrum = _forwarded("read_spectrum")
    origin = _forwarded("origin")
    merges_between = _forwarded("merges_between")
    update_reference = _forwarded("update_reference")
    trains = _forwarded("trains")
    sparse_entries = _forwarded("sparse_entries")
    require_matrices = _forwarded("require_matrices")
    check_step = _forwarded("check_step")

    def __init__(self, inner: Run):
        self.inner = inner

    def read(self, name: str, step: int, kind: str) -> Matrix | None:
        """See `Run.read`."""
        return self.inner.read(name, step, kind)

    # `read_group` is not forwarded: it has to give what `read` of this view gives.
