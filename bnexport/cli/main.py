"""The command group, and the one place where errors become exit codes."""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import sys
from typing import Any

import click

from bnexport import __version__, interrupts
from bnexport.errors import BadInput, BnexportError, ProofError, Unavailable
from bnexport.files import forget_reader
from bnexport.optional import one_line
from bnexport.plain_table import printable

#: Section of the help -> command -> (module that holds it, one line of help). "module:name" names the click command in the
#: module; without a name it is ``command``. The module is imported when the command runs.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Train": {
        "train": ("bnexport.cli.train", "Train a BatchNorm-LeNet, or another network."),
        "recalibrate": ("bnexport.cli.evaluate:recalibrate", "Re-estimate a checkpoint's moving statistics exactly."),
    },
    "Export": {
        "fold-and-export": ("bnexport.cli.fold_and_export", "Fold BatchNorm, export, verify: write one bundle."),
        "fold": ("bnexport.cli.fold_and_export:fold", "Fold BatchNorm inside a network: write its folded weights."),
    },
    "Check": {
        "verify": ("bnexport.cli.verify", "Prove that a bundle computes what its network computes."),
        "evaluate": ("bnexport.cli.evaluate:evaluate", "Measure accuracy on test images, class by class."),
        "inspect": ("bnexport.cli.evaluate:inspect", "Show the BatchNorm statistics of a checkpoint or bundle."),
        "benchmark": ("bnexport.cli.benchmark", "Find the fastest runtime whose answers are right."),
        "audit": ("bnexport.cli.audit", "Show which other tools fold a network wrongly."),
        "doctor": ("bnexport.cli.doctor", "Try every runtime on this machine."),
    },
    "Serve": {
        "predict": ("bnexport.cli.predict", "Label images with a bundle."),
        "serve": ("bnexport.cli.serve", "Serve bundles over the Open Inference Protocol."),
        "deploy": ("bnexport.cli.deploy", "Write a bundle's files for Triton, KServe or Docker."),
    },
}
COMMANDS: dict[str, tuple[str, str]] = {name: row for rows in SECTIONS.values() for name, row in rows.items()}

#: Similar name -> the command.
_SYNONYMS: dict[str, str] = {
    **dict.fromkeys(("export", "convert", "fold-export", "onnx"), "fold-and-export"),
    **dict.fromkeys(("fuse", "merge", "absorb"), "fold"),
    **dict.fromkeys(("check", "validate", "prove", "compare"), "verify"),
    **dict.fromkeys(("eval", "test", "accuracy"), "evaluate"),
    **dict.fromkeys(("infer", "inference", "classify", "label"), "predict"),
    **dict.fromkeys(("show", "info", "stats", "statistics"), "inspect"),
    **dict.fromkeys(("calibrate", "re-estimate"), "recalibrate"),
    **dict.fromkeys(("fit", "learn"), "train"),
    **dict.fromkeys(("run", "server", "start"), "serve"),
    **dict.fromkeys(("diagnose", "env", "devices"), "doctor"),
    **dict.fromkeys(("bench", "measure", "time", "profile", "speed", "perf"), "benchmark"),
}

#: 0 done, 1 the verdict is FAIL, 2 usage or bad input, 3 this machine can't run it.
EXIT_CODES: tuple[tuple[type[BnexportError], int], ...] = ((BadInput, 2), (Unavailable, 3), (ProofError, 1))
EXIT_INTERRUPTED = 130
#: Exit code of an unexpected exception, which is a fault of bnexport (EX_SOFTWARE in sysexits.h).
EXIT_FAULT = 70
DEBUG = "BNEXPORT_DEBUG"

#: Number of new objects that starts a garbage collection in a command.
_YOUNG_OBJECTS = 50_000


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Return the names in the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), name or "command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; refuse an unknown one with the most similar command."""
        name = click.utils.make_str(args[0])
        if name not in COMMANDS and not name.startswith("-"):
            meant = _SYNONYMS.get(name.lower()) or next(iter(difflib.get_close_matches(name.lower(), COMMANDS)), None)
            hint = "bnexport --help lists the commands." if meant is None else f"Did you mean {meant}?"
            ctx.fail(f"{name!r} is not a command. {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands by section, without importing them."""
        width = max(map(len, COMMANDS))
        for section, rows in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), text) for name, (_, text) in rows.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="bnexport")
def cli() -> None:
    """Fold BatchNorm exactly, export to ONNX and TorchScript, and prove that the outputs match.

    Exit codes: 0 done, 1 the verdict is FAIL, 2 bad input, 3 this machine can't run it.
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    _tolerate_narrow_streams()
    # Imports and traces make objects that stay. With Python's 700, verify runs 800 collections: 7 % of its time.
    gc.set_threshold(_YOUNG_OBJECTS)
    try:
        code = run(arguments)
    except BrokenPipeError:  # the reader (head, less) has closed the pipe, which is not an error
        forget_reader()
        code = 0
    except SystemExit as left:  # a process of a training that ends without a message
        if not isinstance(left.code, int):
            raise
        code = left.code
    if "bnexport.training.processes" in sys.modules and os.environ.get("WORLD_SIZE", "1") != "1":
        importlib.import_module("bnexport.training.processes").end_process(code)
    gc.freeze()  # the interpreter's last collections would take 1.5 s of a fold-and-export, and free what ends anyway
    raise SystemExit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints at most one sentence per error."""
    try:
        with interrupts.noted():
            result: Any = cli.main(args=arguments, prog_name="bnexport", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Files already complete are kept; nothing is half-written.", err=True)
        return EXIT_INTERRUPTED
    except BnexportError as error:
        for text in filter(None, (f"Error: {error.message}", error.remedy)):
            click.echo(_ended(text), err=True)
        return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
    except MemoryError:
        click.echo("Error: out of memory.\nTry a smaller batch or model.", err=True)
        return 3
    except BrokenPipeError:
        raise
    except OSError as error:  # errors of files are converted where they occur, so this is standard output
        click.echo(f"Error: {one_line(error)}.\nCheck the disk and the output path.", err=True)
        return 2
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        click.echo(f"Error: unexpected {type(error).__name__}: {one_line(error)}.", err=True)
        click.echo(f"This is a fault in bnexport: please report it with what {DEBUG}=1 shows.", err=True)
        return EXIT_FAULT
    return result if isinstance(result, int) else 0


def _ended(text: str) -> str:
    """Return a sentence, which may contain names of untrusted files, with a full stop unless it ends with "?" or "!"."""
    text = printable(text)
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _tolerate_narrow_streams() -> None:
    """Replace characters that the locale's encoding lacks by '?'."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
