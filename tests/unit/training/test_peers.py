"""A lost process is noticed although the main thread of the others waits for ever, as in a kernel of NCCL."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_processes import free_port
from test_reliability import HERE, ROOT, environment, wait_until

SIZE = 3


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("way", "codes"),
    [("one is killed", [3, -9, 3]), ("all leave", [0, 0, 0]), ("one fails", [3, 2, 3]), ("all fail", [2, 2, 2])],
)
def test_every_process_ends(tmp_path: Path, way: str, codes: list[int]) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(SIZE)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "peers_child.py"), way, str(tmp_path)],
            env=environment(**meeting, RANK=str(rank)), cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == SIZE, 120)
        if way == "one is killed":
            processes[1].kill()
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == codes, errors
    for code, error in zip(codes, errors, strict=True):
        assert ("Error: another process of this training ended" in error) == (code == 3)
        assert ("start again with --resume, with any number of processes." in error) == (code == 3)
        assert "Traceback" not in error
