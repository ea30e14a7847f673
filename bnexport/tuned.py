"""``tuned.json`` in a bundle: the fastest correct settings that ``bnexport benchmark --save`` measured on one machine.

The file is outside the bundle's hashes, because it belongs to a machine. It applies only on the same processor with the same
number of cores, with the same versions of the engines, and to the same model file. Bundles come from untrusted places, so the
file is validated like a manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, TUNED, WEIGHTS, Bundle
from bnexport.environment import available_cores, cpu_name, versions
from bnexport.errors import BundleError
from bnexport.files import Refusal, write_atomically
from bnexport.optional import one_line
from bnexport.validation.json_text import parse_json
from bnexport.validation.limits import limit, refusing, shown
from bnexport.validation.paths import place_problem

Goal = Literal["latency", "throughput", "cpu"]
GOALS: tuple[Goal, ...] = get_args(Goal)
_FORMAT, _FORMAT_VERSION = "bnexport-tuning", 1
#: Engine, the start of a runtime's name -> distributions that contain it. The other runtimes are torch's.
_ENGINES = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime"), "openvino": ("openvino",), "reference": ("onnx",)}
#: Largest batch of a choice.
LARGEST_BATCH = 65_536
#: Largest whole numbers in a choice: the options of ``serve`` and ``predict`` take no larger ones.
_MOST = {"batch": LARGEST_BATCH, "threads": 1024, "sessions": 256}
_TEXT, _RUNTIME = 200, re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Choice:
    """The recommended settings for one goal, with their measurements."""

    runtime: str  # A name from ``runtimes.catalogue.RUNNERS``
    batch: int  # Samples per call
    threads: int  # Threads of one session
    sessions: int  # Sessions that run at once
    p50_ms: float  # Median duration of one call, in milliseconds
    images_per_second: float  # Samples per second of all sessions together
    cpu_us_per_image: float  # Processor time per sample, in microseconds

    def __str__(self) -> str:
        """Return the settings in words: "onnxruntime-cpu, 2 sessions x 1 thread, batch 32"."""
        return f"{self.runtime}, {self.settings}"

    @property
    def settings(self) -> str:
        """Return the settings without the runtime: "2 sessions x 1 thread, batch 32"."""
        counts = ((self.sessions, "session"), (self.threads, "thread"))
        return " x ".join(f"{n} {what}{'' if n == 1 else 's'}" for n, what in counts) + f", batch {self.batch}"


@dataclass(frozen=True)
class Machine:
    """The machine that a tuning belongs to."""

    cpu: str  # Name of the processor
    cores: int  # Cores that a process may use, by affinity and control groups

    @classmethod
    def here(cls) -> Self:
        """Return this machine."""
        return cls(cpu_name(), available_cores())


@dataclass(frozen=True)
class Tuning:
    """The content of tuned.json."""

    machine: Machine  # Where it was measured
    versions: Mapping[str, str]  # Distribution -> version, of the engines at least
    model_sha256: str  # SHA-256 of the model file (``model_hash``)
    choices: Mapping[Goal, Choice]  # The best settings by goal; a goal may be missing

    @classmethod
    def here(cls, bundle: Bundle, choices: Mapping[Goal, Choice]) -> Self:
        """Return a tuning of a bundle that was measured on this machine with the installed versions."""
        return cls(Machine.here(), versions(), model_hash(bundle), choices)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the format's name and version first."""
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(self)}


def model_hash(bundle: Bundle) -> str:
    """Return the manifest's SHA-256 of model.onnx; of the first other model file in a bundle without model.onnx."""
    files = bundle.manifest.files
    for name in (MODEL_ONNX, MODEL_TORCHSCRIPT, MODEL_EXPORTED, WEIGHTS):
        if name in files:
            return str(files[name]["sha256"])
    raise BundleError(f"{bundle.path} has no model file", remedy="Export it again with bnexport fold-and-export")


def write_tuning(bundle_folder: str | Path, tuning: Tuning) -> Path:
    """Write tuned.json into a bundle's directory, whole or not at all; BundleError if ``read_tuning`` would refuse it."""
    content = (json.dumps(tuning.to_json(), indent=1, allow_nan=False) + "\n").encode()
    path = Path(bundle_folder, TUNED)
    with refusing(f"{path} is not written, because it", BundleError, remedy="Run bnexport benchmark again"):
        _parsed(content)
    write_atomically(path, content)
    return path


def read_tuning(bundle_folder: str | Path | Bundle) -> Tuning | str | None:
    """Return the tuning of a bundle that applies here, a sentence with the reason why it does not, or None without a file.

    The caller checks the bundle's hashes.
    """
    bundle = bundle_folder if isinstance(bundle_folder, Bundle) else Bundle.open(bundle_folder)
    path = bundle.path / TUNED
    try:
        if not path.is_symlink() and not path.exists():
            return None
        if (problem := place_problem(bundle.path, TUNED)) is not None:
            return problem
        with path.open("rb") as file:
            tuning = _parsed(file.read(limit("tuning-bytes") + 1))
    except OSError as error:
        return f"{TUNED} can't be read: {one_line(error)}"
    except Refusal as refusal:
        return f"{TUNED} {refusal}"
    return _mismatch(tuning, bundle) or tuning


def tuned_choice(bundle: Bundle, goal: Goal, runtime: str) -> Choice | str | None:
    """Return the choice for a goal if it is for this runtime; as in ``read_tuning``, a reason or None without one."""
    found = read_tuning(bundle)
    if not isinstance(found, Tuning):
        return found
    if (choice := found.choices.get(goal)) is None:
        return f"{TUNED} has no choice for the goal {goal}"
    return choice if choice.runtime == runtime else f"{TUNED} has another runtime for the goal {goal}: {choice.runtime}"


def tuning_line(found: Choice | str) -> str:
    """Return the line that a command prints: the applied settings, or the reason why none apply."""
    return f"not tuned: {found}" if isinstance(found, str) else f"tuned: {found.settings}"


def _mismatch(tuning: Tuning, bundle: Bundle) -> str | None:
    """Return the first reason why a tuning does not apply to this machine and bundle."""
    here = Machine.here()
    if tuning.machine.cpu != here.cpu:
        return f"{TUNED} was measured on another processor: {shown(tuning.machine.cpu)}; this one is {shown(here.cpu)}"
    if tuning.machine.cores != here.cores:
        return f"{TUNED} was measured with {tuning.machine.cores} cores; this process has {here.cores}"
    if tuning.model_sha256 != model_hash(bundle):
        return f"{TUNED} was measured with another model file"
    installed = versions()
    for choice in tuning.choices.values():
        for name in _ENGINES.get(choice.runtime.partition("-")[0], ("torch",)):
            before, now = tuning.versions.get(name), installed.get(name)
            if before != now:
                return f"{TUNED} was measured with {name} {before or '(none)'}; installed: {now or 'none'}"
    return None


def _parsed(content: bytes) -> Tuning:
    """Validate the bytes of a file; Refusal with the end of a sentence."""
    value = parse_json(content, max_bytes=limit("tuning-bytes"))
    _need_keys(value, ("format", "format_version", *(item.name for item in fields(Tuning))), "the file")
    for name, expected in (("format", _FORMAT), ("format_version", _FORMAT_VERSION)):
        if value[name] != expected:
            raise Refusal(f"has the {name} {_found(value[name])}, expected {expected}")
    _need_keys(value["machine"], ("cpu", "cores"), "machine")
    machine = Machine(_text(value["machine"]["cpu"], "cpu"), _whole(value["machine"]["cores"], "cores", 65_536))
    for name in ("versions", "choices"):
        if not isinstance(value[name], dict):
            raise Refusal(f"has {name} that are not an object: {_found(value[name])}")
    if not value["choices"]:
        raise Refusal("has no choice")
    found = {_text(name, "versions"): _text(version, "versions") for name, version in value["versions"].items()}
    if not isinstance(value["model_sha256"], str) or not re.fullmatch("[0-9a-f]{64}", value["model_sha256"]):
        raise Refusal(f"has the model_sha256 {_found(value['model_sha256'])}, which is not a SHA-256")
    if unknown := set(value["choices"]) - set(GOALS):
        raise Refusal(f"has the unknown goal {shown(min(unknown))}")
    choices: dict[Goal, Choice] = {
        goal: _choice(value["choices"][goal], goal) for goal in GOALS if goal in value["choices"]
    }
    for goal, choice in choices.items():
        if choice.threads * choice.sessions > machine.cores:
            raise Refusal(f"has {choice.settings} for {goal}, but its machine has {machine.cores} cores")
    return Tuning(machine, found, value["model_sha256"], choices)


def _choice(value: Any, goal: str) -> Choice:
    _need_keys(value, tuple(item.name for item in fields(Choice)), f"the choice for {goal}")
    runtime = value["runtime"]
    if not isinstance(runtime, str) or len(runtime) > _TEXT or not _RUNTIME.fullmatch(runtime):
        raise Refusal(f"has the runtime {_found(runtime)}, which is not a name")
    values: dict[str, Any] = {name: _whole(value[name], name, most) for name, most in _MOST.items()}
    for name in ("p50_ms", "images_per_second", "cpu_us_per_image"):
        if type(value[name]) not in (int, float) or value[name] < 0:
            raise Refusal(f"has {_found(value[name])} as {name}, which must be a number from 0")
        values[name] = value[name]
    return Choice(runtime=runtime, **values)


def _need_keys(value: Any, keys: tuple[str, ...], what: str) -> None:
    if not isinstance(value, dict):
        raise Refusal(f"has {_found(value)} as {what}, which must be an object")
    if odd := set(value) ^ set(keys):
        name = min(odd)
        raise Refusal(
            f"{'lacks' if name in keys else 'has'} the key {shown(name)} in {what}, which has {', '.join(keys)}"
        )


def _found(value: Any) -> str:
    """Quote an untrusted value for a sentence."""
    return str(value) if type(value) in (int, float, bool) else shown(str(value))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > _TEXT or not value.isprintable():
        raise Refusal(f"has {_found(value)} in {name}, which must be a printable text of at most {_TEXT} characters")
    return value


def _whole(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:  # not isinstance: true is not a number
        raise Refusal(f"has {_found(value)} as {name}, which must be a whole number from 1 to {most}")
    return value
