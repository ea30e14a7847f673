"""Draw docs/pictures/fold.svg: the first block of BN-LeNet before and after the fold, from the two graphs.

Use: python tests/support/fold_picture.py
Boxes are operations of the graphs; below them is the number of stored values that they read. The equation is the report's.
"""

import math
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

import bnexport

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "fold.svg"
BLOCK = ("conv1", "bn1", "sigmoid1", "pool1")
WIDTH, BOX, HEIGHT, STEP, LEFT, ROWS = 860, 150, 58, 190, 110, (40, 190)

STYLE = """
  text { font: 14px ui-sans-serif, system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .small { font-size: 12.5px; fill: #59636e } .row { text-anchor: start; font-weight: 600 }
  rect { fill: #eef2f7; stroke: #7d8ca0; rx: 6px }
  .norm { fill: #fff1d6; stroke: #bf8700 } .gone { fill: none; stroke: #bf8700; stroke-dasharray: 5 4 }
  path { fill: none; stroke: #7d8ca0; stroke-width: 1.4px } .moved { stroke: #bf8700; stroke-width: 2px }
  #tip { fill: #7d8ca0; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } rect { fill: #1c2430; stroke: #8b99ad }
    .norm { fill: #3b2f14; stroke: #d4a72c } .gone { fill: none; stroke: #d4a72c }
    path { stroke: #8b99ad } .moved { stroke: #d4a72c } #tip { fill: #8b99ad; stroke: none }
  }
"""


@dataclass(frozen=True)
class Operation:
    """One box: the module's name, the operator's name, and the number of stored values that the operator reads."""

    module: str
    operator: str
    stored: int


def operations(graph_module: Any) -> list[Operation]:
    """Return the operations of the block, in the order of a graph of torch.export."""
    found = []
    for node in graph_module.graph.nodes:
        stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
        if node.op == "call_function" and stack and stack[-1] in BLOCK:
            tensors = [attrgetter(read.target)(graph_module) for read in node.all_input_nodes if read.op == "get_attr"]
            operator = str(node.target).split(".")[1]
            found.append(Operation(stack[-1], operator, sum(math.prod(tensor.shape) for tensor in tensors)))
    return found


def draw() -> str:
    """Return the picture as SVG."""
    network, example = bnexport.bn_lenet().eval(), (torch.rand(2, 1, 28, 28),)
    result = bnexport.fold(network, example)
    (row,) = [row for row in result.report.rows if row.module == "bn1"]
    parts = []
    for top, title, graph in zip(
        ROWS, ("before", "after"), (torch.export.export(network, example).module(), result.model), strict=True
    ):
        shown = operations(graph)
        parts.append(f'<text class="row" x="16" y="{top + 34}">{title}</text>')
        places = [_left(operation.module) for operation in shown]
        ends = [LEFT - STEP + BOX, *(place + BOX for place in places)]
        for place, end in zip([*places, WIDTH], ends, strict=True):
            start = max(end, LEFT - 28)
            parts.append(f'<path d="M{start} {top + 29}H{place - 2}" marker-end="url(#arrow)"/>')
        parts += [_box(operation, top) for operation in shown]
        for name in set(BLOCK) - {operation.module for operation in shown}:
            parts.append(f'<rect class="gone" x="{_left(name)}" y="{top}" width="{BOX}" height="{HEIGHT}"/>')
            parts.append(f'<text class="small" x="{_left(name) + BOX // 2}" y="{top + 20}">{name} is gone</text>')
    above, below = ROWS[0] + HEIGHT, ROWS[1]
    start, end = _left(row.module) + BOX // 2, _left(str(row.into)) + BOX // 2
    middle = (above + below) // 2
    parts.append(
        f'<path class="moved" d="M{start} {above} C{start} {middle + 14} {end} {middle - 14} {end} {below - 2}"'
        ' marker-end="url(#arrow)"/>'
    )
    parts.append(f'<text x="{start + 150}" y="{middle + 14}">{row.equation}</text>')
    note = "s = gamma / sqrt(var + eps),  t = beta - s mean"
    parts.append(f'<text class="small" x="{start + 150}" y="{middle + 34}">{note}</text>')
    arrow = '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    defs = f'<defs>{arrow}<path id="tip" d="M0 0L8 4L0 8z"/></marker></defs>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {below + HEIGHT + 20}">'
    heading = "<title>The first block of BN-LeNet: the BatchNorm becomes part of the convolution before it</title>"
    return "\n".join([head, heading, f"<style>{STYLE}</style>", defs, *parts, "</svg>", ""])


def _left(module: str) -> int:
    return LEFT + STEP * BLOCK.index(module)


def _box(operation: Operation, top: int) -> str:
    kind = "norm" if operation.operator == "batch_norm" else "plain"
    left, middle = _left(operation.module), _left(operation.module) + BOX // 2
    stored = f"{operation.stored} stored numbers" if operation.stored else "no stored numbers"
    return (
        f'<rect class="{kind}" x="{left}" y="{top}" width="{BOX}" height="{HEIGHT}"/>'
        f'<text x="{middle}" y="{top + 24}">{operation.module}: {operation.operator}</text>'
        f'<text class="small" x="{middle}" y="{top + 44}">{stored}</text>'
    )


def main() -> int:
    """Write the picture."""
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
