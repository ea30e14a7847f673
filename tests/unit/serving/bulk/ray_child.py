"""A program: a bulk prediction on a local Ray of two workers, one of which is killed after the first shard.

Use: python ray_child.py BUNDLE SOURCE OUT SHARD_ROWS. Prints "killed N rows N".
"""

import os
import signal
import sys
from pathlib import Path

from bnexport.serving.bulk.bulk_prediction import predict_in_bulk
from bnexport.serving.bulk.bulk_request import BulkProgress, BulkRequest


def actors() -> list[int]:
    """Processes of actors below this one: Ray starts its raylet, and the raylet the actors."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            above = int((Path("/proc") / str(parent) / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if b"ShardActor" in words and above == os.getpid():
            found.append(int(entry.name))
    return found


class Killer(BulkProgress):
    """Kills one actor when the first shard is written."""

    killed = 0

    def on_shard(self, rows: int) -> None:
        """The first one."""
        if not self.killed and (there := actors()):
            os.kill(there[0], signal.SIGKILL)
            self.killed += 1


if __name__ == "__main__":
    bundle, source, out, shard_rows = sys.argv[1:]
    request = BulkRequest(workers=2, shard_rows=int(shard_rows))
    result = predict_in_bulk(bundle, [source], out, engine="ray", request=request, progress=(killer := Killer()))
    print("killed", killer.killed, "rows", result.rows)
