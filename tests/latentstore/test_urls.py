"""Images behind URLs: what is there is read, what is not is a row, and a silent network stops the job."""

from __future__ import annotations

import io
import socket
import tarfile
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import fsspec
import pytest
from store_worlds import data_files, encode_patch, file_bytes, photo_folder, picture, shard_facts, tree

from latentstore import encode as encoding
from latentstore.cluster import connect, on_cluster
from latentstore.encode import Source
from latentstore.errors import ImageError, ManifestError, MissingExtraError, UsageError
from latentstore.manifest import refuse_secrets
from latentstore.sources import SourceError, tars, urls
from latentstore.sources.places import Stat
from latentstore.store import open_store

MTIME = 1_700_000_000


def png(seed):
    return file_bytes(picture(seed), "PNG")


class Server(ThreadingHTTPServer):
    """A web server of files in memory; ``faults`` says how a path misbehaves."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked = {}, {}, Counter()
        self.sent = self.latency = self.busy = self.busiest = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # clients hang up on answers that are too long


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked[self.path] += 1
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            time.sleep(server.latency)
            self.answer(server.faults.get(self.path), server.files.get(self.path.partition("?")[0]))
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, fault, data):
        if isinstance(fault, list):  # one fault a request
            fault = fault.pop(0) if fault else None
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(fault, str) and fault.startswith("http"):
            self.reply(302, b"", Location=fault)
        elif isinstance(fault, int) or data is None:
            self.reply(fault or 404, b"<html>no</html>")
        elif fault == "short":  # announces more than it sends
            self.reply(200, data, length=len(data) + 100)
            self.close_connection = True
        elif fault == "endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            while True:
                self.wfile.write(bytes(1 << 16))
                self.server.sent += 1 << 16
        elif "Range" in self.headers and fault != "no ranges":
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            self.reply(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}")
        else:
            self.reply(200, data)

    def reply(self, status, body, *, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Last-Modified", formatdate(MTIME, usegmt=True))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(urls, "WAITS", (0.01, 0.01, 0.01))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def listing(tmp_path, names):
    path = tmp_path / "list.csv"
    path.write_text("path\n" + "\n".join(names) + "\n")
    return Source.of(None, path)


def statuses(root):
    table = open_store(root).manifest()
    return dict(zip(table["path"].to_pylist(), table["status"].to_pylist(), strict=True))


# --- listings ----------------------------------------------------------------------------------------


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_a_url_lists_and_reads_like_its_folder(tmp_path, memory):
    folder = photo_folder(tmp_path / "in", 100)
    (folder / "sub").mkdir()
    (folder / "sub" / "ünï 写真.png").write_bytes(png(1))
    (folder / "torn.jpg").write_bytes(b"no picture")
    for name in ("notes.txt", ".hidden.png", ".cache/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(png(2))
    memory.put(f"{folder}/", "/bucket/in/", recursive=True)
    encode_patch(folder, tmp_path / "local.zarr")
    local = open_store(tmp_path / "local.zarr")
    for url in ("memory://bucket/in", "memory://bucket/in/", f"file://{folder}"):
        root = tmp_path / f"{len(url)}.zarr"
        encode_patch(None, root, source=Source.of(url))
        store = open_store(root)
        assert (store.reader.read(0, 102) == local.reader.read(0, 102)).all()
        drop = ["mtime"]
        assert store.manifest().drop(drop).equals(local.manifest().drop(drop))
        # A rerun goes on, with what has come meanwhile.
        assert encode_patch(None, root, source=Source.of(url)).encoded == 0
    memory.pipe("/bucket/in/a-new.png", png(3))
    summary = encode_patch(None, root.with_name("18.zarr"), source=Source.of("memory://bucket/in"))
    assert (summary.appended, summary.counts["ok"]) == (1, 102)


def test_tars_and_patterns_behind_urls(tmp_path, memory):
    for shard in range(2):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for i in range(5):
                info = tarfile.TarInfo(f"{shard}{i}.png")
                info.size = len(png(i))
                tar.addfile(info, io.BytesIO(png(i)))
        memory.pipe(f"/bucket/p-{shard:03d}.tar", out.getvalue())
    expected = [f"p-00{s}.tar/{s}{i}.png" for s in range(2) for i in range(5)]
    for named in ("memory://bucket", "memory://bucket/*.tar", "memory://bucket/p-{000..001}.tar"):
        assert Source.of(named).list()["path"].to_pylist() == expected
    encode_patch(None, tmp_path / "s.zarr", source=Source.of("memory://bucket/*.tar"))
    assert open_store(tmp_path / "s.zarr").counts() == {"ok": 10}
    with pytest.raises(UsageError, match=r"p-002\.tar cannot be read"):
        Source.of("memory://bucket/p-{001..002}.tar").list()


def test_workers_read_urls(tmp_path):
    folder = photo_folder(tmp_path / "in", 90)
    with tarfile.open(tmp_path / "tars.tar", "w") as tar:
        tar.add(folder, "x")
    for name, source in (("u", Source.of(f"file://{folder}")), ("t", Source.of(str(tmp_path / "*.tar")))):
        encode_patch(None, tmp_path / f"{name}-here.zarr", source=source)
    with connect(workers=2) as client:
        run = on_cluster(client, {"name": "patch", "image_size": 64})
        for name, source in (("u", Source.of(f"file://{folder}")), ("t", Source.of(str(tmp_path / "*.tar")))):
            encode_patch(None, tmp_path / f"{name}.zarr", source=source, run=run)
            assert data_files(tmp_path / f"{name}.zarr") == data_files(tmp_path / f"{name}-here.zarr")


@pytest.mark.parametrize(
    ("url", "error", "match"),
    [
        ("memory://nowhere", UsageError, "holds no image files|cannot be listed"),
        ("memory://nowhere/*.tar", UsageError, "No file matches"),
        ("nonsense://x/y", UsageError, "nonsense"),
        ("http://127.0.0.1:1/photos", UsageError, "no list of the files"),
        ("http://", ManifestError, "names no single file"),
        ("simplecache::memory://x", UsageError, "There is no folder|names no single"),
        ("memory://x::file://y", ManifestError, "names no single"),
    ],
)
def test_urls_that_are_nothing(url, error, match):
    with pytest.raises(error, match=match) as caught:
        Source.of(url).list()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_is_named():
    with pytest.raises(MissingExtraError, match="pip install s3fs"):
        Source.of("s3://bucket/photos").list()


# --- a web server ------------------------------------------------------------------------------------


def test_what_is_there_and_what_is_not(tmp_path, server):
    for i in range(3):
        server.files[f"/{i}.png"] = png(i)
    server.files["/text.png"] = b"no picture"
    server.files["/empty.png"] = b""
    server.faults["/gone.png"] = 410
    names = ["/0.png", "/1.png?width=9", "/empty.png", "/gone.png", "/none.png", "/text.png"]
    (tmp_path / "local.png").write_bytes(png(9))
    expected = ["ok", "ok", "unreadable", "missing", "missing", "unreadable", "ok"]
    names = [*(server.url + n for n in names), "local.png"]
    encode_patch(None, tmp_path / "s.zarr", source=listing(tmp_path, names))
    assert statuses(tmp_path / "s.zarr") == dict(zip(names, expected, strict=True))
    table = open_store(tmp_path / "s.zarr").manifest()
    assert table["mtime"].to_pylist()[0] == MTIME * 10**9
    assert max(server.asked.values()) == 1, "one request an image; none is repeated for what is not there"


def test_failures_that_pass_are_waited_for(tmp_path, server):
    server.files["/a.png"] = png(1)
    server.faults["/a.png"] = [500, "drop", "short"]
    encode_patch(None, tmp_path / "s.zarr", source=listing(tmp_path, [f"{server.url}/a.png"]))
    assert open_store(tmp_path / "s.zarr").counts() == {"ok": 1}
    assert server.asked["/a.png"] == 4


@pytest.mark.parametrize(
    ("fault", "said", "requests"),
    [
        (500, "HTTP 500", 4),
        (429, "HTTP 429", 4),
        ("drop", "4 attempts", 8),  # aiohttp asks a second time when a kept connection is closed
        ("short", "4 attempts", 4),
        (403, "access is refused", 1),
    ],
)
def test_a_failure_that_stays_stops_the_job_and_keeps_its_shards(tmp_path, server, fault, said, requests):
    names = [f"/{i:03d}.png" for i in range(90)]
    server.files.update(dict.fromkeys(names, png(1)))
    server.faults["/086.png"] = fault
    source = listing(tmp_path, [server.url + n for n in names])
    with pytest.raises(SourceError, match=said) as caught:
        encode_patch(None, tmp_path / "s.zarr", source=source)
    assert "\n" not in str(caught.value)
    assert "/086.png" in str(caught.value)
    assert requests // 2 < server.asked["/086.png"] <= requests
    assert open_store(tmp_path / "s.zarr").todo() == [1]
    kept = shard_facts(tmp_path / "s.zarr")
    del server.faults["/086.png"]
    summary = encode_patch(None, tmp_path / "s.zarr", source=source)
    assert (summary.encoded, summary.counts) == (6, {"ok": 90})
    assert kept.items() <= shard_facts(tmp_path / "s.zarr").items()


def test_a_silent_server_and_going_on_without_it(tmp_path, server):
    server.files["/a.png"] = png(1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{unused.getsockname()[1]}/b.png"
        source = listing(tmp_path, [f"{server.url}/a.png", dead])
        with pytest.raises(SourceError, match="skip-unreachable"):
            encode_patch(None, tmp_path / "s.zarr", source=source)
        source = Source.of(None, tmp_path / "list.csv", skip_unreachable=True)
        encode_patch(None, tmp_path / "s.zarr", source=source)
    assert statuses(tmp_path / "s.zarr") == {f"{server.url}/a.png": "ok", dead: "missing"}
    reasons = open_store(tmp_path / "s.zarr").manifest()["reason"].to_pylist()
    assert sum("4 attempts" in reason for reason in reasons) == 1


def test_no_more_is_read_than_is_allowed(tmp_path, server, monkeypatch):
    """By what a server announces, and by what it sends when it announces nothing."""
    monkeypatch.setattr(urls, "MAX_BYTES", 200_000)
    server.files |= {"/large.png": bytes(200_001), "/fits.png": bytes(200_000), "/endless.png": b"x"}
    server.faults["/endless.png"] = "endless"
    for name, status in (("large", "too_large"), ("endless", "too_large")):
        with pytest.raises(ImageError) as caught:
            urls.UrlFile(f"{server.url}/{name}.png").whole()
        assert caught.value.status == status
    assert len(urls.UrlFile(f"{server.url}/fits.png").whole().data) == 200_000
    # What the server sent beyond is what its and our sockets' buffers hold.
    assert server.sent < 50 << 20


def test_a_look_tells_a_missing_file_from_a_silent_server(server):
    """fsspec calls both "not found"; a row that was read would count as gone."""
    server.files |= {"/a.png": png(1), "/b.png": png(1)}
    server.faults |= {"/b.png": 500, "/c.png": 403}
    assert urls.UrlFile(f"{server.url}/a.png").stat() == Stat(len(png(1)), MTIME * 10**9)
    for name in "bc":
        with pytest.raises(SourceError):
            urls.UrlFile(f"{server.url}/{name}.png").stat()
    with pytest.raises(ImageError, match="not there") as caught:
        urls.UrlFile(f"{server.url}/none.png").stat()
    assert caught.value.status == "missing"


def test_many_reads_are_in_flight(tmp_path, server):
    names = [f"/{i:03d}.png" for i in range(48)]
    server.files.update(dict.fromkeys(names, png(1)))
    server.latency = 0.05
    source = listing(tmp_path, [server.url + n for n in names])
    encode_patch(None, tmp_path / "one.zarr", source=source, threads=1)
    assert server.busiest <= 2  # an answer is counted a moment longer than it is waited for
    server.busiest = 0
    encode_patch(None, tmp_path / "many.zarr", source=source, threads=None)
    assert urls.READERS / 2 < server.busiest <= urls.READERS + 2
    assert data_files(tmp_path / "one.zarr") == data_files(tmp_path / "many.zarr")


def test_a_tar_on_a_web_server(tmp_path, server):
    """Its headers take one request for megabytes, each member another; nothing is read twice."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(20):
            info = tarfile.TarInfo(f"{i:02d}.png")
            info.size = len(png(i))
            tar.addfile(info, io.BytesIO(png(i)))
    server.files["/p-000.tar"] = out.getvalue()
    source = Source.of(f"{server.url}/p-{{000..000}}.tar")
    assert source.list().num_rows == 20
    listed = server.asked["/p-000.tar"]
    assert listed <= 3
    encode_patch(None, tmp_path / "s.zarr", source=source)
    assert open_store(tmp_path / "s.zarr").counts() == {"ok": 20}
    assert server.asked["/p-000.tar"] <= listed + 20 + 4
    # Written anew behind our back: members are found where they lie now.
    (first, second), row = list(source.list().to_pylist())[:2], {"path_raw": None}
    assert source.read(first | row).sha256 != source.read(second | row).sha256
    moved = server.files["/p-000.tar"]
    server.files["/p-000.tar"] = tar_of("other.png", png(99)) + moved
    before = source.read(first | row).sha256
    assert before == open_store(tmp_path / "s.zarr").manifest()["sha256"][0].as_py()
    server.faults["/p-000.tar"] = "no ranges"
    tars._scanned.cache_clear()
    with pytest.raises(SourceError, match="ignores ranges"):
        source.list()


def tar_of(name, data):
    """A tar without its end, to stand before another."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf() + data + bytes(-len(data) % 512)


# --- secrets -----------------------------------------------------------------------------------------

SECRET = "hunter2"  # noqa: S105
URLS_WITH_SECRETS = [
    f"https://user:{SECRET}@example.org/a.png",
    f"https://{SECRET}@example.org/a.png",
    f"s3://key:{SECRET}@bucket/a.png",
    f"https://example.org/a.png?token={SECRET}",
    f"https://example.org/a.png?x=1&X-Amz-Signature={SECRET}",
    f"https://example.org/a.png?sv=2&sig={SECRET}",
    f"https://example.org/a.png?api_key={SECRET}",
    f"https://example.org/a.png?X-Goog-Credential={SECRET}",
]


@pytest.mark.parametrize("url", URLS_WITH_SECRETS)
def test_secrets_are_refused_and_not_repeated(tmp_path, url):
    with pytest.raises(ManifestError, match="carries a password") as caught:
        Source.of(url)
    assert SECRET not in str(caught.value)
    assert "example.org/a.png" in str(caught.value) or "bucket/a.png" in str(caught.value)
    source = listing(tmp_path, ["b.png", url])
    with pytest.raises(ManifestError, match="carries a password") as caught:
        encode_patch(None, tmp_path / "s.zarr", source=source)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a.png?keyword=cat&design=2&author=me&monkey=1",
        "https://example.org/user@2x/token.png",
        "sftp://me@host/photos/a.png",
        "s3://bucket/secret/key.png",
    ],
)
def test_what_is_no_secret_is_no_secret(url):
    refuse_secrets(url)


def test_where_a_server_leads_is_not_told(tmp_path, server):
    """A redirect may go to a signed URL, which is as good as a password."""
    server.faults["/a.png"] = f"{server.url}/b.png?signature={SECRET}"
    server.faults[f"/b.png?signature={SECRET}"] = 500
    with pytest.raises(SourceError) as caught:
        encode_patch(None, tmp_path / "s.zarr", source=listing(tmp_path, [f"{server.url}/a.png"]))
    assert SECRET not in str(caught.value)
    server.faults[f"/b.png?signature={SECRET}"] = None
    server.files["/b.png"] = png(1)
    encode_patch(None, tmp_path / "s.zarr", source=listing(tmp_path, [f"{server.url}/a.png"]))
    assert open_store(tmp_path / "s.zarr").counts() == {"ok": 1}
    assert not any(SECRET.encode() in data for data in tree(tmp_path / "s.zarr").values())


def test_a_store_keeps_to_its_url(tmp_path, memory):
    memory.pipe({"/a/x.png": png(1), "/b/x.png": png(1)})
    encode_patch(None, tmp_path / "s.zarr", source=Source.of("memory://a"))
    assert open_store(tmp_path / "s.zarr").origin["root"] == "memory://a"
    with pytest.raises(UsageError, match="was made from memory://a, not from memory://b"):
        encoding.prepare(Source.of("memory://b"), tmp_path / "s.zarr", encoding_of())


def encoding_of():
    from latentstore.encoders import PatchEncoder

    return PatchEncoder(64)
