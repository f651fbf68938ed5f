"""A folder's limits and several servers: what fits is written, all is counted."""

import logging
import sqlite3
import threading
import time

import agents
import mlx.core as mx
import pytest
from test_kv_folder import SPEC, TEXT, bytes_in, key, leaves, read, record, whole

import mlx_turboquant as tq
from mlx_turboquant.conversations import disk
from mlx_turboquant.conversations.catalog import Catalog
from mlx_turboquant.conversations.disk import DiskFolder
from mlx_turboquant.integrations.saved_texts import SavedTexts


@pytest.fixture
def folder(tmp_path):
    made = DiskFolder(tmp_path / "kv", limit=10**6)
    yield made
    made.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = agents.save_tiny("llama", tmp_path_factory.mktemp("tiny"))
    return tq.load(str(path))[0]


def in_index(folder):
    """Bytes of files that the index counts."""
    with sqlite3.connect(folder.folder / "index.sqlite") as index:
        (size,) = index.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()
    index.close()
    return size


def begun_anew(folder):
    """Another server's, which has found the index damaged."""
    for path in folder.folder.glob("index.sqlite*"):
        path.unlink()
    (folder.folder / "index.sqlite").write_bytes(b"no index" * 1000)
    return DiskFolder(folder.folder, 10**6)


# What fits of a text.


def test_of_records_those_that_fit_in_the_hour_are_written(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    folder = DiskFolder(tmp_path / "kv", 10**6, hourly=3500)
    asked = []

    def records():
        for i in range(6):
            asked.append(i)
            yield record(i)

    assert not folder.write(records())
    assert asked == [0, 1, 2, 3], "no more than one that is too many"
    assert folder.known([key(i) for i in range(6)]) == 3
    assert bytes_in(folder) == folder.nbytes == 3000
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert folder.write([record(i) for i in range(6)], behind=key(2))
    assert folder.known([key(i) for i in range(6)]) == 6
    assert len(list(folder.folder.glob("*.kv"))) == 1
    found = folder.read([key(i) for i in range(6)])
    assert [one.tobytes() for one in found] == [whole(record(i)) for i in range(6)]
    folder.close()


def test_files_are_no_longer_than_a_part_of_the_folder(tmp_path):
    """What makes room for others is a file at a time, also of one long text."""
    folder = DiskFolder(tmp_path / "kv", 80_000)
    assert folder.write([record(i) for i in range(35)])
    sizes = sorted(path.stat().st_size for path in folder.folder.glob("*.kv"))
    assert sizes == [5000, 10_000, 10_000, 10_000]
    folder.close()


def test_what_makes_room_first_is_a_text_s_end(tmp_path):
    """Its beginning is of use without that, and not the other way round."""
    folder = DiskFolder(tmp_path / "kv", 80_000)
    keys = [key(i) for i in range(35)]
    folder.write([record(i) for i in range(35)])
    assert folder.write([record(i) for i in range(100, 150)])
    assert folder.known(keys) == 30
    assert folder.write([record(i) for i in range(200, 210)])
    assert folder.known(keys) == 30
    assert folder.known([key(i) for i in range(100, 150)]) == 40
    folder.close()


def test_a_text_s_first_pages_are_written_and_the_rest_in_the_next_hour(
    llama, tmp_path, hooked, monkeypatch
):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    model = llama
    caches = tq.make_prompt_cache(model, SPEC)
    read(model, caches, TEXT[:390])
    whole_folder = DiskFolder(tmp_path / "whole", 10**7)
    empty = tq.make_prompt_cache(model, SPEC)
    SavedTexts(whole_folder, [model], empty).save(TEXT[:390], caches, whole=True)
    hourly = whole_folder.nbytes // 2
    folder = DiskFolder(tmp_path / "kv", 10**7, hourly=hourly)
    saved = SavedTexts(folder, [model], empty)
    assert not saved.save(TEXT[:390], caches, whole=True)
    assert 0.8 * hourly < folder.nbytes == bytes_in(folder) <= hourly
    tokens, back = saved.load(TEXT, least=1)
    assert 100 < len(tokens) == back[0].offset < 300
    assert (len(tokens) - 4) % 32 == 0
    # The same text from these pages, and from its own.
    one, two = tq.make_prompt_cache(model, SPEC), back
    read(model, one, TEXT[: len(tokens)])
    logits = [read(model, each, TEXT[len(tokens) : 390]) for each in (one, two)]
    error = mx.mean(mx.abs(logits[0] - logits[1]))
    assert error < 0.3 * mx.mean(mx.abs(logits[0]))
    for hour in (1, 2):
        monkeypatch.setattr(time, "time", lambda hour=hour: now + 3600 * hour)
        done = saved.save(TEXT[:390], caches, whole=True)
    assert done
    assert folder.nbytes == whole_folder.nbytes, "nothing is written twice"
    tokens, back = saved.load(TEXT, least=390)
    assert leaves(back) == leaves(caches)
    folder.close()
    whole_folder.close()


def test_a_text_larger_than_the_folder_is_not_begun(llama, tmp_path, hooked, caplog):
    """It would drop its own beginning for its end, over and over."""
    caplog.set_level(logging.INFO)
    model = llama
    caches = tq.make_prompt_cache(model, SPEC)
    read(model, caches, TEXT)
    folder = DiskFolder(tmp_path / "kv", 10_000)
    saved = SavedTexts(folder, [model], tq.make_prompt_cache(model, SPEC))
    assert saved.save(TEXT, caches, whole=True), "nothing is left to try again"
    assert folder.nbytes == 0
    assert "do not fit in --kv-disk 10.0 kB" in caplog.text
    folder.close()


# Several servers.


def test_a_file_dropped_by_another_server_is_written_anew(folder, monkeypatch, caplog):
    """While it is written to: its bytes are there, and counted, after all."""
    other = DiskFolder(folder.folder, 10**6)
    folder.write([record(1)])
    append, dropped = disk.append, []

    def append_and_drop(path, start, records):
        rows = append(path, start, records)
        if not dropped:
            dropped.append(path.name)
            other.forget()
        return rows

    monkeypatch.setattr(disk, "append", append_and_drop)
    assert folder.write([record(2)], behind=key(1))
    assert folder.read([key(2)])[0].tobytes() == whole(record(2))
    assert folder.known([key(1)]) == 0
    assert bytes_in(folder) == folder.nbytes == 1000
    assert [path.name for path in folder.folder.glob("*.kv")] != dropped
    assert not caplog.records
    other.close()


def test_a_file_dropped_before_it_is_opened_is_written_anew(folder, monkeypatch):
    """It would be made again, with other bytes where the index says."""
    other = DiskFolder(folder.folder, 10**6)
    folder.write([record(1)])
    append, forgotten = disk.append, []

    def drop_and_append(path, start, records):
        if not forgotten:
            forgotten.append(other.forget())
        return append(path, start, records)

    monkeypatch.setattr(disk, "append", drop_and_append)
    assert folder.write([record(2)], behind=key(1))
    assert forgotten == [1000]
    assert folder.read([key(2)])[0].tobytes() == whole(record(2))
    assert bytes_in(folder) == folder.nbytes == 1000
    other.close()


def test_an_index_begun_anew_while_one_writes_is_found(folder, monkeypatch):
    """The number that its file had is another server's file by then."""
    folder.write([record(1)])
    append, others = disk.append, []

    def append_and_begin_anew(path, start, records):
        rows = append(path, start, records)
        if not others:
            others.append(begun_anew(folder))
            assert others[0].write([record(9)])
        return rows

    monkeypatch.setattr(disk, "append", append_and_begin_anew)
    assert folder.write([record(2)], behind=key(1))
    found = folder.read([key(2), key(9)])
    assert [one.tobytes() for one in found] == [whole(record(2)), whole(record(9))]
    assert bytes_in(folder) == folder.nbytes == 2000
    others[0].close()


@pytest.mark.parametrize("when", ["at the start", "at the next write"])
def test_files_that_no_index_has_are_removed(folder, when):
    folder.write([record(1)])
    stray = folder.folder / "0123456789abcdef.kv"
    stray.write_bytes(b"x" * 5000)
    if when == "at the start":
        DiskFolder(folder.folder, 10**6).close()
    else:
        folder.write([record(2)])
    assert not stray.exists()
    assert (
        bytes_in(folder) == folder.nbytes == (1000 if when == "at the start" else 2000)
    )


def test_a_file_that_is_about_to_be_named_is_not_removed(folder, monkeypatch):
    """Another server starts, writes and looks around while its bytes are written."""
    append = disk.append

    def watched(path, start, records):
        rows = append(path, start, records)
        if records[0].key == key(1):
            other = DiskFolder(folder.folder, 10**6)
            assert other.write([record(2)])
            other.close()
        return rows

    monkeypatch.setattr(disk, "append", watched)
    assert folder.write([record(1)])
    found = folder.read([key(1), key(2)])
    assert [one.tobytes() for one in found] == [whole(record(1)), whole(record(2))]
    assert bytes_in(folder) == folder.nbytes == in_index(folder) == 2000


def test_what_is_written_while_one_looks_around_is_not_removed(folder, monkeypatch):
    files, written = Catalog.files.fget, []

    def read_and_write(catalog):
        found = files(catalog)
        if catalog is folder._catalog and not written:
            written.append(1)
            other = DiskFolder(folder.folder, 10**6)
            assert other.write([record(1)])
            other.close()
        return found

    monkeypatch.setattr(Catalog, "files", property(read_and_write))
    assert folder.write([record(2)])
    assert folder.read([key(1), key(2)]) is not None
    assert bytes_in(folder) == folder.nbytes == 2000


def test_an_index_begun_anew_is_found_by_who_had_the_old_one(folder, caplog):
    """Its file of number 1 is not theirs; what is in no index is removed."""
    folder.write([record(1)])
    other = begun_anew(folder)
    assert "begun anew" in caplog.text
    assert other.write([record(2)])
    assert folder.write([record(3)], behind=key(1))
    found = other.read([key(2), key(3)])
    assert [one.tobytes() for one in found] == [whole(record(2)), whole(record(3))]
    assert len(list(folder.folder.glob("*.kv"))) == 2
    assert bytes_in(folder) == folder.nbytes == other.nbytes == 2000
    other.close()


def test_two_that_make_room_leave_nothing_uncounted(tmp_path):
    """Each drops the other's files all the time."""
    folders = [DiskFolder(tmp_path / "kv", 20_000) for _ in range(2)]
    wrong = []

    def work(folder, start):
        for i in range(start, start + 60):
            folder.write([record(i, 3000)], behind=key(i - 1))
            found = folder.read([key(i)])
            if found is not None and found[0].tobytes() != whole(record(i, 3000)):
                wrong.append(i)
        folder.close()

    threads = [
        threading.Thread(target=work, args=(folder, 1000 * i))
        for i, folder in enumerate(folders)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    last = DiskFolder(tmp_path / "kv", 20_000)
    assert bytes_in(last) == last.nbytes == in_index(last)
    # Each may write what the other one does not see yet.
    assert 0 < last.nbytes <= 20_000 + 3000
    last.close()
