"""A page of sections as Markdown with figures beside it, and as one HTML file that needs no other."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from coconut.report.probes import Card, questions_table
from coconut.report.svg import Chart
from coconut.report.tables import Table
from coconut.report.text import visible

_TEMPLATES = "templates"
_FIGURE_STYLE = "text{font:10px sans-serif;fill:#555}.grid{stroke:#ddd;stroke-width:.6}.whisker{stroke:#333;fill:none}"


@dataclass(frozen=True)
class Group:
    """Questions of one entry."""

    label: str
    cards: Sequence[Card]


@dataclass(frozen=True)
class Questions:
    """Questions to search through, with the answers of every entry."""

    entries: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    """Each has `index`, `question`, `steps`, `gold`, `thoughts` and `answers`: (text, is right) for each entry."""


@dataclass(frozen=True)
class Section:
    """A heading and its content, independent of the output format."""

    title: str
    text: str = ""
    table: Table | None = None
    charts: Sequence[Chart] = ()
    cards: Sequence[Group] = ()
    folded: Table | None = None
    """A table that one opens."""
    folded_title: str = ""
    links: Sequence[str] = ()
    """Files with the numbers, relative to the page."""
    questions: Questions | None = None
    anchor: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchor", slug(self.title))

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Return name, colour and dashes of every line."""
        lines = {one.label: (visible(one.label), one.colour, one.dashes) for c in self.charts for one in c.shown}
        return list(lines.values())


def slug(title: str) -> str:
    """Return a title as part of an address.

    >>> slug("Training loss, by update")
    'training-loss-by-update'
    """
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")


def draw_figures(sections: Sequence[Section]) -> dict[str, str]:
    """Draw every chart as a file of its own, by name."""
    charts = [chart for section in sections for chart in section.charts]
    return {f"{slug(chart.title)}.svg": f"{chart.to_svg(style=_FIGURE_STYLE)}\n" for chart in charts}


def render_markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Write one Markdown page; the figures are files next to it."""
    blocks = [f"# {title}", lead]
    for section in sections:
        blocks += [f"## {section.title}", section.text]
        if section.table is not None:
            blocks.append(section.table.to_markdown())
        names = ", ".join(name for name, _, _ in section.legend)
        blocks += [f"![{chart.title}: {names}]({slug(chart.title)}.svg)" for chart in section.charts]
        blocks.append(", ".join(f"[{path.removeprefix('../')}]({path})" for path in section.links))
        for group in section.cards[:1]:
            for card in group.cards[:2]:
                head = f"{group.label}, test question {card.index}: {card.question} Right answer: {card.gold}."
                blocks += [_plain(head), questions_table(card).to_markdown()]
        if section.folded is not None:
            blocks += [f"### {section.folded_title}", section.folded.to_markdown()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _plain(text: str) -> str:
    """Keep what data or a model wrote from becoming markup of Markdown."""
    return re.sub(r"[\\*_|\[<]", r"\\\g<0>", text)


def render_html(title: str, lead: str, sections: Sequence[Section], front: Chart | None = None) -> str:
    """Write one page that needs no other file and no network."""
    context: Mapping[str, object] = {
        "title": title,
        "paragraphs": lead.split("\n\n"),
        "sections": sections,
        "front": front,
        "style": _read("page.css"),
        "script": _read("page.js"),
    }
    return _environment().get_template("page.html.jinja").render(context) + "\n"


@cache
def _environment() -> Environment:
    return Environment(loader=PackageLoader("coconut.report", _TEMPLATES), autoescape=True, undefined=StrictUndefined)


def _read(name: str) -> Markup:
    return Markup((resources.files("coconut.report") / _TEMPLATES / name).read_text(encoding="utf-8"))
