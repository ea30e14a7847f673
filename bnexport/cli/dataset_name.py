"""The value of ``--dataset``."""

from __future__ import annotations

from typing import Any

import click

from bnexport.data.catalogue import DATASETS, FOLDER, is_dataset


class DatasetName(click.Choice[str]):
    """A row of DATASETS, or ``folder:PATH``."""

    def __init__(self) -> None:
        super().__init__(tuple(DATASETS))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:  # noqa: ARG002
        """The choices for the help."""
        return f"[{'|'.join(DATASETS)}|{FOLDER}PATH]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name; what is no name is refused with the list of names."""
        if isinstance(value, str) and value not in DATASETS and is_dataset(value):
            return value
        return super().convert(value, param, ctx)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:  # noqa: ARG002
        """The list of names."""
        return f"{value!r} is not one of {', '.join(DATASETS)}, {FOLDER}PATH."
