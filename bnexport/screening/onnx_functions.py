"""Functions inside an ONNX file: engines put their nodes in the place of each call, so calls must end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from bnexport.screening.limits import limit
from bnexport.screening.refusal import Refusal, shown

#: Domain, name, overload.
Call = tuple[str, str, str]


def check_calls(main: Counter[Call], functions: Mapping[Call, Counter[Call]]) -> None:
    """Refuse functions that call each other in a circle, or that grow a file to millions of nodes.

    Args:
        main: Nodes of the model's graphs -> how many.
        functions: Function -> the nodes in it.

    Raises:
        Refusal: Naming a function of the circle, or the number of nodes.
    """
    sizes: dict[Call, int] = {}
    waiting = {call: {inner for inner in nodes if inner in functions} for call, nodes in functions.items()}
    users: dict[Call, list[Call]] = {}
    for call, inner in waiting.items():
        for used in inner:
            users.setdefault(used, []).append(call)
    ready = [call for call, inner in waiting.items() if not inner]
    while ready:
        call = ready.pop()
        sizes[call] = _expanded(functions[call], sizes)
        for user in users.get(call, ()):
            waiting[user].discard(call)
            if not waiting[user]:
                ready.append(user)
    if len(sizes) < len(functions):
        name = next(call for call in functions if call not in sizes)[1]
        raise Refusal(f"has the function {shown(name)}, which calls itself")
    if (nodes := _expanded(main, sizes)) > limit("onnx-expanded"):
        raise Refusal(f"has functions that grow it to {min(nodes, 10**18)} nodes, more than {limit('onnx-expanded')}")


def _expanded(nodes: Counter[Call], sizes: Mapping[Call, int]) -> int:
    """How many nodes there are when calls are replaced; cut off, since a power tower of it has millions of digits."""
    return min(sum(count * sizes.get(call, 1) for call, count in nodes.items()), 10**18)
