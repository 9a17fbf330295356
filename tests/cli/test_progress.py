"""What a person sees while a job runs: rate, time left, failures, and where the time goes."""

from __future__ import annotations

import os
import pty
import re
import sys

import pytest

from cli import progress
from cli.progress import Progress, shares, tracked

SECONDS = {"read": 0.3, "decode": 4.0, "encode": 5.5, "write": 0.2, "wait": 99.0, "total": 7.0}
SHOWN = "read 3 % decode 40 % encode 55 % write 2 %"


def test_shares_are_of_the_work() -> None:
    """Waiting overlaps with what is waited for; the total is no share."""
    assert shares(SECONDS) == SHOWN
    assert shares({"encode": 2.0}) == "read 0 % decode 0 % encode 100 % write 0 %"
    assert shares({}) == shares({"wait": 1.0}) == ""


def drive(shown: Progress) -> None:
    shown.on_start(1_200, 5_000)
    shown.on_rows(400, 2)
    shown.on_times({"read": 0.1, "decode": 4.0})
    shown.on_times({"read": 0.2, "encode": 5.5, "write": 0.2, "wait": 99.0})
    shown.on_rows(200, 1)


def test_counts_add_up() -> None:
    shown = Progress("images", lambda progress: None)
    drive(shown)
    assert (shown.todo, shown.done, shown.bad) == (1_200, 600, 3)
    assert shares(shown.seconds) == SHOWN


def test_log_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with tracked("encode", "images") as shown:
        drive(shown)
    assert capsys.readouterr().err == "", "at most one line in 30 s"
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    with tracked("encode", "images") as shown:
        drive(shown)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"encode: 600 of 1,200, [\d,.]+ images/s, [\d,.]+ s left, 3 bad, {re.escape(SHOWN)}", last
    )


def test_the_rate_is_that_of_the_last_half_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 rows a second for a minute, then 10: rate and time left are the latter's."""
    now = 1000.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now)
    shown = Progress("images", lambda progress: None)
    assert (shown.rate, shown.left) == (0.0, None)
    now += 20  # loading
    shown.on_start(10_000, 10_000)
    assert (shown.rate, shown.left) == (0.0, None)
    for seconds, rows in ((60, 100), (40, 10)):
        for _ in range(seconds):
            now += 1
            shown.on_rows(rows, 0)
        assert shown.rate == pytest.approx(rows)
    assert shown.left == pytest.approx((10_000 - 6_400) / 10)
    assert len(shown._marks) < 40


def test_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_LOG_EVERY", 0.0)
    with tracked("encode", "images", quiet=True) as shown:
        drive(shown)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_of_80_columns_has_room_for_all() -> None:
    script = """
import sys, time
sys.path[:0] = [%r]
from test_progress import drive
from cli.progress import tracked
with tracked("encode", "images", first="loading the encoder") as shown:
    time.sleep(0.3)
    drive(shown)
    for _ in range(5):
        time.sleep(0.3)
        shown.on_rows(20, 0)
""" % os.path.dirname(__file__)  # noqa: PTH120, UP031
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"COLUMNS": "80", "TERM": "xterm"}
        os.execv(sys.executable, [sys.executable, "-c", script])  # noqa: S606
    seen = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # its end was closed
            break
        if not piece:
            break
        seen += piece
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, seen.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert re.search(r"700/1200 [\d,.]+ images/s \d:\d\d:\d\d 3 bad", text), text
    assert SHOWN in text
    assert "loading the encoder" in text.partition("/1200")[0]
    assert "/?" not in text
    assert "…" not in text
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= 80
