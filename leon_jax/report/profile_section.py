"""The sections of `leon report` on profiles: top operations and the share of collectives."""

import html
import sys
from collections.abc import Sequence

from leon_jax import html_page
from leon_jax.report import operations
from leon_jax.report.runs import Run

# Number of operations that are shown.
_SHOWN = 15


def sections(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Returns the (heading, HTML body) of each profile of the runs.

    If xprof is not installed, a sentence on the page and on stderr says so.
    """
    profiles = [(run, name, files) for run in runs for name, files in run.profiles()]
    if profiles and not operations.is_available():
        print(f"leon report: {operations.MISSING}", file=sys.stderr)
        sentence = operations.MISSING[0].upper() + operations.MISSING[1:]
        return [("Profiles", f"<p>{sentence}.</p>")]
    return [
        (f"Profile of {run.name}, {name}", _body(operations.read(files), len(files)))
        for run, name, files in profiles
    ]


def _body(rows: Sequence[operations.Operation], hosts: int) -> str:
    if not rows:
        return "<p>xprof finds no operations of devices in this profile.</p>"
    total = sum(row.seconds for row in rows)
    share = 100 * operations.collective_share(rows)
    cells = [
        [
            f"<code>{html.escape(row.name)}</code>",
            html.escape(row.category),
            f"{row.runs:,}",
            f"{1000 * row.seconds:,.2f} ms",
            f"{100 * row.seconds / total:.1f} %",
        ]
        for row in rows[:_SHOWN]
    ]
    return (
        f"<p>Collectives take {share:.1f} % of the {total:,.3g} s of all operations, on "
        f"{hosts} host{'s' * (hosts > 1)}. Their time includes the wait for other devices.</p>"
        + html_page.table(["Operation", "Kind", "Runs", "Time", "Share"], cells)
    )
