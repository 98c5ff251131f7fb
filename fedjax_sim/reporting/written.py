"""A line that shows how much is written, if somebody is there to see it."""

from __future__ import annotations

from types import TracebackType

from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from fedjax_sim.reporting.progress import stderr


class Written:
  """What is written, clients and examples; a context manager.

  It draws on the standard error, where `Progress` does.
  """

  def __enter__(self) -> Written:
    console = stderr()
    self._bar = Bar(
      SpinnerColumn("line"),
      TextColumn("{task.description}"),
      TimeElapsedColumn(),
      console=console,
      disable=not console.is_interactive,
      transient=True,
    )
    self._task = self._bar.add_task("reading")
    self._bar.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._bar.stop()

  def update(self, what: str, clients: int, examples: int) -> None:
    """Shows how far it is.

    Args:
      what: a split's name, say.
      clients: of it, so far.
      examples: of it, so far.
    """
    told = f"{what}  {clients:,} clients  {examples:,} examples"
    self._bar.update(self._task, description=told)
