"""Types of arguments, and options, that several commands have."""

import math
import os
from pathlib import Path
from typing import Any

import click


class _Path(click.Path):
    """A path, whether anything is there or not: what is wrong with it, its user can tell better."""

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        if not os.fspath(value):  # pathlib would take the current directory
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """A time; never nan, which every comparison lets pass."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click.FloatRange does."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no time", param, ctx)
        return number


PATH = _Path(path_type=Path, readable=False)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
