import json
import logging

import pytest

from supy.events import (
    Argument,
    DataError,
    Document,
    Event,
    EventSchema,
    data_folder,
    event_to_json,
    generate_sample,
    read_duee,
    read_fewfc,
    write_fewfc,
)

TEXT = "甲公司收购乙公司。"
MENTIONS = [
    {"word": "甲公司", "span": [0, 3], "role": "buyer"},
    {"word": "收购", "span": [3, 5], "role": "trigger"},
]
RECORD = {"id": "1", "content": TEXT, "events": [{"type": "deal", "mentions": MENTIONS}]}
EVENT = Event("deal", (Argument("buyer", 0, 3), Argument("trigger", 3, 5)))

DUEE = {
    "text": TEXT,
    "id": "1",
    "event_list": [
        {
            "event_type": "deal",
            "trigger": "收购",
            "trigger_start_index": 3,
            "arguments": [
                {"argument": "甲公司", "role": "buyer", "argument_start_index": 0, "alias": []}
            ],
            "class": "business",
        }
    ],
}


def line(record, **changes):
    return json.dumps({**record, **changes}, ensure_ascii=False).encode() + b"\n"


def mention(**changes):
    return line(RECORD, events=[{"type": "deal", "mentions": [{**MENTIONS[0], **changes}]}])


def duee_event(**changes):
    return line(DUEE, event_list=[{**DUEE["event_list"][0], **changes}])


def duee_argument(**changes):
    return duee_event(arguments=[{**DUEE["event_list"][0]["arguments"][0], **changes}])


# Each case: a line, and what the report must say about it.
BAD_FEWFC = {
    "truncated": (line(RECORD)[:30] + b"\n", "expected a JSON object"),
    "not UTF-8": (TEXT.encode("gb18030") + b"\n", "expected UTF-8"),
    "not an object": (b"[1, 2]\n", "expected the record to be an object, got [1, 2]"),
    "deep nesting": (b"[" * 100_000 + b"\n", "expected a JSON object"),
    "half a surrogate": (b'{"content": "\\ud800", "events": []}\n', "surrogate"),
    "no content": (b'{"id": "1", "events": []}\n', 'expected a field "content"'),
    "no events": (line({"content": TEXT}), 'expected a field "events"'),
    "id a number": (line(RECORD, id=7), "expected id to be a string, got 7"),
    "events an object": (line(RECORD, events={}), "expected the record.events to be a list"),
    "event a string": (line(RECORD, events=["deal"]), "expected events[0] to be an object"),
    "no mentions": (line(RECORD, events=[{"type": "deal"}]), 'expected a field "mentions"'),
    "type a number": (line(RECORD, events=[{"type": 1, "mentions": []}]), "events[0].type"),
    "span of three": (mention(span=[0, 3, 4]), "span to be [start, end], got [0, 3, 4]"),
    "span of floats": (mention(span=[0.0, 3.0]), "to be an integer, got 0.0"),
    "span of booleans": (mention(span=[False, 3]), "to be an integer, got False"),
    "span past the end": (mention(span=[8, 11]), "inside the text of 9 characters"),
    "negative span": (mention(span=[-3, 3]), "inside the text"),
    "empty span": (mention(span=[3, 3], word=""), "inside the text"),
    "another word": (mention(span=[1, 4]), "to be '甲公司', got '公司收' at [1, 4]"),
    "unknown type": (line(RECORD, events=[{"type": "gift", "mentions": []}]), "'gift' is not one"),
    "unknown role": (mention(role="giver"), "role 'giver' of event type 'deal' is not one of"),
}

BAD_DUEE = {
    "truncated": (line(DUEE)[:13] + b"\n", "expected a JSON object"),
    "no text": (b'{"id": "1"}\n', 'expected a field "text"'),
    "events an object": (line(DUEE, event_list={}), "expected event_list to be a list"),
    "no trigger": (
        line(DUEE, event_list=[{"event_type": "deal", "arguments": []}]),
        'expected a field "trigger"',
    ),
    "trigger elsewhere": (duee_event(trigger_start_index=4), "got '购乙' at [4, 6]"),
    "trigger past the end": (duee_event(trigger_start_index=8), "inside the text"),
    "argument without start": (
        duee_event(arguments=[{"role": "buyer", "argument": "甲公司"}]),
        'expected a field "argument_start_index"',
    ),
    "argument elsewhere": (duee_argument(argument_start_index=2), "to be '甲公司'"),
    "unknown type": (duee_event(event_type="gift"), "'gift' is not one"),
    "unknown role": (duee_argument(role="giver"), "role 'giver'"),
}

SCHEMA = EventSchema([("deal", "buyer"), ("deal", "trigger")])


def test_fewfc(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(line(RECORD) + b"\n" + line({"content": "x", "events": []}))  # a blank line
    assert read_fewfc(path, schema=SCHEMA) == [Document(TEXT, [EVENT], "1"), Document("x")]


def test_fewfc_keeps_texts_and_repetitions(tmp_path):
    text = " a\t甲\u3000b  "
    repeated = [{"word": "甲", "span": [3, 4], "role": "buyer"}] * 2
    record = {"content": text, "events": [{"type": "deal", "mentions": repeated}] * 2}
    path = tmp_path / "data.json"
    path.write_bytes(b"\xef\xbb\xbf" + line(record))  # with a byte order mark
    (document,) = read_fewfc(path)
    assert document.text == text
    assert document.events == [Event("deal", (Argument("buyer", 3, 4),) * 2)] * 2


def test_duee(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(line(DUEE) + line({"text": TEXT, "id": "2"}))  # test files lack event_list
    schema_path = tmp_path / "schema.json"
    schema_path.write_text('{"event_type": "deal", "role_list": [{"role": "buyer"}]}\n')
    for schema in (None, SCHEMA, schema_path):
        first, second = read_duee(path, schema)
        assert first.text == TEXT and [Event.make(*e) for e in first.events] == [EVENT]
        assert second == Document(TEXT, [], "2")


@pytest.mark.parametrize(
    "read, good, bad, expected",
    [(read_fewfc, line(RECORD), *case) for case in BAD_FEWFC.values()]
    + [(read_duee, line(DUEE), *case) for case in BAD_DUEE.values()],
    ids=[f"fewfc {name}" for name in BAD_FEWFC] + [f"duee {name}" for name in BAD_DUEE],
)
def test_bad_record(tmp_path, caplog, read, good, bad, expected):
    path = tmp_path / "data.json"
    path.write_bytes(good + bad + good)
    with pytest.raises(DataError) as raised:
        read(path, schema=SCHEMA)
    (problem,) = raised.value.problems
    assert problem.startswith(f"{path}:2: ") and expected in problem
    assert problem in str(raised.value) and "\n" not in problem

    with caplog.at_level(logging.WARNING):
        documents = read(path, schema=SCHEMA, on_error="skip")
    assert len(documents) == 2
    assert [record.getMessage() for record in caplog.records] == [f"{problem} (record left out)"]


def test_many_bad_records_are_counted(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b"{\n" * 12)
    with pytest.raises(DataError) as raised:
        read_fewfc(path)
    assert len(raised.value.problems) == 12
    assert str(raised.value).endswith("(and 11 more bad records)")
    with pytest.raises(DataError):  # nothing is left
        read_fewfc(path, on_error="skip")


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["no bytes", "blank lines"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    for on_error in ("raise", "skip"):
        with pytest.raises(DataError, match="found none"):
            read_fewfc(path, on_error=on_error)


def test_on_error_is_checked(tmp_path):
    with pytest.raises(ValueError, match="on_error is 'ignore'"):
        read_fewfc(tmp_path / "none.json", on_error="ignore")


def test_write_then_read(tmp_path):
    documents = generate_sample(50)
    write_fewfc(tmp_path / "data.json", documents)
    assert read_fewfc(tmp_path / "data.json") == documents


def test_failed_write_leaves_the_file(tmp_path):
    path = tmp_path / "data.json"
    write_fewfc(path, [Document(TEXT, [EVENT])])
    before = path.read_bytes()

    def broken():
        yield Document("x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_fewfc(path, broken())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_event_to_json_is_in_the_order_of_the_text():
    event = Event.make("deal", [("trigger", 3, 5), ("a target", 5, 8), ("buyer", 0, 3)])
    assert json.loads(json.dumps(event_to_json(event, TEXT))) == {
        "type": "deal",
        "arguments": [
            {"role": "buyer", "text": "甲公司", "start": 0, "end": 3},
            {"role": "trigger", "text": "收购", "start": 3, "end": 5},
            {"role": "a target", "text": "乙公司", "start": 5, "end": 8},
        ],
    }


def test_data_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SUPY_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("SUPY_DATA", "")
    assert data_folder() is None
    assert not caplog.records
    monkeypatch.setenv("SUPY_DATA", str(tmp_path / "none"))
    assert data_folder() is None
    assert "not a folder" in caplog.text
