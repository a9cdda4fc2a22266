"""What a person sees of a push."""

from rich.console import Console
from rich.table import Table

from .pushing import Result


def report(result: Result) -> None:
    """Prints what was pushed and where it is; after a dry run, what would be."""
    console = Console(highlight=False)
    if result.pushed is None:
        table = Table(title=f"{result.repository} would hold", title_justify="left")
        table.add_column("file")
        table.add_column("bytes", justify="right")
        for name, size in result.sizes.items():
            table.add_row(name, f"{size:,}")
        table.add_section()
        table.add_row("together", f"{sum(result.sizes.values()):,}")
        console.print(table)
    else:
        pushed = result.pushed
        done = "Everything was there already" if pushed.was_there else "Pushed"
        print(f"{done}: {pushed.url}  (commit {pushed.commit[:7]})")
        if result.arguments.tag is not None:
            print(f"Tag: {result.arguments.tag}")
        if result.verified:
            print("Loaded from the Hub in a clean process: it writes the same as the folder here.")
        if result.space is not None:
            print(f"Space: {result.space.url}")
    for notice in result.notices:
        print(f"({notice})")
    if result.pushed is None:
        print(f"(A dry run: nothing was sent.)\n\nThe card:\n\n{result.card}")  # last, because it is long
