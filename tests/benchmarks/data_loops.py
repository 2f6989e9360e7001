"""The readers that are compared: one epoch each over the same pictures, batches of 64 in uint8."""

from __future__ import annotations

import importlib.util
import io
import os
import resource
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.writer import TarWriter

BATCH, SIDE, SHARDS = 64, 224, 4
CROP = 0.9


def write_pictures(folder: Path, count: int) -> None:
    """Write smooth pictures with some grain (about 23 kB each) as shards, and a card."""
    rng = np.random.default_rng(0)
    per_shard = -(-count // SHARDS)
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"train-{shard}.tar")) as tar:
            for number in range(shard * per_shard, min(count, (shard + 1) * per_shard)):
                sample = {"__key__": f"{number:07d}", "jpg": _picture(rng), "cls": number % 10}
                tar.write(sample)
    with TarWriter(str(folder / "test.tar")) as tar:
        for number in range(10):
            tar.write({"__key__": f"t{number}", "jpg": _picture(rng), "cls": number})
    names = ", ".join(f"c{n}" for n in range(10))
    (folder / "card.yaml").write_text(
        f"name: pictures\nscenario: class\nclasses: [{names}]\ntasks:\n  - name: all\n"
        f"    classes: [{names}]\n    train: train-{{0..{SHARDS - 1}}}.tar\n    test: test.tar\n"
    )


def _picture(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int64)
    pixels = pixels + rng.normal(0, 9, pixels.shape)
    file = io.BytesIO()
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def ours(folder: Path, workers: int, *, steady: bool = False) -> float:
    """mmcl's loader with its own decoder; steady: its second and third epoch, workers at work."""
    from mmcl.core import TaskStream
    from mmcl.data import open_stream, train_loader
    from mmcl.models.open_clip.clip_transform import ClipTransform

    prepared = open_stream(TaskStream.read(folder / "card.yaml"))
    transform = ClipTransform(SIDE, random_crop_scale=CROP)
    loader = train_loader(
        prepared, 0, transform, replay_plan=None, global_batch_size=BATCH, seed=0, workers=workers
    )
    return _steady(loader) if steady else _timed(loader, len)


def ours_with_pillow(folder: Path, workers: int) -> float:
    """mmcl's loader, with Pillow as the decoder of JPEG."""
    from mmcl.data import decode

    decode._decode_jpeg = lambda data: None
    return ours(folder, workers)


def stock_webdataset(folder: Path, workers: int) -> float:
    """webdataset as its documents write it: shuffle, decode with Pillow, torchvision's crop."""
    import webdataset as wds

    urls = [str(folder / f"train-{shard}.tar") for shard in range(SHARDS)]
    dataset = (
        wds.WebDataset(urls, shardshuffle=SHARDS)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(_torchvision(), int)
        .batched(BATCH)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
    return _timed(loader, lambda batch: len(batch[0]))


def litdata(folder: Path, workers: int) -> float | None:
    """litdata over chunks of the same files, decoded and cut as for webdataset."""
    if importlib.util.find_spec("litdata") is None:
        return None
    os.environ["LITDATA_CACHE_DIR"] = str(folder / "cache")
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    chunks = folder / "chunks"
    if not chunks.is_dir():
        writer = BinaryWriter(str(chunks), chunk_bytes="16MB")
        for number, (data, label) in enumerate(_files(folder)):
            writer[number] = {"jpg": data, "cls": label}
        writer.done()
        writer.merge()
    transform = _torchvision()

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            row = super().__getitem__(index)
            picture = Image.open(io.BytesIO(row["jpg"])).convert("RGB")
            return transform(picture), row["cls"]

    loader = StreamingDataLoader(
        Pictures(str(chunks), shuffle=True), batch_size=BATCH, num_workers=workers
    )
    return _timed(loader, lambda batch: len(batch[0]))


def bare_decoding(folder: Path, workers: int) -> float:
    """Decode, cut and stack what already lies in memory: what no reader can be faster than."""
    from mmcl.data import decode_image
    from mmcl.models.open_clip.clip_transform import ClipTransform

    transform = ClipTransform(SIDE, random_crop_scale=CROP)
    files = [data for data, _ in _files(folder)]

    def batches() -> Iterable[torch.Tensor]:
        for start in range(0, len(files), BATCH):
            rows = [
                transform(decode_image(data), None, start + place).image
                for place, data in enumerate(files[start : start + BATCH])
            ]
            yield torch.stack([row for row in rows if row is not None])

    return _timed(batches(), len)


ARMS: dict[str, Callable[[Path, int], float | None]] = {
    "bare decoding": bare_decoding,
    "mmcl": ours,
    "mmcl, steady": partial(ours, steady=True),
    "mmcl, Pillow": ours_with_pillow,
    "webdataset": stock_webdataset,
    "litdata": litdata,
}


def _files(folder: Path) -> list[tuple[bytes, int]]:
    from mmcl.core import TaskStream
    from mmcl.data import open_stream

    reader = open_stream(TaskStream.read(folder / "card.yaml")).reader(0, "train")
    samples = [reader.read(number).members for number in range(len(reader))]
    return [(members["jpg"], int(members["cls"])) for members in samples]


def _torchvision() -> Callable[[Any], torch.Tensor]:
    from torchvision.transforms import (  # type: ignore[import-untyped]
        Compose,
        InterpolationMode,
        PILToTensor,
        RandomResizedCrop,
    )

    bicubic = InterpolationMode.BICUBIC
    return Compose([RandomResizedCrop(SIDE, (CROP, 1.0), interpolation=bicubic), PILToTensor()])


def _timed(batches: Iterable[Any], rows: Callable[[Any], int]) -> float:
    """Return samples per second of processor time, workers included."""
    torch.set_num_threads(1)
    start = _processor_seconds()
    total = sum(map(rows, batches))
    if hasattr(batches, "_iterator"):
        # Workers count once they have ended.
        batches._iterator = None
    return total / (_processor_seconds() - start)


def _steady(loader: Any) -> float:
    """Return samples per second of processor time of two epochs after the first."""
    torch.set_num_threads(1)
    sum(map(len, loader))
    workers = loader._iterator._workers if loader.num_workers else []
    start = _processor_seconds() + sum(map(_alive_seconds, workers))
    total = sum(len(batch) for _ in range(2) for batch in loader)
    return total / (_processor_seconds() + sum(map(_alive_seconds, workers)) - start)


def _alive_seconds(process: Any) -> float:
    """Return processor seconds of all threads of a process, in the steps of the system's clock."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
