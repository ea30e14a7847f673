"""The pages of the documentation: their blocks, commands and links, and a session that runs a page and compares the outputs.

Use: python tests/support/documents.py PAGE...     Run each page in a new folder and write the real outputs into it.

A block of code after a paragraph that ends with a file's name and a colon is that file. In a ``console`` block the lines after
a command are its standard output; a line "..." stands for any number of lines. ``bnexport serve`` runs until the page ends.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "results").glob("*.md")),
]
#: Pages whose console blocks without output are examples and do not run.
EXAMPLES = ("README.md",)
#: Seconds that one command of a page may take on a busy machine.
PATIENCE = 800.0
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"`([\w.]+)`[^`\n]*:\n\n\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, where the text starts in the page, and the file that it is ("" for none)."""

    language: str
    text: str
    start: int
    file: str


def blocks(text: str, *languages: str) -> list[Block]:
    """Return the blocks of some languages, or all blocks, in the page's order."""
    found = []
    for match in _BLOCK.finditer(text):
        named = _FILE.search(text[: match.start()])
        if not languages or match[1] in languages:
            found.append(Block(match[1], match[2], match.start(2), named[1] if named else ""))
    return found


def steps(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with the output that the page shows."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    return [(part[: (end := _end_of_command(part))], part[end + 1 :]) for part in parts]


def _end_of_command(part: str) -> int:
    match = re.search(r"(?<!\\)\n", part)
    assert match is not None, part
    return match.start()


def commands(text: str) -> list[list[str]]:
    """Return the words of every command line in the console blocks of a page."""
    found = [command for block in blocks(text, "console") for command, _ in steps(block)]
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rule."""
    plain = _BLOCK.sub("", text)
    headings = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    """Return each relative link of a page whose file or anchor does not exist."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", _BLOCK.sub("", text)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            yield target


class Session:
    """Runs the blocks of one page, in order, in one folder. A server that a block starts ends with the session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: subprocess.Popen[str] | None = None
        self._port = "8000"
        shims = folder / ".bin"
        shims.mkdir()
        for name, words in (("bnexport", "-m bnexport"), ("python", "")):
            (shims / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
            (shims / name).chmod(0o755)
        self._environment = os.environ | {
            "PATH": f"{shims}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(folder / ".cache"),
        }  # fmt: skip

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.communicate()

    def run(self, command: str) -> str:
        """Run one command line; return its standard output."""
        if command.startswith("bnexport serve"):
            return self._serve(command)
        words = ["bash", "-c", command.replace("localhost:8000", f"localhost:{self._port}")]
        done = subprocess.run(
            words, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
        data = os.environ.get("BNEXPORT_DATA")
        return _tidy(done.stdout.replace(data, "data") if data else done.stdout)

    def _serve(self, command: str) -> str:
        with (self.folder / ".serve.log").open("w") as log:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {command} --port 0"],
                cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._server.stdout is not None
        ready, _, _ = select.select([self._server.stdout], [], [], PATIENCE)
        line = self._server.stdout.readline() if ready else ""
        match = re.search(r":(\d+)$", line.strip())
        assert match, (line, (self.folder / ".serve.log").read_text())
        self._port = match[1]
        return _tidy(line.replace(f":{self._port}", ":8000"))

    def follow(self, page: Path) -> Iterator[tuple[Block, list[tuple[str, str, str]]]]:
        """Write the files and run the console blocks of a page, in order; yield (command, shown output, real output)."""
        text = page.read_text(encoding="utf-8")
        if page.name not in EXAMPLES and re.search(r"^\$ .*models/bn_lenet/1", text, re.MULTILINE):
            shutil.copytree(ROOT / "models", self.folder / "models")
        for block in blocks(text):
            if block.file:
                (self.folder / block.file).write_text(block.text, encoding="utf-8")
            elif block.language == "console" and (page.name not in EXAMPLES or any(shown for _, shown in steps(block))):
                yield block, [(command, shown, self.run(command)) for command, shown in steps(block)]


def elided(shown: str, real: str) -> str:
    """Return a real output as long as the shown one: a line "..." keeps its place, counted from the end that is nearer."""
    lines, found = shown.splitlines(), real.splitlines()
    if "..." not in lines:
        return real
    gap = lines.index("...")
    tail = len(lines) - gap - 1
    return "\n".join([*found[:gap], "...", *(found[-tail:] if tail else [])]) + "\n"


#: Parts of verify's output that a processor with bfloat16 changes: its row is run, so "every runtime" becomes a list.
_BY_PROCESSOR = re.compile(r"^not run: openvino-cpu, bfloat16: .*|: every runtime$", re.MULTILINE)


def words(text: str) -> set[str]:
    """Return the words of an output that do not depend on the machine: without numbers and paths."""
    text = _BY_PROCESSOR.sub("", text)
    return set(re.findall(r"(?<![\w./-])[A-Za-z][A-Za-z-]{2,}(?![\w./])", text))


def stale(page: Path, folder: Path) -> list[str]:
    """Run a page; return the words of the shown outputs that the real outputs no longer contain."""
    with Session(folder) as session:
        ran = [step for _, run in session.follow(page) for step in run]
    return sorted({word for _, shown, real in ran for word in words(shown) - words(real)})


def rewritten(page: Path, folder: Path) -> str:
    """Run a page; return its text with the real outputs in place of those that it shows."""
    written = page.read_text(encoding="utf-8")
    with Session(folder) as session:
        for block, ran in session.follow(page):
            new = "".join(f"$ {command}\n{elided(shown, real) if shown else ''}" for command, shown, real in ran)
            written = written.replace(block.text, new, 1)
    return written


def _tidy(output: str) -> str:
    lines = [line.rstrip() for line in output.splitlines()]
    return "\n".join(lines).strip("\n") + "\n" if any(lines) else ""


def main(names: list[str]) -> int:
    """Write the real outputs into pages."""
    for name in names:
        page = Path(name).resolve()
        folder = Path(tempfile.mkdtemp())
        try:
            page.write_text(rewritten(page, folder), encoding="utf-8")
            print(f"written: {name}")
        finally:
            shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
