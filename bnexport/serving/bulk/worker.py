"""One worker: a bundle opened once, shards predicted and written one after the other. The same on every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bnexport.bundle import Bundle
from bnexport.errors import DataError
from bnexport.files import write_atomically
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.settings import RunSettings
from bnexport.serving.bulk.job import Job, part_file
from bnexport.serving.bulk.npz import NpzFiles
from bnexport.serving.bulk.parquet import encode
from bnexport.serving.bulk.reading import read_shard
from bnexport.serving.bulk.sources import Shard
from bnexport.serving.predictor import image_preprocessing
from bnexport.tensors import Array


class ShardWorker:
    """A session of one thread, and what it needs around it.

    Args:
        job: What is to be done; its shards are not looked at. Whoever starts workers has checked the bundle's hashes.

    Raises:
        BundleError: It is no image classifier with one input and one output.
        RuntimeUnavailable: The engine or device is not here.
    """

    def __init__(self, job: Job) -> None:
        opened = Bundle.open(job.bundle)
        self._job, self._request = job, job.request
        self._files = NpzFiles()
        self._preprocessing = image_preprocessing(opened)
        signature = opened.manifest.signature
        self._input, self._output = signature.inputs[0].name, signature.outputs[0].name
        self._labels = opened.manifest.labels or ()
        self._runner = runner_spec(job.request.runtime).open(opened, settings=RunSettings(threads=1))

    def close(self) -> None:
        """Free the session and what is open."""
        self._files.close()
        self._runner.close()

    def run(self, shard: Shard) -> int:
        """Predict and write one shard.

        Returns:
            Its rows.

        Raises:
            DataError: An image can't be read, the answer to one is not finite, or the source has changed.
            OutputError: The file can't be written.
        """
        ids: list[str] = []
        parts: list[Array] = []
        for names, images in read_shard(shard, self._request, self._preprocessing, self._files):
            logits = self._runner.run({self._input: self._preprocessing.apply(images)})[self._output]
            if not np.isfinite(logits).all():
                row = int(np.flatnonzero(~np.isfinite(logits).all(1))[0])
                raise DataError(
                    f"the model's answer to {names[row]} holds NaN or infinity",
                    remedy="Run bnexport verify on the bundle",
                )
            ids += names
            parts.append(logits)
        if len(ids) != shard.rows:
            raise DataError(
                f"{shard.path} gave {len(ids)} rows where {shard.rows} were counted",
                remedy="Leave the source as it is while it is read, and start again",
            )
        shard.check_unchanged()
        logits = np.concatenate(parts)
        labels = [*self._labels, *map(str, range(len(self._labels), logits.shape[1]))]
        content = encode(ids, logits, labels=labels, keep_logits=self._request.logits, about=self._job.about(shard))
        write_atomically(part_file(Path(self._job.out), shard), content)
        return shard.rows
