"""Where the latents of a training run lie: chosen by bytes, and without an influence on W."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import picture

from cli import placement
from cli.collection import Collection, Rows
from cli.placement import Free, choose, free, labelled, on_device
from cli.workflows import run_encode
from latentstore.errors import UsageError
from solvers.sgd import CosFace, LabelledRows

GB = 10**9
IDENTITIES, EACH = 60, 4


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """240 rows of 4,096 numbers."""
    folder = tmp_path_factory.mktemp("placement")
    for i in range(IDENTITIES * EACH):
        picture(i, 48).save(folder / f"{i:03d}.bmp")
    run_encode(folder, folder / "s.zarr", encoder="patch", image_size=256)
    return Collection.open(folder / "s.zarr")


def rows_of(collection: Collection) -> tuple[Rows, np.ndarray]:
    """Rows in no order of the disk, with classes."""
    rows = np.random.default_rng(0).permutation(len(collection.ok))
    return rows, np.repeat(np.arange(IDENTITIES), EACH)


def placed(collection: Collection, place: str) -> LabelledRows:
    rows, labels = rows_of(collection)
    if place == "gpu":  # the same class, on the only device that is here
        return on_device(collection.blocks(rows), len(rows), labels, "cpu")
    return labelled(collection, rows, labels, place, "cpu")


def recipe() -> CosFace:
    return CosFace(
        rank=4,
        batch_identities=4,
        per_identity=2,
        steps=20,
        weight_init="random",
        class_init="random",
        device="cpu",
    )


def test_every_place_gives_the_same_bytes_of_w(collection: Collection) -> None:
    host, *others = (recipe().fit(placed(collection, place)).query_map for place in ("host", "store", "gpu"))
    for other in others:
        assert other.tobytes() == host.tobytes()
    elsewhere = recipe().fit(labelled(collection, *reversed_rows(collection), "host", "cpu")).query_map
    assert elsewhere.tobytes() != host.tobytes(), "else W does not depend on the rows at all"


def reversed_rows(collection: Collection) -> tuple[Rows, np.ndarray]:
    rows, labels = rows_of(collection)
    return rows[::-1], labels


@pytest.mark.parametrize("place", ["host", "store", "gpu"])
def test_rows_come_in_the_order_asked_and_the_stored_dtype(collection: Collection, place: str) -> None:
    rows, _ = rows_of(collection)
    asked = np.array([7, 7, 0, 239, 3])
    found = np.asarray(placed(collection, place).gather(asked))
    assert found.dtype == np.float16
    assert found.tobytes() == collection.read(rows)[asked].tobytes()


def test_a_run_from_the_store_holds_a_few_batches(collection: Collection) -> None:
    """NumPy's arrays are traced; torch's (W, moments) are the same at every place."""

    def peak(place: str) -> int:
        tracemalloc.start()
        recipe().fit(placed(collection, place))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    recipe().fit(placed(collection, "store"))  # imports and caches
    whole, batch = 240 * 4096 * 2, 8 * 4096 * 2
    host, store = peak("host"), peak("store")
    assert host >= whole
    # Two batches in float16 and float32 (one read ahead), and W with its float64 copy for the report.
    assert store <= 2 * 3 * batch + 4 * 4096 * 4 * 5
    assert store < whole / 2


@pytest.mark.parametrize(
    ("needed", "room", "place"),
    [
        (16 * GB, Free(host=100 * GB, gpu=80 * GB), "gpu"),
        (70 * GB, Free(host=100 * GB, gpu=80 * GB), "host"),
        (90 * GB, Free(host=100 * GB, gpu=80 * GB), "store"),
        (16 * GB, Free(host=100 * GB), "host"),
        (90 * GB, Free(host=100 * GB), "store"),
        (0, Free(host=0, gpu=0), "gpu"),
    ],
)
def test_the_choice_follows_the_bytes(needed: int, room: Free, place: str) -> None:
    assert choose(needed, room).place == place


def test_what_training_takes_beside_is_counted_where_it_runs() -> None:
    assert choose(60 * GB, Free(100 * GB, 80 * GB), beside=10 * GB).place == "host"
    assert (
        choose(79 * GB, Free(100 * GB, 80 * GB), beside=10 * GB).place == "host"
    )  # its weights are on the GPU
    assert choose(79 * GB, Free(100 * GB), beside=10 * GB).place == "store"


def test_the_words_say_the_bytes() -> None:
    assert choose(16 * GB, Free(100 * GB, 80 * GB)).sentence == (
        "Latents: 16.00 GB in GPU memory (of 80.00 GB free)."
    )
    assert choose(1_200_000, Free(20 * GB)).sentence == "Latents: 1.20 MB in host memory (of 20.00 GB free)."
    assert choose(90 * GB, Free(100 * GB), beside=GB).sentence == (
        "Latents: 90.00 GB, read from the store batch by batch: 99.00 GB of host memory are free for them."
    )
    assert choose(GB, Free(100 * GB), asked="store").sentence == (
        "Latents: 1.00 GB, read from the store batch by batch, as asked."
    )


def test_what_was_asked_for_is_taken_or_refused() -> None:
    assert choose(16 * GB, Free(100 * GB, 80 * GB), asked="host").place == "host"
    with pytest.raises(UsageError, match=r"16\.00 GB there, and 10\.00 GB are free"):
        choose(16 * GB, Free(host=10 * GB), asked="host")
    with pytest.raises(UsageError, match="training runs on the CPU"):
        choose(1, Free(host=10 * GB), asked="gpu")


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job/step", "job/step", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job/step",
            "memory/job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_a_groups_limit_is_read_and_cached_pages_are_given_back(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    own, proc = tmp_path / folder, tmp_path / "cgroup"
    own.mkdir(parents=True)
    proc.write_text(line + "\n")
    limit, used, cached = names
    (own / limit).write_text("1000\n")
    (own / used).write_text("700\n")
    (own / "memory.stat").write_text(f"anon 600\n{cached} 100\nother_{cached} 5\n")
    assert placement._cgroup_room(proc, tmp_path) == [400]
    # The group above limits it, too.
    (own.parent / limit).write_text("900\n")
    (own.parent / used).write_text("800\n")
    (own.parent / "memory.stat").write_text("")
    assert placement._cgroup_room(proc, tmp_path) == [400, 100]
    (own / limit).write_text("max\n")
    assert placement._cgroup_room(proc, tmp_path) == [100]
    assert placement._cgroup_room(tmp_path / "none", tmp_path) == []


def test_processes_of_one_machine_share_its_memory() -> None:
    # Other programs take and give memory meanwhile: a factor of 3 is not a share of 8.
    assert free("cpu", 8).host < free("cpu").host / 3
    assert free("cpu").gpu is None
