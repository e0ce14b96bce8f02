"""What people read: report.html and report.md of a sweep or a comparison, and answers.html.

The two pages open from disk without a network: libraries, data and styles are within them. All text from models, data
and judges is text to the browser: the templates escape it, the scripts set it as textContent, and a page's policy lets
no script run but those whose hashes it names.
"""

import base64
import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import jinja2
import pandas as pd
import vl_convert

from prefscan.common.io import new_folder, read_text, write_text


class Figure(NamedTuple):
    """A chart, its data as a table, and one sentence on how to read it."""

    caption: str
    reading: str
    chart: alt.TopLevelMixin
    data: pd.DataFrame


class Table(NamedTuple):
    """A table of the report; `columns` maps a column of `data` to its heading and how a value is printed."""

    caption: str
    reading: str
    data: pd.DataFrame
    columns: dict[str, tuple[str, str]]


def printed(value: Any, form: str) -> str:
    """A dash for what is missing."""
    return "–" if value is None or value != value else form.format(value)


def plain(value: Any) -> str:
    """A value of a chart's data table: numbers to four digits."""
    return printed(value, "{:.4g}" if isinstance(value, float) else "{}")


def as_json(value: Any) -> str:
    """JSON that stands in a script element: no `<` in it can end the element or begin another."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def own_script(name: str) -> str:
    return files("prefscan.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def policy_hash(script: str) -> str:
    """By which a page's policy lets a script element of this text run, and no other (CSP 3, 'sha256-…')."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def environment(autoescape: bool) -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("prefscan.reporting"),
        autoescape=autoescape,  # noqa: S701 - off for Markdown alone, whose template escapes its own way
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals |= {"printed": printed, "plain": plain, "as_json": as_json}
    return found


def write_answers(root: Path, title: str, models: dict[str, Any], questions: list[Any]) -> None:
    """answers.html in the folder `root`: two models' answers side by side, with the judge's words."""
    pages = environment(autoescape=True)
    script = own_script("answers.js")
    page = pages.get_template("answers.html").render(
        title=title, data={"models": models, "questions": questions}, script=script, hashes=policy_hash(script)
    )
    write_text(root / "answers.html", page)


def write_report(
    root: Path,
    title: str,
    lines: list[str],
    figures: dict[str, Figure],
    tables: list[Table],
    shown: list[str],
    answers: bool = False,
) -> None:
    """report.html and report.md in the folder `root`, and the charts as SVG and PNG in its folder charts.

    `figures` maps a file name to its figure; `shown` are the names that the page can show alone in all charts; with
    `answers`, it links to answers.html beside it.
    """
    specs = {name: figure.chart.to_dict() for name, figure in figures.items()}
    version = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]
    with new_folder(root / "charts") as folder:
        for name, spec in specs.items():
            picture = vl_convert.vegalite_to_svg(spec, vl_version=version)
            # Vega counts gradients over the life of a process; a file must not depend on what was drawn before.
            write_text(folder / f"{name}.svg", re.sub(r"gradient_\d+", f"gradient_{name}", picture))
            (folder / f"{name}.png").write_bytes(vl_convert.vegalite_to_png(spec, vl_version=version, scale=2))
    pages = environment(autoescape=True)
    # Without a snippet, which its types ask for, it sets window.vegaEmbed, and is made once in a process.
    library, script = vl_convert.javascript_bundle(), own_script("report.js")  # type: ignore[call-arg]
    page = pages.get_template("report.html").render(
        title=title,
        lines=lines,
        figures=figures,
        svgs={name: read_text(root / f"charts/{name}.svg") for name in figures},
        specs=specs,
        shown=shown,
        answers=answers,
        tables=tables,
        library=library,
        script=script,
        hashes=f"{policy_hash(library)} {policy_hash(script)}",
    )
    write_text(root / "report.html", page)
    markdown = environment(autoescape=False).get_template("report.md")
    write_text(root / "report.md", markdown.render(title=title, lines=lines, figures=figures, tables=tables))
