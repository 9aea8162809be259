"""Downloading OASIS-1 from a server that breaks off: what is asked of it, what is kept, what is refused."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from oasis_vq import download

ROOT = Path(download.__file__).parents[1]
BLOCK = 16384  # bytes that the server writes at a time
BOTH = ("ETag", "Last-Modified")


class Server(ThreadingHTTPServer):
    """A server of archives with Range and If-Range, which can be told to misbehave, and which counts what it sends."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)  # name -> bytes
        self.ranges = True  # whether it knows Range
        self.if_range = True  # whether it knows If-Range
        self.validators = BOTH
        self.breaks = []  # bytes after which each of the next answers breaks off; None for not at all
        self.resets = False  # whether it breaks off by a reset, which also loses what is under way
        self.statuses = []  # of the next answers, without a body
        self.claim = 0  # bytes that Content-Length says more than there are
        self.lengths = True  # whether it says how much it sends
        self.pause = 0.0  # seconds after each block
        self.headers = {}  # sent besides
        self.requests = []  # (name, Range, If-Range)
        self.sent = 0  # bytes
        self.answering = 0  # requests
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def forget(self):
        wait_until(lambda: self.answering == 0)  # one that was killed may still be answered
        self.requests, self.sent = [], 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.answering += 1
        self.close_connection = True
        try:
            self.send_archive()
        except OSError:
            pass  # the other side was killed
        finally:
            self.server.answering -= 1

    def send_archive(self):
        server, name, wish = self.server, self.path.strip("/"), self.headers.get("Range")
        server.requests.append((name, wish, self.headers.get("If-Range")))
        if server.statuses or name not in server.files:
            self.answer(server.statuses.pop(0) if server.statuses else 404, {"Content-Length": "0"})
            return
        content = server.files[name]
        digest = hashlib.md5(content).hexdigest()
        validators = {"ETag": f'"{digest}"', "Last-Modified": f"Mon, 0{int(digest, 16) % 9 + 1} Jan 2007 00:00:00 GMT"}
        validators = {key: validators[key] for key in server.validators}
        status, start, headers = 200, 0, validators | server.headers
        same = self.headers.get("If-Range") in (None, *headers.values()) or not server.if_range
        if wish and server.ranges and same:
            status, start = 206, int(re.fullmatch(r"bytes=(\d+)-", wish)[1])
            if start >= len(content):
                self.answer(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if server.lengths:
            headers["Content-Length"] = str(len(content) - start + server.claim)
        self.answer(status, headers)
        stop = server.breaks.pop(0) if server.breaks else None
        stop = len(content) if stop is None else min(len(content), start + stop)
        for place in range(start, stop, BLOCK):
            block = content[place : min(stop, place + BLOCK)]
            server.sent += len(block)  # before the other side can have it
            self.wfile.write(block)
            time.sleep(server.pause)
        if stop < len(content) and server.resets:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def answer(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def make_archive(disc, size=1_000_000, seed=0):
    """Return the bytes of a .tar.gz with one file of `size` random bytes; its length depends on `size` only."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz", compresslevel=0) as archive:
        member = tarfile.TarInfo(f"disc{disc}/OAS1_0001_MR1/image.img")
        member.size = size
        archive.addfile(member, io.BytesIO(random.Random(disc + 100 * seed).randbytes(size)))
    return target.getvalue()


def name(disc):
    return f"oasis_cross-sectional_disc{disc}.tar.gz"


ARCHIVES = {name(disc): make_archive(disc) for disc in (1, 2, 12)}
FIRST = ARCHIVES[name(1)]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.002)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(ARCHIVES) as server:
        yield server
        server.shutdown()


def fetch(server, folder, discs=(1,), **options):
    return download.download_oasis1(folder, discs=discs, base_url=server.url, progress=False, **options)


def start_process(server, folder, discs=(1,)):
    """Download in another process, which can be killed."""
    options = f"discs={list(discs)}, base_url={server.url!r}, progress=False"
    # A shell starts what it puts into the background with SIGINT ignored, and the tests may be run so.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from oasis_vq import download; download.download_oasis1({str(folder)!r}, {options})"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def finished(*discs):
    return [f"{name(disc)}{suffix}" for disc in discs for suffix in ("", ".json")]


def test_only_the_discs_asked_for(server, tmp_path, capsys):
    paths = fetch(server, tmp_path / "new" / "folder", discs=[12, 2, 12])
    assert [path.name for path in paths] == [name(12), name(2)] == [asked for asked, _, _ in server.requests]
    assert all(path.read_bytes() == ARCHIVES[path.name] for path in paths)
    assert names(tmp_path / "new" / "folder") == finished(12, 2)
    folder = tmp_path / "new" / "folder"
    assert capsys.readouterr().out == f"Next: python -m oasis_vq prepare {folder} --out data/oasis\n"


def test_a_finished_archive_is_not_asked_for_again(server, tmp_path):
    (path,) = fetch(server, tmp_path)
    modified, server.requests = path.stat().st_mtime_ns, []
    server.files[name(1)] = make_archive(1, seed=1)
    assert fetch(server, tmp_path) == [path]
    assert server.requests == [] and path.stat().st_mtime_ns == modified


@pytest.mark.parametrize("record", [None, {"size": len(FIRST)}])
def test_an_archive_that_another_program_left_is_checked_once(server, tmp_path, monkeypatch, record):
    archive = tmp_path / name(1)
    archive.write_bytes(FIRST[:600_000])  # as a download that broke off leaves it
    if record:  # of an archive that was replaced
        (tmp_path / f"{name(1)}.json").write_text(json.dumps(record))
    for _ in range(2):
        with pytest.raises(OSError) as refused:
            fetch(server, tmp_path)
        text = str(refused.value)
        assert text.startswith(f"{archive} is damaged (Compressed file ended before")
        assert text.endswith("). Remove it, then run download again.") and archive.stat().st_size == 600_000
    archive.write_bytes(ARCHIVES[name(2)])  # whole
    (tmp_path / f"{name(1)}.json").unlink(missing_ok=True)
    assert fetch(server, tmp_path) == [archive] and names(tmp_path) == finished(1) and server.requests == []
    with monkeypatch.context() as patch:
        patch.setattr(download, "_find_damage", lambda *_: pytest.fail("it was read again"))
        assert fetch(server, tmp_path) == [archive]
    archive.unlink()
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST


@pytest.mark.parametrize("discs", [[0, 1], [13], []])
def test_other_discs_are_refused(server, tmp_path, discs):
    with pytest.raises(ValueError, match=re.escape(f"The discs of OASIS-1 are 1 to 12. Received: {discs}.")):
        fetch(server, tmp_path / "folder", discs=discs)
    assert server.requests == [] and not (tmp_path / "folder").exists()


def test_the_progress_bar_starts_at_what_is_there(server, tmp_path, capsys):
    server.breaks = [600_000]
    download.download_oasis1(tmp_path, discs=[1], base_url=server.url)
    bars = [bar.split("\r")[1] for bar in capsys.readouterr().err.split("\n")[:-1]]  # as each was at its start
    assert [re.match(r"(.+):\s+(\d+)%", bar).groups() for bar in bars] == [
        (name(1), "0"), (name(1), "60"), (f"checking {name(1)}", "0")
    ]  # fmt: skip


def test_goes_on_after_a_break_within_a_call(server, tmp_path, capsys):
    server.breaks = [300_000, 400_000]
    (path,) = fetch(server, tmp_path)
    assert path.read_bytes() == FIRST and server.sent == len(FIRST)
    assert [wish for _, wish, _ in server.requests] == [None, "bytes=300000-", "bytes=700000-"]
    words = capsys.readouterr().out.splitlines()[0]
    assert words.startswith(f"{name(1)}: stopped at 0.3 MB (") and words.endswith("), going on in 0.002 s")


def test_goes_on_after_a_reset(server, tmp_path):
    server.resets, server.breaks, server.pause = True, [300_000, 400_000], 0.001
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST
    starts = [int((wish or "bytes=0-")[6:-1]) for _, wish, _ in server.requests]
    assert len(starts) == 3 and 0 < starts[1] <= 300_000 < starts[2]


def test_progress_resets_the_count_and_no_progress_ends_it(server, tmp_path):
    server.breaks = [100_000] * (download.NUM_RETRIES + 2) + [0] * 100
    with pytest.raises(OSError) as stop:
        fetch(server, tmp_path)
    assert len(server.requests) == 2 * download.NUM_RETRIES + 2
    there = (tmp_path / f"{name(1)}.partial").stat().st_size
    assert there == 100_000 * (download.NUM_RETRIES + 2)
    failed = f"{server.url}/{name(1)} failed 6 times in a row: "
    assert str(stop.value).startswith(failed) and "\n" not in str(stop.value)
    assert str(stop.value).endswith("the same command goes on from there.") and f"{there / 1e6:.1f} MB" in str(
        stop.value
    )
    server.breaks, server.sent = [], 0
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST and server.sent == len(FIRST) - there


def test_no_server_at_all_is_one_line(server, tmp_path):
    with Server({}) as gone:
        url = gone.url
        gone.shutdown()
    with pytest.raises(OSError, match=r"refused.*0\.0 MB are in"):
        download.download_oasis1(tmp_path, discs=[1], base_url=url, progress=False)
    assert names(tmp_path) == []


def test_a_busy_server_is_asked_again_and_a_missing_archive_is_not(server, tmp_path):
    server.statuses = [503, 429]
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST and len(server.requests) == 3
    server.forget()
    with pytest.raises(
        OSError, match=rf"^{server.url}/{name(3)}: no archive \(404 Not Found, .*https://sites\.wustl\.edu"
    ):
        fetch(server, tmp_path, discs=[3])
    assert len(server.requests) == 1 and names(tmp_path) == finished(1)


@pytest.mark.parametrize("ending", ["SIGKILL", "SIGINT"])
@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_goes_on_after_the_process_was_ended(server, tmp_path, ending):
    server.pause = 0.01
    process = start_process(server, tmp_path)
    partial = tmp_path / f"{name(1)}.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 300_000)
    process.send_signal(getattr(signal, ending))
    assert process.wait() != 0
    there = partial.stat().st_size
    assert there < len(FIRST) and names(tmp_path) == [f"{name(1)}.partial", f"{name(1)}.partial.json"]

    server.pause = 0
    server.forget()
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST and names(tmp_path) == finished(1)
    etag = f'"{hashlib.md5(FIRST).hexdigest()}"'
    assert server.requests == [(name(1), f"bytes={there}-", etag)] and server.sent == len(FIRST) - there


def test_nothing_looks_finished_after_kills_at_random_moments(server, tmp_path):
    """Discs 1 and 2 again and again, until a call comes to its end by itself."""
    server.pause, moments, kills = 0.01, random.Random(0), 0
    while True:
        server.forget()
        process, moment = start_process(server, tmp_path, discs=(1, 2)), moments.randrange(0, 400_000)
        wait_until(lambda moment=moment, process=process: server.sent > moment or process.poll() is not None)
        if process.poll() == 0:
            break
        process.kill()
        process.wait()
        kills += 1
        for path in tmp_path.glob("*.tar.gz"):
            assert path.read_bytes() == ARCHIVES[path.name]
    assert kills >= 5 and names(tmp_path) == finished(1, 2)
    assert all((tmp_path / name(disc)).read_bytes() == ARCHIVES[name(disc)] for disc in (1, 2))


def test_killed_while_checking_goes_on_without_the_server(server, tmp_path):
    blank = io.BytesIO()  # much to read, little to send
    with gzip.open(blank, "wb", compresslevel=1) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        for number in range(300):
            member = tarfile.TarInfo(f"disc1/{number}")
            member.size = 2**20
            archive.addfile(member, io.BytesIO(bytes(2**20)))
    server.files[name(1)] = blank.getvalue()
    process = start_process(server, tmp_path)
    partial = tmp_path / f"{name(1)}.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size == len(blank.getvalue()))
    time.sleep(0.05)
    process.kill()
    assert process.wait() != 0 and not (tmp_path / name(1)).exists()
    server.forget()
    assert fetch(server, tmp_path)[0].read_bytes() == blank.getvalue() and server.requests == []


def break_off(server, folder):
    """Leave part of disc 1 in the folder, and return its size."""
    server.breaks = [500_000] + [0] * 100
    with pytest.raises(OSError):
        fetch(server, folder)
    server.breaks = []
    server.forget()
    return (folder / f"{name(1)}.partial").stat().st_size


@pytest.mark.parametrize(
    ("if_range", "validators", "size", "words"),
    [
        (True, BOTH, 1_000_000, "it has changed on the server, starting again from zero"),
        (False, BOTH, 1_000_000, "another"),
        (False, (), 900_000, "another"),
        (False, (), 200_000, "another"),  # shorter than what is there
    ],
)
def test_another_file_on_the_server_is_fetched_whole(server, tmp_path, capsys, if_range, validators, size, words):
    server.if_range, server.validators = if_range, validators
    break_off(server, tmp_path)
    server.files[name(1)] = make_archive(1, size=size, seed=1)
    assert fetch(server, tmp_path)[0].read_bytes() == server.files[name(1)]
    assert names(tmp_path) == finished(1) and words in capsys.readouterr().out


def test_parts_of_two_files_that_nothing_tells_apart_are_refused(server, tmp_path):
    server.validators = ()
    break_off(server, tmp_path)
    server.files[name(1)] = make_archive(1, seed=1)
    assert len(server.files[name(1)]) == len(FIRST)
    with pytest.raises(OSError, match="came damaged"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("validators", [("Last-Modified",), ()])
def test_without_an_etag_it_goes_on_all_the_same(server, tmp_path, validators):
    server.validators = validators
    there = break_off(server, tmp_path)
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST and server.sent == len(FIRST) - there
    assert (server.requests[0][2] is not None) == bool(validators)


def test_a_weak_etag_is_not_enough_to_go_on_with(server, tmp_path):
    server.validators, server.headers = ("Last-Modified",), {"ETag": 'W/"1"'}
    there = break_off(server, tmp_path)
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST and server.sent == len(FIRST) - there
    assert server.requests[0][2].endswith("Jan 2007 00:00:00 GMT")


def test_a_server_without_ranges_starts_again_and_says_so(server, tmp_path, capsys):
    server.ranges, server.breaks = False, [400_000, 300_000]
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST
    assert server.sent == len(FIRST) + 700_000
    assert capsys.readouterr().out.count("the server cannot continue a download, starting again from zero") == 2


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(server, tmp_path):
    server.ranges, server.breaks = False, [400_000, 100_000] * 100
    with pytest.raises(OSError, match="failed 6 times in a row"):
        fetch(server, tmp_path)
    assert len(server.requests) == download.NUM_RETRIES + 1


def test_a_server_that_tells_no_size(server, tmp_path):
    server.lengths = False
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST
    server.breaks = [400_000]  # looks like the end of the file
    with pytest.raises(OSError, match="came damaged"):
        fetch(server, tmp_path, discs=[2])
    assert names(tmp_path) == finished(1)


def test_a_page_in_place_of_the_archive_spoils_nothing(server, tmp_path):
    there = break_off(server, tmp_path)
    server.ranges, server.headers = False, {"Content-Type": "text/html"}
    with pytest.raises(OSError, match=r"no archive \(200 OK, text/html\)"):
        fetch(server, tmp_path)
    assert (tmp_path / f"{name(1)}.partial").stat().st_size == there and len(server.requests) == 1


@pytest.mark.parametrize("record", [None, b"", b"\0\0"])
def test_a_partial_file_without_its_record_is_not_trusted(server, tmp_path, record):
    (tmp_path / f"{name(1)}.partial").write_bytes(b"of something else")
    if record is not None:
        (tmp_path / f"{name(1)}.partial.json").write_bytes(record)
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST and server.requests[0][1] is None


def test_more_bytes_than_the_file_has_are_not_trusted(server, tmp_path):
    break_off(server, tmp_path)
    (tmp_path / f"{name(1)}.partial").write_bytes(FIRST + b"x")
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST


def test_gz_sent_as_an_encoding_is_left_as_it_is(server, tmp_path):
    server.headers = {"Content-Encoding": "x-gzip"}
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST


def spoiled(archive):
    """Return archives that are damaged in one way each."""
    middle = len(archive) // 2
    flipped = archive[:middle] + bytes([archive[middle] ^ 1]) + archive[middle + 1 :]
    checksum = archive[:-8] + bytes(4) + archive[-4:]
    page, no_tar = b"<html>moved</html>", gzip.compress(os.urandom(5000))
    return {"flipped": flipped, "checksum": checksum, "short": archive[:-1000], "page": page, "no tar": no_tar}


@pytest.mark.parametrize("damage", ["flipped", "checksum", "short", "page", "no tar"])
def test_a_damaged_archive_is_removed_and_fetched_anew(server, tmp_path, damage):
    server.files[name(1)] = spoiled(FIRST)[damage]
    with pytest.raises(OSError) as refused:
        fetch(server, tmp_path)
    assert re.fullmatch(
        rf"{name(1)} came damaged \(.+\) and was removed\. The same command starts anew\.", str(refused.value)
    )
    assert names(tmp_path) == []
    server.files[name(1)] = FIRST
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST


def test_a_length_that_is_too_large_is_asked_about(server, tmp_path):
    server.claim = 1000
    assert fetch(server, tmp_path)[0].read_bytes() == FIRST
    assert [wish for _, wish, _ in server.requests] == [None, f"bytes={len(FIRST)}-"]


def test_a_length_that_is_too_small_is_seen(server, tmp_path):
    server.claim = -1000
    with pytest.raises(OSError, match="came damaged"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []


def test_a_disk_that_is_too_small_is_seen_before(server, tmp_path):
    server.claim = 10**16
    with pytest.raises(OSError, match=rf"^{name(1)} needs 10,000,000,001\.\d MB more, .* has [\d,.]+ MB free\.$"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1 and not (tmp_path / f"{name(1)}.partial").exists()


def test_the_record_names_what_the_part_belongs_to(server, tmp_path):
    break_off(server, tmp_path)
    record = json.loads((tmp_path / f"{name(1)}.partial.json").read_text())
    assert record == {"validator": f'"{hashlib.md5(FIRST).hexdigest()}"', "size": len(FIRST)}
    assert str(tmp_path) not in json.dumps(record)


def ask(words, accept=False):
    """Answer the question about the terms on a terminal; None for no terminal. Return the exit status and all words."""
    code = f"from oasis_vq import download; download.confirm_terms({accept}); print('went on')"
    command = [sys.executable, "-c", code]
    if words is None:
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    pty = pytest.importorskip("pty", reason="no terminals here")
    parent, child = pty.openpty()
    with subprocess.Popen(command, cwd=ROOT, stdin=child, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        os.close(child)
        os.write(parent, words)
        said = process.communicate(timeout=20)[0].decode()
    os.close(parent)
    return process.returncode, said


@pytest.mark.parametrize("words", [b"yes\n", b" Yes \n"])
def test_terms_are_accepted_by_yes(words):
    status, said = ask(words)
    assert status == 0 and said.endswith("Type yes to accept: went on\n")


@pytest.mark.parametrize("words", [b"no\n", b"y\n", b"\n"])
def test_terms_are_refused_by_anything_else(words):
    status, said = ask(words)
    answer = words.decode().strip()
    refusal = f"ValueError: Without yes to the terms of OASIS-1 nothing is downloaded. Received: {answer!r}."
    assert status == 1 and said.splitlines()[-1].removeprefix("Type yes to accept: ") == refusal


@pytest.mark.parametrize("words", [None, b"\x04"])
def test_nobody_to_ask_is_told_of_the_option(words):
    status, said = ask(words)
    assert status == 1 and said.splitlines()[-1].endswith("If they are, pass --accept-terms.")


def test_accepted_terms_are_shown_and_not_asked_for():
    status, said = ask(None, accept=True)
    assert status == 0 and said == f"{download.TERMS}\nwent on\n"


def test_terms_name_what_a_publication_has_to_name():
    words = " ".join(download.TERMS.split())
    for grant in ("P50 AG05681", "P01 AG03991", "P01 AG026276", "R01 AG021910", "P20 MH071616", "U24 RR021382"):
        assert grant in words
    assert "doi:10.1162/jocn.2007.19.9.1498" in words and download.HOME_PAGE in words
    assert max(len(line) for line in download.TERMS.splitlines()) <= 120


def test_import_needs_no_tensorflow():
    code = "import sys, oasis_vq.download; print('tensorflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
