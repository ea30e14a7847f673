"""Measure fold-and-export with its verification next to the plain way, in turn, each run in a separate process.

The plain way is torch.onnx.export, torch.jit.trace and freeze, and one comparison of 2 samples in ONNX Runtime. Both sides
write ONNX and TorchScript of one network with random statistics per channel, at its own size. ``python -m benchmarks.main_job``
takes about 15 minutes and writes docs/results/main_job.md. Exit code 1: a target is missed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clock import Spread
from benchmarks.command import finish, known, options, progress
from benchmarks.pages import ranged, render, write_page
from bnexport.errors import ModelError

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "main_job.md"
#: BN-LeNet is verified on the 10,000 test images of Fashion-MNIST, which the checkpoint names.
LENET, CHECKPOINT = "bn_lenet", ROOT / "models" / "bn_lenet" / "1" / "weights.safetensors"
#: Network -> shape of one sample.
NETWORKS = {
    "resnet50": (3, 224, 224),
    "efficientnet_b0": (3, 224, 224),
    "densenet121": (3, 224, 224),
    "mobilenet_v3_large": (3, 224, 224),
    LENET: (1, 28, 28),
}
#: Largest time and memory of fold-and-export as multiples of the plain way's.
TIME, MEMORY = 2.0, 2.5
#: Largest seconds of fold-and-export of BN-LeNet, and of ``verify`` of one runtime of VERIFIED.
SECONDS, VERIFIED = 15.0, "resnet50"
_SEED = 0
_CHILD = "import sys; from benchmarks.main_job import run_way; run_way(*sys.argv[1:])"


@dataclass(frozen=True)
class Run:
    """The cost of one process: wall seconds, CPU seconds, and the peak of its memory in MB."""

    wall: float
    cpu: float
    peak: float


def run_way(way: str, network: str, folder: str) -> None:
    """Do one side's job for a network that ``prepare`` wrote into a folder; a child process calls this.

    Raises:
        ModelError: The plain way's outputs differ.
        SystemExit: The end of a command, with its exit code.
    """
    {"plain": _plain, "ours": _ours, "verify": _verify}[way](network, Path(folder))


def _plain(network: str, folder: Path) -> None:
    import onnxruntime
    import torch

    module = torch.load(folder / f"{network}.module", weights_only=False)  # written by this program
    x = torch.randn(2, *NETWORKS[network], generator=torch.Generator().manual_seed(_SEED))
    file = folder / "plain.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(module, (x,), file, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
    with torch.inference_mode():
        torch.jit.freeze(torch.jit.trace(module, x)).save(folder / "plain.pt")  # type: ignore[no-untyped-call]
        want = module(x).numpy()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    if not abs(found - want).max() <= 1e-3 * abs(want).max():
        raise ModelError(f"{network}: the plain way's outputs differ", remedy="Report it with the versions")


def _ours(network: str, folder: Path) -> None:
    from bnexport.cli.main import main

    source = [str(CHECKPOINT)]
    if network != LENET:
        shape = "x".join(map(str, NETWORKS[network]))
        source = [f"torchvision:{network}", "--weights", str(folder / f"{network}.pth"), "--input", shape]
    formats = ("--format", "onnx", "--format", "torchscript")
    main(["fold-and-export", *source, "--out", str(_bundle(network, folder)), "--force", "--quiet", *formats])


def _verify(network: str, folder: Path) -> None:
    from bnexport.cli.main import main

    source = ("--source", f"torchvision.models:{network}")
    main(["verify", str(_bundle(network, folder)), *source, "--runtime", "onnxruntime-cpu"])


def _bundle(network: str, folder: Path) -> Path:
    return folder / network / "1"


def prepare(network: str, folder: Path) -> None:
    """Write a network with different statistics per channel, in eval mode."""
    import torch

    if network == LENET:
        from bnexport.loading.sources import load_source

        module = load_source(str(CHECKPOINT)).module
    else:
        from bnexport.loading.zoo import build_from_zoo

        torch.manual_seed(_SEED)
        module = build_from_zoo(f"torchvision:{network}", {})
        module.eval()
        for norm in (item for item in module.modules() if isinstance(item, torch.nn.BatchNorm2d)):
            norm.get_buffer("running_mean").normal_(0, 0.1)
            norm.get_buffer("running_var").uniform_(0.5, 1.5)
            torch.nn.init.uniform_(norm.weight, 0.75, 1.25)
            torch.nn.init.normal_(norm.bias, 0, 0.1)
    torch.save(module, folder / f"{network}.module")
    torch.save(module.state_dict(), folder / f"{network}.pth")


def measure(way: str, network: str, folder: Path) -> Run:
    """Run one side in a separate process, imports included.

    Raises:
        ModelError: The process failed.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _CHILD, way, network, str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise ModelError(f"{way} of {network} ended with {child.returncode}", remedy="Its error is above")
    return Run(time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def compare(network: str, folder: Path, rounds: int) -> tuple[list[Run], list[Run]]:
    """Return the runs of both sides, in turn."""
    progress(f"{network}: preparing")
    prepare(network, folder)
    plain, ours = [], []
    for number in range(1, rounds + 1):
        progress(f"{network}: round {number} of {rounds}")
        plain.append(measure("plain", network, folder))
        ours.append(measure("ours", network, folder))
    return plain, ours


def row_of(network: str, plain: Sequence[Run], ours: Sequence[Run]) -> tuple[list[str], bool]:
    """Return the cells of one network, and whether its targets are met; ratios are those of each round's pair."""
    pairs = list(zip(plain, ours, strict=True))
    wall, cpu, peak = (
        Spread.of([getattr(b, what) / getattr(a, what) for a, b in pairs]) for what in ("wall", "cpu", "peak")
    )
    own = Spread.of([run.wall for run in ours])
    met = own.middle <= SECONDS if network == LENET else wall.middle <= TIME and peak.middle <= MEMORY
    seconds = [ranged(Spread.of([run.wall for run in runs]), 1) for runs in (plain, ours)]
    memory = [f"{Spread.of([run.peak for run in runs]).middle:,.0f}" for runs in (plain, ours)]
    cells = [network, *seconds, ranged(wall), ranged(cpu), *memory, ranged(peak), "met" if met else "missed"]
    return cells, met


def main() -> int:
    """Measure, write the page, and return 1 where a target is missed."""
    parser = options("main_job", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    rows, met, verified = [], [], ""
    with tempfile.TemporaryDirectory(prefix="bnexport-main-job-") as place:
        folder = Path(place)
        for network in known(parser, given.networks, tuple(NETWORKS), "network"):
            cells, good = row_of(network, *compare(network, folder, given.rounds))
            rows.append(cells)
            met.append(good)
            if network == VERIFIED:
                seconds = Spread.of([measure("verify", network, folder).wall for _ in range(given.rounds)])
                met.append(seconds.middle <= SECONDS)
                verified = ranged(seconds, 1)
    values = {"rows": rows, "rounds": given.rounds, "verified": verified, "seed": _SEED, "network": VERIFIED}
    limits = {"time": TIME, "memory": MEMORY, "seconds": SECONDS}
    page = render("main_job.md.jinja", **values, **limits)
    write_page([page], given.out)
    return 0 if all(met) else 1


if __name__ == "__main__":
    finish("main_job", main)
