import pytest
from hypothesis import given
from hypothesis import strategies as st

from supy.events import (
    Argument,
    Document,
    Event,
    EventSchema,
    encode,
    merge_windows,
    split_document,
    split_windows,
)

SCHEMA = EventSchema([("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")])


def rows(tensor):
    return [tuple(row) for row in tensor.tolist()]


def test_encode_pairs_are_unordered():
    # y stands before x; typed links carry the type's place, untyped ones 0.
    event = Event.make("b", [("x", 7, 9), ("y", 1, 4)])
    documents = [Document("0123456789"), Document("0123456789", [event])]
    for typed, head in ((False, 0), (True, 1)):
        labels = encode(documents, SCHEMA, typed=typed)
        assert rows(labels.spans) == [(1, 2, 7, 8), (1, 3, 1, 3)]
        assert rows(labels.head_links) == [(1, head, 1, 7)]
        assert rows(labels.tail_links) == [(1, head, 3, 8)]
        assert labels.dropped == []


def test_encode_nested_spans_sort_heads_and_tails_apart():
    labels = encode([Document("0123456789", [Event.make("a", [("x", 0, 9), ("y", 2, 5)])])], SCHEMA)
    assert rows(labels.head_links) == [(0, 0, 0, 2)]
    assert rows(labels.tail_links) == [(0, 0, 4, 8)]


def test_encode_two_roles_on_one_span_give_the_diagonal():
    labels = encode([Document("0123", [Event.make("a", [("x", 1, 3), ("y", 1, 3)])])], SCHEMA)
    assert rows(labels.spans) == [(0, 0, 1, 2), (0, 1, 1, 2)]
    assert rows(labels.head_links) == [(0, 0, 1, 1)]
    assert rows(labels.tail_links) == [(0, 0, 2, 2)]


def test_encode_drops_repetitions():
    event = Event("a", (Argument("x", 0, 1), Argument("x", 0, 1), Argument("y", 2, 3)))
    once = encode([Document("0123", [Event.make(*event)])], SCHEMA)
    twice = encode([Document("0123", [event, event])], SCHEMA)
    for one, two in zip(once[:3], twice[:3], strict=True):
        assert rows(one) == rows(two)
    # A repeated argument is one node and has no link to itself.
    assert rows(twice.head_links) == [(0, 0, 0, 2)]


def test_encode_nothing():
    for documents in ([], [Document("")], [Document("x", [Event("a", ())])]):
        labels = encode(documents, SCHEMA)
        assert labels.spans.shape == labels.head_links.shape == labels.tail_links.shape == (0, 4)


def test_encode_tokens():
    # [CLS] "ab" "cd" "e"; "e" in two tokens, as byte tokenizers do; [SEP]; "fg" beyond the window.
    offsets = [[(0, 0), (0, 2), (2, 4), (4, 5), (4, 5), (0, 0)]]
    arguments = [("x", 0, 4), ("y", 4, 5), ("x", 1, 4), ("x", 2, 3), ("y", 5, 7), ("x", 4, 9)]
    event = Event.make("a", arguments)
    labels = encode([Document("abcdefg", [event])], SCHEMA, offsets)
    assert rows(labels.spans) == [(0, 0, 1, 2), (0, 1, 3, 4)]
    assert rows(labels.head_links) == [(0, 0, 1, 3)]
    assert rows(labels.tail_links) == [(0, 0, 2, 4)]
    assert all(document == 0 and of == event for document, of, _, _ in labels.dropped)
    assert {tuple(argument): reason for _, _, argument, reason in labels.dropped} == {
        ("x", 1, 4): "not on token boundaries",
        ("x", 2, 3): "not on token boundaries",
        ("y", 5, 7): "outside the tokens",
        ("x", 4, 9): "outside the tokens",
    }


def test_encode_reports_what_lies_outside_the_text():
    labels = encode([Document("abc", [Event.make("a", [("x", 1, 9)])])], SCHEMA)
    assert [dropped.reason for dropped in labels.dropped] == ["outside the tokens"]


def test_encode_unknown_role_and_wrong_offsets():
    with pytest.raises(ValueError, match="role 'z'"):
        encode([Document("abc", [Event.make("a", [("z", 0, 1)])])], SCHEMA)
    with pytest.raises(ValueError, match="offsets has 2 entries, expected 1"):
        encode([Document("abc")], SCHEMA, [[], []])


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 19))
def test_windows_cover(length, size, overlap):
    if overlap >= size:
        with pytest.raises(ValueError, match="overlap"):
            split_windows(length, size, overlap)
        return
    windows = split_windows(length, size, overlap)
    assert windows[0][0] == 0 and windows[-1][1] == length
    assert all(stop - start == min(size, length) for start, stop in windows)
    for (start, stop), (following, _) in zip(windows, windows[1:], strict=False):
        assert start < following <= stop - overlap


def test_split_document():
    inside = Event.make("a", [("x", 4, 5), ("y", 5, 6)])  # in both windows
    first = Event.make("a", [("x", 0, 2)])
    across = Event.make("b", [("x", 0, 2), ("y", 8, 9)])  # in neither as a whole
    cut = Event.make("b", [("x", 0, 9)])  # one argument in neither
    windows = [(0, 6), (4, 10)]
    pieces = split_document(Document("0123456789", [inside, first, across, cut, across]), windows)
    assert [piece.text for piece in pieces.documents] == ["012345", "456789"]
    assert pieces.documents[0].events == [inside, first, Event.make("b", [("x", 0, 2)])]
    assert pieces.documents[1].events == [
        Event.make("a", [("x", 0, 1), ("y", 1, 2)]),
        Event.make("b", [("y", 4, 5)]),
    ]
    assert pieces.starts == [0, 4]
    assert pieces.split == [across, cut]
    assert pieces.dropped == [(cut, Argument("x", 0, 9))]


def test_merge_windows():
    windows = [(0, 6), (4, 10), (8, 14)]
    events = [
        [Event.make("a", [("x", 4, 5), ("y", 5, 6)]), Event.make("a", [("x", 5, 6)])],
        [
            Event.make("a", [("x", 0, 1), ("y", 1, 2)]),  # as found in the first window
            Event.make("a", [("x", 1, 2), ("y", 3, 4)]),  # has more than the first window's second
            Event.make("b", [("x", 1, 2)]),  # another type
        ],
        [],
    ]
    assert merge_windows(events, windows) == [
        Event.make("a", [("x", 4, 5), ("y", 5, 6)]),
        Event.make("a", [("x", 5, 6), ("y", 7, 8)]),
        Event.make("b", [("x", 5, 6)]),
    ]


def test_merge_keeps_subsets_of_one_window():
    small, large = Event.make("a", [("x", 0, 1)]), Event.make("a", [("x", 0, 1), ("y", 1, 2)])
    assert merge_windows([[small, large]], [(0, 4)]) == [small, large]


ARGUMENTS = st.builds(
    lambda role, start, length: Argument(role, start, min(start + length, 30)),
    st.sampled_from("xy"),
    st.integers(0, 29),
    st.integers(1, 6),
)
EVENTS = st.builds(Event.make, st.sampled_from("ab"), st.lists(ARGUMENTS, min_size=1, max_size=4))


@given(st.lists(EVENTS, max_size=5), st.integers(6, 40), st.integers(0, 5))
def test_split_then_merge_finds_what_fits(events, size, overlap):
    # Events that some window holds whole come back, unless they are part of a larger one.
    windows = split_windows(30, size, overlap)
    pieces = split_document(Document("x" * 30, events), windows)
    merged = merge_windows([piece.events for piece in pieces.documents], windows)
    assert merged == sorted(set(merged))
    for event in set(events) - set(pieces.split):
        assert any(
            other.type == event.type and set(event.arguments) <= set(other.arguments)
            for other in merged
        )
    arguments = {(event.type, argument) for event in events for argument in event.arguments}
    lost = {(event.type, argument) for event, argument in pieces.dropped}
    found = {(event.type, argument) for event in merged for argument in event.arguments}
    assert found <= arguments <= found | lost
