"""A long work stopped at any byte goes on and ends with the same bytes; one of other settings is refused."""
import json
import os

import pytest

from minivl import InputError
from weights_tools.files import held_file
from weights_tools.mpo.begun import digest_of_checkpoint, write_begun

JOB = {"--seed": 1, "questions": "ab"}
ROWS = [{"row": i, "text": "é" * i} for i in range(7)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


class Stopped(Exception):
    pass


def make(asked, stop=None):
    """What gives the rows, notes from where on, and stops the process, as it were, before one of them."""
    def rows(first):
        asked.append(first)
        for i in range(first, len(ROWS)):
            if i == stop:
                raise Stopped
            yield ROWS[i]
    return rows


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "out.jsonl"


def begun(out):
    return out.with_name(".begun-out.jsonl")


def test_written_whole_and_once(out):
    assert write_begun(out, JOB, make([])) == (7, 7)
    assert out.read_bytes() == LINES and os.listdir(out.parent) == ["out.jsonl"]
    with pytest.raises(InputError, match=r"out.jsonl is there already, whole; choose another"):
        write_begun(out, JOB, make([]))


@pytest.mark.parametrize("group", [1, 3])
def test_stopped_at_any_byte(out, group):
    with pytest.raises(Stopped):
        write_begun(out, JOB, make([], stop=6), group=group)
    there = begun(out).read_bytes()
    header = there.index(b"\n") + 1
    assert there[header:] == b"".join(LINES.splitlines(keepends=True)[:6]) and not out.exists()
    for size in range(group // 2, len(there) + 1, 2):
        asked = []
        begun(out).write_bytes(there[:size])
        assert write_begun(out, JOB, make(asked), group=group) == (7, 7)
        assert asked == [there[header:size].count(b"\n") // group * group]
        assert out.read_bytes() == LINES and os.listdir(out.parent) == ["out.jsonl"]
        out.unlink()


def test_killed_between_the_two_files(out):
    """OUT is there, whole, and the other file not yet gone."""
    header = json.dumps(JOB).encode() + b"\n"
    out.parent.mkdir()
    out.write_bytes(LINES)
    begun(out).write_bytes(header + LINES)
    assert write_begun(out, JOB, make([]), group=7) == (7, 7)
    assert out.read_bytes() == LINES and not begun(out).exists()


def test_rows_left_out_are_made_once(out):
    even = lambda row: row["row"] % 2 == 0
    with pytest.raises(Stopped):
        write_begun(out, JOB, make([], stop=5), keep=even)
    asked = []
    assert write_begun(out, JOB, make(asked), keep=even) == (7, 4)
    assert asked == [5] and [json.loads(line)["row"] for line in out.read_text().splitlines()] == [0, 2, 4, 6]


def test_another_work_is_refused(out):
    with pytest.raises(Stopped):
        write_begun(out, JOB, make([], stop=2))
    there = begun(out).read_bytes()
    for other, said in (({**JOB, "--seed": 2}, "--seed 1 there and 2 here;"), ({"--seed": 1}, "questions ab there and"),
                        ({**JOB, "--seed": 2, "-n": 3}, "--seed 1 there and 2 here, -n None there and 3 here;")):
        with pytest.raises(InputError, match=rf"begun-out.jsonl holds 2 rows of another work: {said}.*delete this one"):
            write_begun(out, other, make([]))
        assert begun(out).read_bytes() == there
    begun(out).write_bytes(b"no JSON\n" + LINES)
    with pytest.raises(InputError, match="holds 7 rows of another work: --seed None there"):
        write_begun(out, JOB, make([]))


def test_what_holds_no_rows_binds_nobody(out):
    with pytest.raises(Stopped):
        write_begun(out, {"--seed": 2}, make([], stop=0))
    assert begun(out).exists()
    assert write_begun(out, JOB, make([])) == (7, 7)
    assert out.read_bytes() == LINES


def test_wrong_input_leaves_what_was_made(out):
    def wrong(first):
        if first < 2:
            yield from ROWS[:2]
        raise InputError("row 3 is wrong")
    with pytest.raises(InputError, match="row 3"):
        write_begun(out, JOB, lambda first: wrong(first) if first else wrong(2))
    assert os.listdir(out.parent) == []
    with pytest.raises(InputError, match="row 3"):
        write_begun(out, JOB, wrong)
    assert begun(out).read_bytes().count(b"\n") == 3
    assert write_begun(out, JOB, make([])) == (7, 7)


def test_one_process_at_a_time(out):
    pytest.importorskip("fcntl")
    with held_file(begun(out)) as file:
        file.write(b"mine")
        file.flush()
        with pytest.raises(InputError, match="another process works on .*begun-out.jsonl; wait"):
            write_begun(out, JOB, make([]))
    assert begun(out).read_bytes() == b"mine"


def test_other_commands_know_it(tmp_path):
    with pytest.raises(InputError, match=r"out.json must end in .jsonl"):
        write_begun(tmp_path / "out.json", JOB, make([]))


def test_a_checkpoint_is_known(copy):
    first = digest_of_checkpoint(copy)
    assert first == digest_of_checkpoint(copy) and len(first) == 16
    config = (copy / "config.json").read_bytes()
    (copy / "config.json").write_bytes(config + b"\n")
    changed = digest_of_checkpoint(copy)
    weights = next(copy.glob("model*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert len({first, changed, digest_of_checkpoint(copy)}) == 3
