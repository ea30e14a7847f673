"""A process of test_processes: ``resume_child.py RUN`` resumes it for one more epoch."""

import sys
from dataclasses import replace
from pathlib import Path

from bnexport.cli.training_display import TrainingDisplay
from bnexport.loading.checkpoint import load_checkpoint, save_checkpoint
from bnexport.training.config import TrainingConfig
from bnexport.training.processes import asked_rank, end_process
from bnexport.training.training_run import train

if __name__ == "__main__":
    out = Path(sys.argv[1])
    checkpoint = load_checkpoint(out / "checkpoint.safetensors")
    epochs = checkpoint.metadata["training"]["epoch"]
    # As if the run had been started for one more epoch than it has.
    checkpoint.metadata["training"]["config"]["epochs"] = epochs
    if asked_rank() == 0:
        save_checkpoint(out / "checkpoint.safetensors", checkpoint)
    config = TrainingConfig.from_json(checkpoint.metadata["training"]["config"])
    with TrainingDisplay() as display:
        train(replace(config, epochs=epochs + 1), out=out, resume=True, progress=display)
    end_process(0)
