"""Decoding in child processes: the same pixels, and a crash that names its image."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from odd_sources import Odd, Unloadable
from store_worlds import make_store, photo_folder, picture

from latentstore.errors import ImageError
from latentstore.isolation import Isolated, IsolationError, half_written
from latentstore.sources import Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = photo_folder(tmp_path_factory.mktemp("isolated") / "in", 12)
    for name in ("kill.png", "exit.png", "once.png", "io.png", "unpicklable.png", "print.png"):
        picture(5).save(folder / name)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def load(source, name):
    return source.load({"path": name, "path_raw": None}, 64)


def without_time(pixels):
    return {k: v for k, v in vars(pixels).items() if k not in ("rgb", "decode_seconds")}


def test_the_same_pixels(folder):
    plain = Source(folder)
    with Isolated(plain) as apart:
        for i in range(12):
            here, there = load(plain, f"{i:04d}.png"), load(apart, f"{i:04d}.png")
            np.testing.assert_array_equal(here.rgb, there.rgb)
            assert without_time(here) == without_time(there)
            assert there.decode_seconds > 0


def test_bad_images_are_told_as_ever(folder):
    plain = Source(folder)
    with Isolated(plain) as apart:
        for name in ("bad.png", "not there.png", "../outside.png"):
            with pytest.raises(ImageError) as here:
                load(plain, name)
            with pytest.raises(ImageError) as there:
                load(apart, name)
            assert vars(here.value) == vars(there.value)


@pytest.mark.parametrize(("name", "how"), [("kill.png", "SIGKILL"), ("exit.png", "exit code 7")])
def test_a_crash_names_its_image(folder, name, how):
    with Isolated(Odd(folder)) as apart:
        before = load(apart, "0000.png")
        with pytest.raises(ImageError, match=how) as caught:
            load(apart, name)
        assert caught.value.status == "killed"
        # The file itself could be read, and is on record.
        facts = load(Source(folder), name)
        assert (caught.value.facts.sha256, caught.value.facts.data) == (facts.sha256, b"")
        np.testing.assert_array_equal(load(apart, "0000.png").rgb, before.rgb)


def test_one_death_may_be_anothers(folder):
    (folder / "once.png.fresh").touch()
    with Isolated(Odd(folder)) as apart:
        np.testing.assert_array_equal(load(apart, "once.png").rgb, load(Source(folder), "once.png").rgb)
    assert not (folder / "once.png.fresh").exists(), "a process did die of it"


def test_failures_of_the_machine_are_no_crash(folder):
    with Isolated(Odd(folder)) as apart:
        with pytest.raises(OSError, match="the disk is gone"):
            load(apart, "io.png")
        with pytest.raises(RuntimeError, match="held by"):
            load(apart, "unpicklable.png")
        assert load(apart, "print.png").sha256 == load(Source(folder), "print.png").sha256


def test_many_threads(folder):
    """Each call gets the answer to its own question, while others crash."""
    names = [f"{i:04d}.png" for i in range(12)] * 4 + ["kill.png", "exit.png"]
    plain = {name: load(Source(folder), name).sha256 for name in names}
    with Isolated(Odd(folder)) as apart, ThreadPoolExecutor(4) as pool:

        def ask(name):
            try:
                return load(apart, name).sha256
            except ImageError as exc:
                return exc.status

        answers = list(pool.map(ask, names))
        assert len(apart._children) <= 4
    assert answers == [plain[n] for n in names[:-2]] + ["killed", "killed"]


def test_no_process_outlives_its_use(folder):
    before = set(psutil.Process().children(recursive=True))
    with Isolated(Odd(folder)) as apart:
        assert set(psutil.Process().children(recursive=True)) == before, "none before the first image"
        load(apart, "0000.png")
        children = set(psutil.Process().children(recursive=True)) - before
        assert len(children) == 1
    assert not [child for child in children if child.is_running()]
    with pytest.raises(IsolationError, match="stopped"):
        load(apart, "0000.png")


def test_a_child_that_cannot_start_is_no_bad_image(folder, capfd):
    with Isolated(Unloadable(folder)) as apart, pytest.raises(IsolationError, match="could not start"):
        load(apart, "0000.png")
    assert "not in this process" in capfd.readouterr().err


def test_closing_ends_a_child_at_work(folder):
    """Ctrl-C: the threads that still load come to an end."""
    (folder / "pipe.png").unlink(missing_ok=True)
    apart = Isolated(Stuck(folder))
    result = []

    def stuck():
        try:
            load(apart, "0000.png")
        except (IsolationError, ImageError) as exc:
            result.append(exc)

    with apart:
        thread = threading.Thread(target=stuck)
        thread.start()
        deadline = time.monotonic() + 30
        while not apart._children and time.monotonic() < deadline:
            time.sleep(0.01)
    thread.join(30)
    assert not thread.is_alive()
    assert [type(exc) for exc in result] == [IsolationError]


class Stuck(Source):
    """Never comes back."""

    def load(self, listed, size, *, max_pixels=0):
        time.sleep(600)


def test_half_written_shards(tmp_path):
    rows = np.ones((300, 4), np.float16)
    store = make_store(tmp_path / "s.zarr", rows)
    assert half_written(store.root) == frozenset()
    (store.root / "latents" / "c" / "2" / "0.abc.partial").touch()
    (store.root / "done" / "000001.json.abc.partial").touch()
    assert half_written(store.root) == {2}
