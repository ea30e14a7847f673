import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from bnexport.auditing import audit as auditing
from bnexport.auditing.audited_network import call
from bnexport.auditing.tool_table import TOOLS, Product, Tool, ToolInput

Maker = Callable[[ToolInput], Any]


@pytest.fixture
def with_tools(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace TOOLS by the control and tools of the test: name=function from a job to a torch callable."""

    def replace(**makers: Maker) -> None:
        rows = (Tool(name, partial(_open, maker)) for name, maker in makers.items())
        monkeypatch.setattr(auditing, "TOOLS", (TOOLS[0], *rows))

    return replace


@contextlib.contextmanager
def _open(maker: Maker, job: ToolInput) -> Iterator[Product]:
    yield Product(partial(call, maker(job)), 0)
