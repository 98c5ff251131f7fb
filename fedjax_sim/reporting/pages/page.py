"""A page of sections as one HTML file that needs no other and no network."""

from __future__ import annotations

import math
import re
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedjax_sim.reporting.figures.curves import new_figure
from fedjax_sim.reporting.figures.style import PALETTE, SCREEN
from fedjax_sim.reporting.figures.svg import inline_svg, page_style

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_TEMPLATES = Path(__file__).parent / "templates"
_WIDTH, _HEIGHT = 4.4, 3.2  # inches, so that letters are readable on phones
# The palette on a dark page: each has a contrast of 3 or more with it.
_DARK = (
  "#6cb2f0",
  "#ff9d4d",
  "#62c975",
  "#ff7b7b",
  "#b99cf0",
  "#c99b90",
  "#f08fd2",
  "#b4b9be",
  "#cfcf57",
  "#4fd0e0",
)


class Table(NamedTuple):
  """A table; cells that are numbers are aligned at their right ends.

  Attributes:
    caption: what it shows.
    head: of the columns.
    rows: their cells, as text.
    texts: whether the columns after the first are texts, too.
  """

  caption: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]
  texts: bool = False


class Figure(NamedTuple):
  """A picture.

  Attributes:
    caption: what it shows, also for those who do not see it.
    svg: the element, which is not escaped any more.
  """

  caption: str
  svg: str


class Card(NamedTuple):
  """A number that a reader looks for first."""

  name: str
  value: str
  note: str = ""


class Section(NamedTuple):
  """A part of a page; shown in the order of the attributes.

  Attributes:
    title: its heading.
    texts: paragraphs.
    warnings: paragraphs that stand out.
    cards: numbers.
    figures: pictures.
    facts: name -> text.
    tables: tables.
    codes: caption -> text in letters of one width.
    folded: whether it is shown only when a reader asks for it, or prints.
  """

  title: str
  texts: Sequence[str] = ()
  warnings: Sequence[str] = ()
  cards: Sequence[Card] = ()
  figures: Sequence[Figure] = ()
  facts: Mapping[str, str] = types.MappingProxyType({})
  tables: Sequence[Table] = ()
  codes: Mapping[str, str] = types.MappingProxyType({})
  folded: bool = False


def draw(
  name: str,
  caption: str,
  onto: Callable[[Axes], None],
  height: float = _HEIGHT,
) -> Figure:
  """Return the picture of one panel.

  Args:
    name: of the picture; another for each of a page; letters and digits.
    caption: what it shows.
    onto: draws it.
    height: of the picture, in inches.
  """
  with page_style(), warnings.catch_warnings():
    # Letters stay letters, so that the reader's fonts are those that count.
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    figure = new_figure(1, SCREEN._replace(width=_WIDTH, height=height))
    onto(figure.subplots())
    return Figure(caption, inline_svg(figure, name, caption))


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
  """Return the page; all texts are escaped.

  Args:
    title: of the page.
    subtitle: a line below it.
    sections: in their order.
  """
  import jinja2
  from markupsafe import Markup

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["drawn"] = Markup
  environment.filters["breakable"] = _breakable
  return environment.get_template("report.html.jinja").render(
    title=title,
    subtitle=subtitle,
    sections=sections,
    light=PALETTE,
    dark=_DARK,
  )


def _breakable(text: str) -> str:
  """Return a name, escaped, that may go on in another line after / _ and .."""
  from markupsafe import Markup, escape

  return Markup(re.sub(r"([/_.])(?=\w)", r"\1<wbr>", str(escape(text))))


def percent(share: float) -> str:
  """Return a share as a text, such as 12.3 %."""
  return "NaN" if math.isnan(share) else f"{100 * share:.1f} %"
