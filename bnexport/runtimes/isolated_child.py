"""The child process of an isolated runner: ``python -m bnexport.runtimes.isolated_child``, started by ``isolation`` alone.

It opens one runner, answers until its standard input ends, and exits. Output that an engine prints goes to standard error, so
that it can't mix with the messages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from bnexport.bundle import Bundle, Manifest
from bnexport.errors import BnexportError
from bnexport.runtimes import cuda_libraries
from bnexport.runtimes.base import Runner, RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.isolation import child_pipes, receive, send


def main() -> None:
    """Open the runner that the first message names, then run one batch per message."""
    requests, answers = child_pipes()
    try:
        request, _ = receive(requests)
        with _open(request) as runner:
            send(answers, _state(runner))
            _answer(runner, requests, answers)
    except BnexportError as error:
        send(answers, _error_message(error))
    except (EOFError, BrokenPipeError):
        pass  # the parent has ended or closed the pipe


def _open(request: dict[str, Any]) -> Runner:
    # The parent's manifest, which was checked; the folder's may have changed.
    bundle = Bundle(Path(request["bundle"]), Manifest.from_json(request["manifest"]))
    spec = runner_spec(request["runtime"])
    if spec.engine == "onnxruntime":
        cuda_libraries.leave_torch_out()
    return spec.open(bundle, settings=RunSettings(**request["settings"]))


def _answer(runner: Runner, requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        _, feeds = receive(requests)
        try:
            outputs = runner.run(feeds)
        except BnexportError as error:
            send(answers, _error_message(error))
        else:
            send(answers, _state(runner), outputs)


def _state(runner: Runner) -> dict[str, Any]:
    return {"device": runner.effective_device, "description": runner.description}


def _error_message(error: BnexportError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": error.message, "remedy": error.remedy}


if __name__ == "__main__":
    main()
