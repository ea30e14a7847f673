"""``torch.compile`` with inductor's freezing, which folds BatchNorm in two passes: on modules, and on constants."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bnexport.auditing.subject import call
from bnexport.auditing.tool import Job, Product
from bnexport.errors import RuntimeUnavailable

#: Inductor's configuration while it is audited.
SETTINGS: dict[str, Any] = {
    "freezing": True,
    "compile_threads": 1,  # no pool of worker processes that outlives the audit
    "fx_graph_cache": False,  # a cached graph is not seen by the pass that counts
    "cpp_cache_precompile_headers": False,  # it would leave files outside of the fresh cache
}
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_UNKNOWN = object()


@contextlib.contextmanager
def compile_freezing(job: Job) -> Iterator[Product]:
    """Compile with ``torch._inductor.config.freezing``; configuration, caches and files are as before afterwards.

    Raises:
        RuntimeUnavailable: There is no C++ compiler.
    """
    with _files_in(job.folder):
        import torch._inductor.config as config
        from torch._inductor.utils import fresh_cache

        need_compiler(config.cpp.cxx)
        graphs: list[set[object]] = []
        settings = {**SETTINGS, "post_grad_custom_post_pass": lambda graph: graphs.append(sites_left(graph))}
        torch._dynamo.reset()
        try:
            with fresh_cache(dir=str(job.folder)), config.patch(settings):
                compiled = torch.compile(job.module)
                call(compiled, job.example)
                yield Product(functools.partial(call, compiled), _total(graphs))
        finally:
            torch._dynamo.reset()


@contextlib.contextmanager
def _files_in(folder: Path) -> Iterator[None]:
    """Keep inductor's files in a folder, and undo what it sets in the environment: on import its usual folder, and more."""
    before = dict(os.environ)
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def need_compiler(candidates: Any) -> None:
    """Refuse a machine without any of the compilers that inductor would try.

    Args:
        candidates: ``torch._inductor.config.cpp.cxx``: a command, or several with None among them.

    Raises:
        RuntimeUnavailable: None of them is on the PATH.
    """
    listed = candidates if isinstance(candidates, list | tuple) else (candidates,)
    commands = ["cl"] if sys.platform == "win32" else [str(command) for command in listed if command]
    if not any(shutil.which(shlex.split(command)[0]) for command in commands if command.strip()):
        raise RuntimeUnavailable(
            f"no C++ compiler ({' or '.join(commands)}) is on the PATH",
            remedy="Install one, such as g++, or name it in the environment variable CXX",
        )


def sites_left(graph: Any) -> set[object]:
    """BatchNorm calls of which an operation is left in inductor's final graph.

    Inductor writes BatchNorm out as arithmetic, so there is no operator to count; but each node keeps the operator that
    it was written out of, and the name of the call.
    """
    left: set[object] = set()
    for node in graph.nodes:
        if node.op == "call_function" and "batch_norm" in str(node.meta.get("original_aten")):
            source = node.meta.get("from_node")
            left.add(source[0].name if source else _UNKNOWN)
    return left


def _total(graphs: list[set[object]]) -> int | None:
    """Over all graphs; a graph break makes several. None where nodes have lost their origin."""
    if not graphs or any(_UNKNOWN in sites for sites in graphs):
        return None
    return sum(len(sites) for sites in graphs)
