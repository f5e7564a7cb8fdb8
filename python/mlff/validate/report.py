"""The report of ``mlff validate``: a table on the terminal, one self-contained HTML page, JSON."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
from jinja2 import Environment

from .. import __version__
from .checks import Check
from .measurement import plain


@dataclass
class Report:
    """Result of :func:`mlff.validate.validate`.

    Attributes:
        model, sha256: what was validated.
        structures, n_structures: what the general checks were made on.
        checks: rows of the report.
        seconds: of the whole run.
        suite: name of the suite, or None.
        settings: of its measurement (mlff.validate.measurement.Settings).
        reference: source of the reference data (provenance of the teacher), or None.
        measured: its numbers, by part.
    """

    model: str
    sha256: str
    structures: str
    n_structures: int
    checks: list[Check]
    seconds: float
    suite: Optional[str] = None
    settings: Optional[dict] = None
    reference: Optional[dict] = None
    measured: dict = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no check with a limit failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict:
        """JSON values; figures are left out."""
        checks = [{k: v for k, v in asdict(check).items() if k != "figure"} for check in self.checks]
        return plain({**self.__dict__, "mlff_version": __version__, "passed": self.passed, "checks": checks})

    def write(self, path: Path) -> None:
        """The page, and its numbers beside it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(self), encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _number(check: Check) -> str:
    if check.value is None:
        return ""
    error = "" if check.error is None else f" ± {np.format_float_positional(check.error, 2, fractional=False, trim='-')}"
    return f"{check.value:.4g}{error} {check.unit}".rstrip()


def _limit(check: Check) -> str:
    return "" if check.limit is None else f"≤ {check.limit:.3g} {check.unit}".rstrip()


def _verdict(check: Check) -> str:
    return {True: "passed", False: "FAILED", None: ""}[check.passed]


def counts(report: Report) -> str:
    failed = sum(check.passed is False for check in report.checks)
    judged = sum(check.passed is not None for check in report.checks)
    return f"{judged - failed} of {judged} checks with a limit passed"


def show(report: Report, console) -> None:
    """The table on the terminal, and why what failed did."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{report.model} on {report.structures}", title_justify="left", title_style="bold", box=box.SIMPLE)
    for column in ("check", "value", "limit", ""):
        table.add_column(column, justify="right" if column in ("value", "limit") else "left")
    for check in report.checks:
        style = {True: "green", False: "bold red", None: ""}[check.passed]
        table.add_row(check.name, _number(check), _limit(check), Text(_verdict(check), style=style))
    console.print(table)
    for check in report.checks:
        if check.passed is False or check.value is None:
            console.print(Text(f"{check.name}: {check.note}"))
    console.print(f"{counts(report)}, in {report.seconds:.1f} s")


def _page(report: Report) -> str:
    sections: dict[str, list[Check]] = {}
    for check in report.checks:
        sections.setdefault(check.section or "Checks", []).append(check)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": _number,
        "limit": _limit,
        "verdict": _verdict,
        "base64": lambda x: base64.b64encode(x).decode(),
    }
    return environment.from_string(TEMPLATE).render(report=report, sections=sections, counts=counts(report), version=__version__)


TEMPLATE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>mlff validate: {{ report.model }}</title>
<style>
body { font: 15px sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; vertical-align: top; }
td:nth-child(2), td:nth-child(3) { text-align: right; white-space: nowrap; }
td:nth-child(5) { color: #666; overflow-wrap: anywhere; }
.passed td:nth-child(4) { color: #080; }
.failed td:nth-child(4) { color: #c00; font-weight: bold; }
figure { margin: 1em 0; }
img { max-width: 100%; }
figcaption { color: #666; }
</style></head><body>
<h1>{{ "Passed" if report.passed else "Failed" }}: {{ report.model }}</h1>
<p>{{ counts }}. {{ report.n_structures }} structures of {{ report.structures }}; mlff {{ version }}
{%- if report.sha256 %}; model SHA-256 {{ report.sha256 }}{% endif %}.
It took {{ "%.0f" | format(report.seconds) }} s.</p>
{% if report.suite %}
<p>Suite {{ report.suite }}{% for key, value in report.settings.items() if value %}, {{ key }} {{ value }}{% endfor %}.
{% if report.settings.quick %}<b>A quick run: it shows that everything runs, its numbers say nothing about the model.</b>{% endif %}
{% if report.reference %}
Compared with {{ report.reference.name }}
({% for key, value in report.reference.items() if key not in ("name", "citation") %}
{{ key | replace("_", " ") }} {{ value }}{{ ", " if not loop.last }}
{%- endfor %}).
{{ report.reference.citation }}
{% else %}No teacher to compare with: give one (--teacher, --reference).{% endif %}</p>
{% endif %}
{% if not report.passed %}
<h2>What failed</h2>
<ul>
{% for check in report.checks if check.passed is false %}
<li>{{ check.section }}: {{ check.name }}
{%- if check.value is not none %}, {{ check | number }} (limit {{ check | limit }}){% endif %}: {{ check.note }}</li>
{% endfor %}
</ul>
{% endif %}
{% for title, checks in sections.items() %}
<h2>{{ title }}</h2>
<table><tr><th>check</th><th>value</th><th>limit</th><th></th><th>how, and compared with what</th></tr>
{% for check in checks %}
<tr class="{{ {true: "passed", false: "failed"}[check.passed] }}"><td>{{ check.name }}</td><td>{{ check | number }}</td>
<td>{{ check | limit }}</td><td>{{ check | verdict }}</td><td>{{ check.note }}</td></tr>
{% endfor %}</table>
{% for check in checks if check.figure %}
<figure><img alt="{{ check.name }}" src="data:image/png;base64,{{ check.figure | base64 }}">
<figcaption>{{ title }}: {{ check.name }}</figcaption></figure>
{% endfor %}
{% endfor %}
<p>± is one standard error. A check without a limit is reported without judgement.</p>
</body></html>
"""
