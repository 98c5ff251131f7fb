"""A line that shows how much is written, if somebody is there to see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from fedjax_sim.reporting.progress import stderr


@contextlib.contextmanager
def written() -> Iterator[Callable[[str, int, int], None]]:
  """Show a line of progress on the standard error, if that is a terminal.

  Yields:
    A function of what is written, such as a split's name, and of how many
    clients and examples it has so far; it updates the line.
  """
  from rich import progress

  console = stderr()
  with progress.Progress(
    progress.SpinnerColumn("line"),
    progress.TextColumn("{task.description}"),
    progress.TimeElapsedColumn(),
    console=console,
    disable=not console.is_interactive,
    transient=True,
  ) as bar:
    task = bar.add_task("reading")

    def told(what: str, clients: int, examples: int) -> None:
      text = f"{what}  {clients:,} clients  {examples:,} examples"
      bar.update(task, description=text)

    yield told
