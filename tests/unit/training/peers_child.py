"""A process of test_peers: its main thread waits as in a kernel of NCCL that never ends, or leaves in a given way."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed as dist

from bnexport.training import processes


def main(way: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if way == "one fails":
        processes._GRACE = 1.0
    try:
        with processes.watched(rank, size):
            (folder / str(rank)).touch()
            if way == "all fail" or (way == "one fails" and rank == 1):
                raise KeyError("another error")
            if way in ("one is killed", "one fails"):
                time.sleep(250)
            dist.all_reduce(torch.zeros(1))
    except KeyError:
        processes.end_process(2)
    processes.end_process(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
