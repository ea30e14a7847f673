"""Options of a deployment: target, name, device, scaling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bnexport.deploying.releases import DEFAULT_RELEASE
from bnexport.errors import UsageError
from bnexport.tuned import Choice

DEVICES = ("cpu", "cuda", "tensorrt")
#: The largest integer in Triton's configuration and Kubernetes' resources.
_INT32 = 2**31 - 1
_MAX_BATCH = 64
SCALE_METRICS = ("concurrency", "rps", "cpu", "memory")
#: URI schemes of KServe's storage initialiser ("Storage", KServe's documentation).
STORAGE_SCHEMES = ("s3", "gs", "pvc", "hdfs", "webhdfs", "https", "http")


class TritonSettings(NamedTuple):
    """Numbers of Triton's configuration of a model."""

    instances: int  # Copies of the model that run at once
    threads: int  # Threads of one copy, on a CPU
    max_batch_size: int  # Largest batch
    preferred_batch: int | None  # The batch that the batcher prefers; None: any


@dataclass(frozen=True)
class DeployRequest:
    """Options of every target."""

    name: str | None = None  # Name in the target; None: the bundle's
    triton: str = DEFAULT_RELEASE  # Release of Triton Inference Server, a key of ``releases.TRITON_RELEASES``
    device: str = "cpu"  # One of DEVICES, for Triton
    # Copies of the model that run at once; None: 1, or the number in tuned.json (``tuning``). One thread each if given.
    instances: int | None = None
    max_batch_size: int | None = None  # Largest batch that Triton forms; None: 64, or more if tuned.json's is larger
    force: bool = False  # Replace an existing folder
    tuning: Choice | None = None  # Settings of the bundle's tuned.json

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UsageError(f"the device {self.device!r} is unknown", remedy=f"Choose one of {', '.join(DEVICES)}")
        for what, value in (("instances", self.instances), ("the largest batch", self.max_batch_size)):
            if value is not None and not 1 <= value <= _INT32:
                raise UsageError(f"{what} can't be {value}", remedy=f"Give 1 to {_INT32}")

    def settings(self) -> TritonSettings:
        """Return the numbers of Triton's configuration: options first, then the tuning, then the defaults."""
        batch = self.tuning.batch if self.tuning else 1
        most = self.max_batch_size or max(_MAX_BATCH, batch)
        if self.instances is not None or self.tuning is None:
            return TritonSettings(self.instances or 1, 1, most, batch if 1 < batch <= most else None)
        return TritonSettings(self.tuning.sessions, self.tuning.threads, most, batch if 1 < batch <= most else None)


@dataclass(frozen=True)
class Scaling:
    """Autoscaling of an InferenceService."""

    storage_uri: str  # Upload address of the model repository's root: "s3://bucket/models"
    min_replicas: int = 1  # Smallest number of pods; 0 lets the service sleep, which needs Knative
    max_replicas: int = 4  # Largest number of pods
    # One of SCALE_METRICS. Knative scales by concurrency and rps, a standard deployment by cpu and memory.
    metric: str = "concurrency"
    # Target of the metric per pod: concurrent requests, requests per second, percent of the requested CPU or memory
    target: int = 8

    def __post_init__(self) -> None:
        scheme = re.fullmatch(r"([a-z0-9]+)://\S+", self.storage_uri)
        if scheme is None or scheme[1] not in STORAGE_SCHEMES:
            raise UsageError(
                f"KServe can't load from the storage URI {self.storage_uri!r}",
                remedy=f"Write it as s3://bucket/models; schemes: {', '.join(STORAGE_SCHEMES)}",
            )
        if self.metric not in SCALE_METRICS:
            raise UsageError(
                f"the metric {self.metric!r} is unknown", remedy=f"Choose one of {', '.join(SCALE_METRICS)}"
            )
        if not 0 <= self.min_replicas <= self.max_replicas <= _INT32 or self.max_replicas < 1:
            raise UsageError(
                f"{self.min_replicas} to {self.max_replicas} replicas is not a valid range",
                remedy="Give 0 <= min <= max, max >= 1",
            )
        if self.min_replicas == 0 and self.metric in ("cpu", "memory"):
            raise UsageError(
                f"a service that scales by {self.metric} can't have 0 replicas",
                remedy="Pass --min-replicas 1, or scale by concurrency or rps",
            )
        most = 100 if self.metric in ("cpu", "memory") else 1_000_000
        if not 1 <= self.target <= most:
            raise UsageError(f"the target of {self.metric} is {self.target}", remedy=f"Give 1 to {most}")


class NameRule(NamedTuple):
    """Rule for names in a target."""

    pattern: str  # Regular expression of the whole name
    longest: int  # Characters
    joint: str  # Replacement in a suggestion for a character that is not allowed
    words: str  # The rule for the error message


#: Target -> its rule. A new target is a new row.
NAME_RULES: dict[str, NameRule] = {
    # A folder's name and part of a URL. Triton accepts more characters, but clients and shells do not.
    "triton": NameRule(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", 128, "_", "letters, digits, _ . and -"),
    # A DNS label (RFC 1035); Knative appends "-predictor-00001" and Kubernetes ends labels at 63 characters.
    "kserve": NameRule(
        r"[a-z]([a-z0-9\-]*[a-z0-9])?", 47, "-", "small letters, digits and -, with a letter first and no - last"
    ),
    # The project's name (Compose specification, "Version and name top-level elements").
    "docker": NameRule(
        r"[a-z0-9][a-z0-9_\-]*", 63, "-", "small letters, digits, _ and -, with a letter or digit first"
    ),
}


def deployed_name(target: str, request: DeployRequest, bundle_name: str) -> str:
    """Return the name in the target; UsageError with a suggestion for a name that the target refuses."""
    rule, name = NAME_RULES[target], request.name if request.name is not None else bundle_name
    if re.fullmatch(rule.pattern, name) and len(name) <= rule.longest:
        return name
    raise UsageError(
        f"{target} refuses the name {name!r}: it allows up to {rule.longest} characters: {rule.words}",
        remedy=f"Pass --name {suggested_name(target, name)}",
    )


def suggested_name(target: str, name: str) -> str:
    """Return a similar name that the target accepts."""
    rule = NAME_RULES[target]
    plain = re.sub(r"[^A-Za-z0-9]+", rule.joint, name).strip(rule.joint)[: rule.longest].strip(rule.joint)
    for tried in (plain, plain.lower(), f"model{rule.joint}{plain.lower()}"[: rule.longest].strip(rule.joint)):
        if re.fullmatch(rule.pattern, tried):
            return tried
    return "model"


@dataclass(frozen=True)
class Deployment:
    """The written deployment."""

    path: Path  # The folder
    files: tuple[str, ...]  # Its files, as sorted POSIX paths
    next_steps: tuple[str, ...]  # Next steps for the user, each a command or a sentence
    tuning: str | None = None  # What was applied of tuned.json, or why nothing was; None without the file
