import pytest

from supy.events import Document, Event, EventSchema


def test_from_documents_is_sorted():
    events = [Event.make("b", [("z", 0, 1), ("a", 0, 1)]), Event.make("a", [("z", 0, 1)])]
    schema = EventSchema.from_documents([Document("x", events[:1]), Document("x", events)])
    assert schema.labels == (("a", "z"), ("b", "a"), ("b", "z"))
    assert schema.types == ("a", "b")
    assert [schema.label_id(*label) for label in schema.labels] == [0, 1, 2]
    assert len(schema) == 3


def test_order_is_kept():
    schema = EventSchema([("b", "x"), ("a", "x"), ("b", "a")])
    assert schema.types == ("b", "a")
    assert schema.label_id("b", "a") == 2 and schema.type_id("a") == 1
    assert EventSchema.from_json(schema.to_json()) == schema


def test_read(tmp_path):
    path = tmp_path / "schema.json"
    schema = EventSchema([("并购", "买方"), ("并购", "trigger")])
    path.write_text(schema.to_json(), encoding="utf-8")
    assert EventSchema.read(path) == schema


def test_read_duee(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(
        '{"event_type": "a-b", "role_list": [{"role": "x"}, {"role": "y"}], "id": "1"}\n\n'
        '{"event_type": "c", "role_list": []}\n'
    )
    expected = (("a-b", "trigger"), ("a-b", "x"), ("a-b", "y"), ("c", "trigger"))
    assert EventSchema.read(path).labels == expected


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "no labels"),
        (b"\xff", ":1: expected UTF-8"),
        (b'{"event_type": "a", "role_list": []}\n{"event_type": "b"}', "line 2"),
        (b'{"event_type": "a", "role_list": [3]}', "line 1"),
        (b'{"labels": {"a": "b"}}', 'expected {"labels"'),
        (b'{"labels": [["a", "b", "c"]]}', 'expected {"labels"'),
        (b'{"labels": [["a", 1]]}', "expected (type, role)"),
        (b'{"labels": [["a", "b"], ["a", "b"]]}', "twice"),
        (b'{"labels": [["a", "b"]', "line 1"),
    ],
)
def test_bad_files(tmp_path, content, expected):
    path = tmp_path / "schema.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        EventSchema.read(path)
    assert str(raised.value).startswith(str(path)) and expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_names():
    schema = EventSchema([(f"type{i:02}", "trigger") for i in range(20)])
    with pytest.raises(ValueError, match="event type 'x' is not one of type00, .*, type07 and 12"):
        schema.type_id("x")
    with pytest.raises(ValueError, match="event type 'x'"):
        schema.label_id("x", "trigger")
    with pytest.raises(ValueError, match="role 'y' of event type 'type00' is not one of trigger"):
        schema.label_id("type00", "y")
