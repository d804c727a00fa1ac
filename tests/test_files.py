"""Atomic files, the journal, and the folder of a run."""

import json
import os
import stat

import hypothesis
import pytest
from hypothesis import strategies

from experiments.lab import files
from experiments.lab.files import (
    append_record,
    claim_directory,
    locked,
    read_records,
    write_atomically,
    write_json,
    write_records,
)

RECORDS = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-300, "note": "naïve\nline"}]


class TestAtomicWrite:
    def test_makes_folders_and_a_file_that_all_may_read(self, tmp_path):
        path = tmp_path / "a" / "b" / "value.json"
        write_json(path, {"x": [1, None]})
        assert json.loads(path.read_text()) == {"x": [1, None]}
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert os.listdir(path.parent) == ["value.json"]

    def test_gives_the_writer_a_path_of_the_same_suffix_and_folder(self, tmp_path):
        seen = []

        def write(target):
            seen.append(target)
            target.write_text("x")

        write_atomically(tmp_path / "figure.png", write)
        assert seen[0].suffix == ".png"
        assert seen[0].parent == tmp_path

    @pytest.mark.parametrize("before", [None, "old"])
    def test_that_fails_leaves_what_was_there(self, tmp_path, before):
        path = tmp_path / "value.txt"
        if before:
            path.write_text(before)

        def write(target):
            target.write_text("half")
            raise RuntimeError("disk full")

        with pytest.raises(RuntimeError, match="disk full"):
            write_atomically(path, write)
        assert os.listdir(tmp_path) == (["value.txt"] if before else [])
        assert not before or path.read_text() == before

    def test_of_a_value_without_json_leaves_nothing(self, tmp_path):
        with pytest.raises(TypeError):
            write_json(tmp_path / "value.json", {"x": object()})
        with pytest.raises(TypeError):
            write_records(tmp_path / "results.jsonl", [{"x": 1}, {"x": object()}])
        assert os.listdir(tmp_path) == []


class TestJournal:
    def test_gives_back_what_was_appended(self, tmp_path):
        path = tmp_path / "new" / "results.jsonl"
        assert read_records(path) == []
        for count, record in enumerate(RECORDS, start=1):
            append_record(path, record)
            assert read_records(path) == RECORDS[:count]
        assert path.read_text().count("\n") == len(RECORDS)

    def test_is_replaced_as_a_whole(self, tmp_path):
        path = tmp_path / "results.jsonl"
        write_records(path, RECORDS)
        write_records(path, RECORDS[1:])
        assert read_records(path) == RECORDS[1:]
        write_records(path, [])
        assert read_records(path) == []

    @hypothesis.given(cut=strategies.integers(0, 200))
    @hypothesis.settings(
        max_examples=30,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    def test_survives_a_cut_at_any_byte(self, tmp_path, cut):
        path = tmp_path / "results.jsonl"
        write_records(path, RECORDS)
        content = path.read_bytes()[:cut]
        path.write_bytes(content)
        whole = content.count(b"\n") + content.endswith(b"}")  # its newline alone is missing
        assert read_records(path) == RECORDS[:whole]
        append_record(path, {"epoch": 3})
        assert read_records(path) == [*RECORDS[:whole], {"epoch": 3}]

    @pytest.mark.parametrize("whole", [0, 1, 4095, 4096, 4097, 9000])
    @pytest.mark.parametrize("torn", [0, 1, 4095, 4096, 4097, 9000])
    def test_finds_its_last_line_however_long_the_lines_are(self, tmp_path, whole, torn):
        path = tmp_path / "results.jsonl"
        line = json.dumps({"text": "x" * whole}) + "\n"
        path.write_text(line * 2 + ("{" + "y" * torn)[:torn])
        append_record(path, {"epoch": 3})
        assert path.read_text() == line * 2 + '{"epoch": 3}\n'
        path.write_text(("{" + "y" * torn)[:torn])
        append_record(path, {"epoch": 3})
        assert path.read_text() == '{"epoch": 3}\n'

    def test_that_is_replaced_by_itself_is_left_alone(self, tmp_path):
        path = tmp_path / "results.jsonl"
        write_records(path, RECORDS)
        file = path.stat().st_ino
        write_records(path, read_records(path))
        assert path.stat().st_ino == file
        path.write_bytes(path.read_bytes() + b"{torn")
        write_records(path, RECORDS)
        assert path.stat().st_ino != file
        assert path.read_text() == "".join(json.dumps(record) + "\n" for record in RECORDS)

    def test_drops_a_torn_character(self, tmp_path):
        path = tmp_path / "results.jsonl"
        path.write_bytes(b'{"a": 1}\n{"b": "\xc3')  # half of a UTF-8 character
        assert read_records(path) == [{"a": 1}]

    def test_leaves_the_journal_alone_when_the_record_is_not_json(self, tmp_path):
        path = tmp_path / "results.jsonl"
        write_records(path, RECORDS)
        with pytest.raises(TypeError):
            append_record(path, {"x": object()})
        assert read_records(path) == RECORDS

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{", "is not JSON: "),
            (b"", "is not JSON: "),
            (b'"\xff"', "is not JSON: "),
            (b"[1]", "is not a JSON object"),
        ],
    )
    def test_numbers_a_bad_line(self, tmp_path, line, message):
        path = tmp_path / "results.jsonl"
        path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
        with pytest.raises(ValueError, match=f"results.jsonl line 2 {message}.*; remove the line"):
            read_records(path)

    @pytest.mark.parametrize("tail", [b"\0\0\0", b'{"a": 1', b'{"a": "\0\0'])
    def test_cuts_off_what_a_kill_or_a_lost_block_leaves(self, tmp_path, tail):
        path = tmp_path / "results.jsonl"
        path.write_bytes(b'{"a": 1}\n' + tail)
        append_record(path, {"a": 2})
        assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'

    @pytest.mark.parametrize(
        "content", [b"a text of mine", b'{"a": 1}\r{"a": 2}\r', b'{"a": 1}\n\x89PNG', b"[1, 2]"]
    )
    def test_does_not_touch_what_is_not_ours(self, tmp_path, content):
        path = tmp_path / "mine.txt"
        path.write_bytes(content)
        for use in (read_records, lambda path: append_record(path, {"a": 3})):
            with pytest.raises(ValueError, match="mine.txt is not a journal of ours: it ends in"):
                use(path)
        assert path.read_bytes() == content


NOT_JSON = {
    "nested": b'{"a":' * 100_000,
    "nested, and closed": b'{"a":' * 200 + b"1" + b"}" * 200,
    "Latin-1": '{"a": "é"}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a list": b"[1]",
}


@pytest.mark.parametrize("case", NOT_JSON)
@pytest.mark.parametrize("use", ["journal", "config"])
def test_what_is_not_json_is_named(tmp_path, case, use):
    path = tmp_path / ("results.jsonl" if use == "journal" else "config.json")
    path.write_bytes(NOT_JSON[case] + b"\n")
    with pytest.raises(ValueError, match=f"{path}( line 1)? is (not (JSON|a JSON)|nested)"):
        read_records(path) if use == "journal" else claim_directory(tmp_path, CONFIG)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
@pytest.mark.parametrize("use", ["read", "append", "lock", "config"])
def test_nothing_waits_for_a_file_that_is_not_one(tmp_path, kind, use):
    names = {"read": "j", "append": "j", "lock": "j.lock", "config": "config.json"}
    path = tmp_path / names[use]
    make = {"a pipe": os.mkfifo, "a device": lambda path: path.symlink_to("/dev/full"),
            "a folder": os.mkdir}  # fmt: skip
    make[kind](path)
    uses = {
        "read": lambda: read_records(path),
        "append": lambda: append_record(path, {}),
        "lock": lambda: locked(tmp_path / "j").__enter__(),
        "config": lambda: claim_directory(tmp_path, CONFIG),
    }
    with pytest.raises(
        (ValueError, OSError), match="is not a regular file|Is a directory"
    ) as error:
        uses[use]()
    assert str(path) in str(error.value)


def test_a_file_of_any_size_is_read_to_a_bound(tmp_path):
    path = tmp_path / "results.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(ValueError, match="results.jsonl holds more than the 1000 bytes"):
        files.read_bytes(path, 1000)


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077])
def test_files_are_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        append_record(tmp_path / "a.jsonl", {})
        write_records(tmp_path / "b.jsonl", [{}])
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_what_a_killed_writer_left_is_removed(tmp_path):
    seen = []

    def write(target):
        seen.append(target.name)
        target.write_text("half")

    write_atomically(tmp_path / "figure.png", write)
    for name in (seen[0], ".mine-and-short.tmp"):
        (tmp_path / name).touch()
    claim_directory(tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == [".mine-and-short.tmp", "config.json", "figure.png"]


def test_names_that_are_not_utf_8_are_written_escaped(tmp_path):
    files.write_text(tmp_path / "page.html", "run-\udcff")
    assert (tmp_path / "page.html").read_text() == "run-\\udcff"


CONFIG = {"dataset": "digits", "depths": (2, 4), "rate": 0.1}


class TestClaimDirectory:
    def test_writes_the_config_and_accepts_the_same_run_again(self, tmp_path):
        workdir = tmp_path / "runs" / "one"
        assert claim_directory(workdir, CONFIG) == workdir
        written = (workdir / "config.json").read_text()
        assert json.loads(written) == {"dataset": "digits", "depths": [2, 4], "rate": 0.1}
        assert claim_directory(str(workdir), CONFIG) == workdir
        assert (workdir / "config.json").read_text() == written

    def test_names_the_settings_that_differ(self, tmp_path):
        claim_directory(tmp_path, CONFIG)
        other = {"dataset": "digits", "depths": [2, 4], "rate": 0.2, "seed": 1}
        with pytest.raises(
            ValueError, match=r"rate=0\.1 \(now 0\.2\), seed=None \(now 1\)"
        ) as caught:
            claim_directory(tmp_path, other)
        assert str(tmp_path) in str(caught.value)
        assert "dataset" not in str(caught.value)
        assert "depths" not in str(caught.value)

    def test_names_a_setting_that_is_gone(self, tmp_path):
        claim_directory(tmp_path, CONFIG)
        with pytest.raises(ValueError, match=r"rate=0\.1 \(now None\)"):
            claim_directory(tmp_path, {"dataset": "digits", "depths": [2, 4]})

    def test_lets_extensible_settings_change_and_writes_the_new_ones(self, tmp_path):
        claim_directory(tmp_path, CONFIG)
        extended = CONFIG | {"depths": (2, 4, 6), "rules": ["none"]}
        claim_directory(tmp_path, extended, extensible=("depths", "rules"))
        assert json.loads((tmp_path / "config.json").read_text())["depths"] == [2, 4, 6]
        with pytest.raises(ValueError, match=r"rate=0\.1 \(now 3\); choose"):
            claim_directory(tmp_path, extended | {"rate": 3, "depths": []}, extensible=("depths",))
        assert json.loads((tmp_path / "config.json").read_text())["rate"] == 0.1

    def test_names_a_damaged_config(self, tmp_path):
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="config.json is not JSON: .*; remove it, if"):
            claim_directory(tmp_path, CONFIG)


def test_numbers_that_are_not_finite_are_written_as_strict_json(tmp_path):
    journal = tmp_path / "results.jsonl"
    append_record(journal, {"loss": float("nan"), "rate": float("inf"), "epoch": 1})
    assert journal.read_text() == '{"loss": null, "rate": null, "epoch": 1}\n'
    assert read_records(journal) == [{"loss": None, "rate": None, "epoch": 1}]


def test_numbers_that_are_not_finite_are_null_at_any_depth(tmp_path):
    record = {"curve": [1.0, float("nan")], "best": {"rate": (float("-inf"), {"x": float("inf")})}}
    line = '{"curve": [1.0, null], "best": {"rate": [null, {"x": null}]}}\n'
    append_record(tmp_path / "appended.jsonl", record)
    write_records(tmp_path / "written.jsonl", [record])
    assert (tmp_path / "appended.jsonl").read_text() == line
    assert (tmp_path / "written.jsonl").read_text() == line
    assert record["best"]["rate"][1] == {"x": float("inf")}  # the caller's own is left alone
