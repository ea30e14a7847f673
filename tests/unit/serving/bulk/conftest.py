from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.bundles import network
from support.pictures import png

from bnexport.bundle import Bundle
from bnexport.data.datasets import load_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.serving.bulk.bulk_prediction import BulkResult, predict_in_bulk
from bnexport.serving.bulk.bulk_request import BulkRequest

IMAGES = load_dataset("digits").test_images[:90]


@pytest.fixture(scope="session")
def wanted() -> np.ndarray:
    """Logits of the original network."""
    with torch.no_grad():
        return network()(torch.from_numpy(Preprocessing().apply(IMAGES))).numpy()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images in every form."""
    folder = tmp_path_factory.mktemp("sources")
    np.save(folder / "a.npy", IMAGES)
    np.save(folder / "channel.npy", IMAGES[..., None])
    np.savez_compressed(folder / "a.npz", image=IMAGES, labels=np.arange(90))
    np.savez(folder / "plain.npz", IMAGES)
    for index, image in enumerate(IMAGES):
        place = folder / "pictures" / ("x" if index < 50 else "y/z")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:03d}.{'PNG' if index % 2 else 'png'}").write_bytes(png(image))
    (folder / "pictures" / "notes.txt").write_text("no image")
    contents = [png(image) for image in IMAGES]
    names = [f"row {index}" for index in range(90)]
    write_parquet(folder / "a.parquet", {"image": contents, "name": names}, 25)
    (folder / "several").mkdir()
    write_parquet(folder / "several" / "0.parquet", {"image": contents[:40], "name": names[:40]}, 100)
    write_parquet(folder / "several" / "1.parquet", {"image": contents[40:], "name": names[40:]}, 7)
    structs = [{"bytes": content, "path": None} for content in contents]
    write_parquet(folder / "structs.parquet", {"picture": structs, "name": names}, 30)
    return {path.name: path for path in folder.iterdir()}


def write_parquet(path: Path, columns: dict[str, list[object]], group: int) -> None:
    pq.write_table(pa.table(columns), path, row_group_size=group)


def rows(out: Path) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = pq.read_table(out).to_pydict()
    return columns


def predict(bundle: Bundle, source: Path | list[Path], out: Path, **options: object) -> BulkResult:
    request = BulkRequest(**({"workers": 1, "shard_rows": 20, "batch_size": 8} | options))
    return predict_in_bulk(bundle, source if isinstance(source, list) else [source], out, request=request)
