import logging
from itertools import combinations

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supy.events import (
    Document,
    Event,
    EventSchema,
    data_folder,
    decode,
    decode_batch,
    encode,
    evaluate,
    generate_sample,
    read_fewfc,
)

SCHEMA = EventSchema([("b", "y"), ("a", "x"), ("a", "trigger"), ("b", "trigger"), ("a", "w")])
X, W, TRIGGER = (SCHEMA.label_id("a", role) for role in ("x", "w", "trigger"))
Y = SCHEMA.label_id("b", "y")

fewfc = pytest.mark.skipif(
    data_folder() is None, reason="needs FewFC: set SUPY_DATA to the folder that holds events/fewfc"
)


def a(*arguments):
    return Event.make("a", arguments)


def decode_events(events, **options):
    """Encode the events of one document of characters, and decode the labels."""
    documents = [Document("." * 100, events)]
    labels = encode(documents, SCHEMA, typed=options.get("typed", False))
    return decode_batch(*labels[:3], SCHEMA, 1, **options)[0]


def oracle(spans, head_links, tail_links, schema, num_documents, typed):
    """The rule of the method in plain Python; cliques by networkx."""
    heads = {tuple(row) for row in head_links}
    tails = {tuple(row) for row in tail_links}
    found = [[] for _ in range(num_documents)]
    for document in range(num_documents):
        for number, type in enumerate(schema.types):
            graph = nx.Graph()
            for of, label, start, end in spans:
                if of == document and schema.labels[label][0] == type:
                    graph.add_node((schema.labels[label][1], start, end))
            link = number if typed else 0
            for (r1, h1, t1), (r2, h2, t2) in combinations(graph.nodes, 2):
                if (document, link, *sorted((h1, h2))) in heads and (
                    document,
                    link,
                    *sorted((t1, t2)),
                ) in tails:
                    graph.add_edge((r1, h1, t1), (r2, h2, t2))
            for clique in nx.find_cliques(graph):
                arguments = [(role, start, end + 1) for role, start, end in clique]
                found[document].append(Event.make(type, arguments))
        found[document].sort()
    return found


def pairs(size):
    return st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).map(sorted)


@st.composite
def tables(draw, documents=3, positions=5):
    """Spans and links on few positions, so that roles share spans and links share ends."""
    typed = draw(st.booleans())
    heads = len(SCHEMA.types) if typed else 1

    def rows(numbers, most):
        document, number = st.integers(0, documents - 1), st.integers(0, numbers - 1)
        found = draw(st.lists(st.tuples(document, number, pairs(positions)), max_size=most))
        return [(d, n, *pair) for d, n, pair in found]

    return rows(len(SCHEMA), 20), rows(heads, 40), rows(heads, 40), typed


@given(tables())
def test_decode_equals_the_oracle(case):
    spans, head_links, tail_links, typed = case
    decoded = decode_batch(spans, head_links, tail_links, SCHEMA, 3, typed=typed)
    assert decoded == oracle(spans, head_links, tail_links, SCHEMA, 3, typed)
    for document in range(3):
        alone = [
            [row[1:] for row in table if row[0] == document]
            for table in (spans, head_links, tail_links)
        ]
        assert decode(alone[0], alone[1:], SCHEMA, typed=typed) == decoded[document]


SPANS = st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 5))
EVENTS = st.lists(
    st.builds(
        lambda type, spans: Event.make(
            type, [("trigger" if role else "xy"[type == "b"], s, s + n) for role, s, n in spans]
        ),
        st.sampled_from("ab"),
        st.lists(SPANS, min_size=1, max_size=4),
    ),
    max_size=4,
)


@given(EVENTS, st.booleans())
def test_gold_arguments_come_back(events, typed):
    # Decoding may join and split events, but neither invents nor loses an argument, and each gold
    # event lies within a decoded one.
    decoded = decode_events(events, typed=typed)
    score = evaluate([events], [decoded]).argument
    assert score.tp == score.predicted == score.gold
    for event in events:
        assert any(
            event.type == found.type and set(event.arguments) <= set(found.arguments)
            for found in decoded
        )


def test_two_roles_on_one_span_are_two_nodes():
    # The published search returned [A, B, B, T] as well here.
    events = [
        a(("trigger", 0, 2), ("x", 4, 6), ("w", 4, 6)),
        a(("trigger", 0, 2), ("x", 8, 9)),
    ]
    assert decode_events(events) == sorted(events)


def test_two_roles_on_one_span_need_the_diagonal():
    spans = [(X, 4, 5), (W, 4, 5), (TRIGGER, 0, 1)]
    links = [(0, 0, 4)], [(0, 1, 5)]
    assert decode(spans, links, SCHEMA) == [
        a(("trigger", 0, 2), ("w", 4, 6)),
        a(("trigger", 0, 2), ("x", 4, 6)),
    ]
    links = [(0, 0, 4), (0, 4, 4)], [(0, 1, 5), (0, 5, 5)]
    assert decode(spans, links, SCHEMA) == [a(("trigger", 0, 2), ("w", 4, 6), ("x", 4, 6))]
    links = [(0, 0, 4), (0, 4, 4)], [(0, 1, 5)]  # the head's diagonal alone
    assert len(decode(spans, links, SCHEMA)) == 2


def test_typed_links_keep_types_apart():
    # Untyped, the event of type b links the two arguments of type a that are in no event together.
    events = [
        a(("x", 0, 1), ("trigger", 2, 3)),
        a(("w", 4, 5), ("trigger", 2, 3)),
        Event.make("b", [("y", 0, 1), ("trigger", 4, 5)]),
    ]
    assert decode_events(events, typed=True) == sorted(events)
    assert decode_events(events)[0] == a(("x", 0, 1), ("trigger", 2, 3), ("w", 4, 5))


def test_require_trigger():
    with_trigger, without = a(("trigger", 0, 2), ("x", 4, 6)), a(("w", 8, 9))
    assert decode_events([with_trigger, without]) == [with_trigger, without]
    assert decode_events([with_trigger, without], require_trigger=True) == [with_trigger]


def test_drop_subsets():
    # The two triggers are not linked; without them the first event's arguments are the second's.
    small, large = a(("trigger", 0, 1), ("x", 4, 6)), a(("trigger", 2, 3), ("x", 4, 6), ("w", 8, 9))
    other_type = Event.make("b", [("y", 4, 6)])
    assert decode_events([small, large, other_type]) == [small, large, other_type]
    assert decode_events([small, large, other_type], drop_subsets=True) == [large, other_type]
    # Of equals one stays.
    twins = [a(("trigger", 0, 1), ("x", 4, 6)), a(("trigger", 2, 3), ("x", 4, 6))]
    assert decode_events(twins, drop_subsets=True) == twins[:1]


def test_token_offsets():
    offsets = [(0, 0), (0, 2), (2, 5), (5, 6), (0, 0)]
    spans = [(X, 1, 2), (TRIGGER, 3, 3)]
    links = [(0, 1, 3)], [(0, 2, 3)]
    event = a(("x", 0, 5), ("trigger", 5, 6))
    assert decode(spans, links, SCHEMA, offsets=offsets) == [event]
    # Tokens without characters begin and end nothing.
    odd = [(X, 0, 2), (X, 3, 4), (X, 0, 4)]
    assert decode(spans + odd, links, SCHEMA, offsets=offsets) == [event]
    with pytest.raises(ValueError, match="token 5 of document 0 with 5 tokens"):
        decode([(X, 1, 5)], ([], []), SCHEMA, offsets=offsets)


def test_tokens_that_share_a_character_do_not_repeat_an_argument():
    offsets = [(0, 1), (1, 2), (1, 2)]  # two byte tokens of one character
    spans = [(TRIGGER, 0, 0), (X, 1, 1), (X, 1, 2)]
    event = a(("trigger", 0, 1), ("x", 1, 2))
    every = [(0, i, j) for i in range(3) for j in range(i, 3)]
    for links in ((every, every), ([(0, 0, 1)], [(0, 0, 1), (0, 0, 2)])):  # one event, then twins
        assert decode(spans, links, SCHEMA, offsets=offsets) == [event]


def test_encode_then_decode_with_tokens():
    text = "0123456789"
    offsets = [[(0, 0), (0, 3), (3, 4), (4, 4), (4, 8), (8, 10), (0, 0)]] * 2
    events = [a(("x", 0, 4), ("trigger", 8, 10)), Event.make("b", [("y", 3, 8)])]
    documents = [Document(text, events), Document(text, events[:1])]
    labels = encode(documents, SCHEMA, offsets)
    decoded = decode_batch(*labels[:3], SCHEMA, 2, offsets=offsets)
    assert decoded == [document.events for document in documents]


def test_kinds_of_tables():
    spans, links = [(X, 4, 5), (TRIGGER, 0, 1)], ([(0, 0, 4)], [(0, 1, 5)])
    expected = [a(("trigger", 0, 2), ("x", 4, 6))]
    for kind in (torch.tensor, np.array, lambda rows: torch.tensor(rows, dtype=torch.int32)):
        assert decode(kind(spans), [kind(table) for table in links], SCHEMA) == expected
    wide = torch.tensor([(9, X, 9, 4, 9, 5), (9, TRIGGER, 9, 0, 9, 1)])[:, 1::2]  # not contiguous
    assert decode(wide, links, SCHEMA) == expected


def test_nothing():
    assert decode([], ([], []), SCHEMA) == []
    assert decode_batch([], [], [], SCHEMA, 0) == []
    assert decode_batch([], [(1, 0, 2, 3)], [], SCHEMA, 2) == [[], []]
    empty = torch.empty(0, 4, dtype=torch.int64)
    assert decode_batch(empty, empty, empty, SCHEMA, 2) == [[], []]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"spans": [(0, 0, 1)]}, ValueError, r"spans has shape \[1, 3\], expected \[N, 4\]"),
        ({"spans": [0, 0, 1, 2]}, ValueError, r"spans has shape \[4\]"),
        ({"spans": torch.zeros(1, 4)}, TypeError, "spans has dtype float32, expected int64"),
        ({"spans": [(2, 0, 1, 2)]}, ValueError, r"spans has document \[2\], expected 0 to 1"),
        ({"spans": [(-1, 0, 1, 2)]}, ValueError, r"spans has document \[-1\]"),
        ({"spans": [(0, 5, 1, 2)]}, ValueError, r"spans has label \[5\], expected 0 to 4"),
        ({"spans": [(0, 0, -1, 2)]}, ValueError, r"spans has first position \[-1\]"),
        ({"spans": [(0, 0, 3, 2)]}, ValueError, r"spans has first > last in row \[0\]"),
        ({"spans": [(0, 0, 0, 2**40)]}, ValueError, r"last position \[1099511627776\]"),
        ({"head_links": [(0, 1, 0, 0)]}, ValueError, r"head_links has link head \[1\]"),
        ({"tail_links": [(0, 0, 1, 0)]}, ValueError, "tail_links has first > last"),
        ({"num_documents": 2**40}, ValueError, "num_documents is 1099511627776, expected fewer"),
        ({"offsets": [[]]}, ValueError, "offsets has 1 entries, expected 2"),
    ],
)
def test_bad_tables(change, error, message):
    arguments = {"spans": [], "head_links": [], "tail_links": [], "schema": SCHEMA}
    with pytest.raises(error, match=f"supy.events.decode: .*{message}"):
        decode_batch(**{**arguments, "num_documents": 2, **change})


def dense(document, count):
    """Tables of one document in which each argument is linked to all but one: 2 ** (count / 2)
    cliques."""
    spans = [(document, X, i, i) for i in range(count)]
    links = [(document, 0, i, j) for i, j in combinations(range(count), 2) if i + 1 != j or i % 2]
    return spans, links


def test_limit_costs_one_type_of_one_document(caplog):
    few, many = dense(0, 4), dense(1, 20)
    spans = few[0] + many[0] + [(1, Y, 30, 31), (2, W, 0, 1)]
    links = few[1] + many[1]
    with caplog.at_level(logging.WARNING):
        decoded = decode_batch(spans, links, links, SCHEMA, 3, limit=100)
    assert [len(events) for events in decoded] == [4, 1, 1]
    assert decoded[1] == [Event.make("b", [("y", 30, 32)])]
    (warning,) = caplog.records
    assert "1 times" in warning.getMessage() and "document 1, type a" in warning.getMessage()
    assert len(decode_batch(spans, links, links, SCHEMA, 3, limit=None)[1]) == 1025


def test_spans_everywhere(caplog):
    # What an untrained model predicts must not take the memory of all pairs.
    everywhere = [(d, X, i, j) for d in (1, 3) for i in range(150) for j in range(i, 150)]
    spans = everywhere + [(0, X, 1, 1), (1, Y, 3, 3), (2, X, 5, 5)]
    links = [(1, 0, i, j) for i in range(150) for j in range(i, 150)]
    decoded = decode_batch(spans, links, links, SCHEMA, 4)
    assert [len(events) for events in decoded] == [1, 1, 1, 0]
    (warning,) = caplog.records
    assert "2 times" in warning.getMessage() and "document 1, type a" in warning.getMessage()


def test_generated_sample_comes_back():
    documents = generate_sample(300)
    schema = EventSchema.from_documents(documents)
    for typed in (False, True):
        labels = encode(documents, schema, typed=typed)
        decoded = decode_batch(*labels[:3], schema, len(documents), typed=typed)
        assert evaluate(documents, decoded).event.f1 == 1.0


@fewfc
@pytest.mark.parametrize(
    "name, untyped, typed",
    [
        ("train_base", 0.9494, 0.9679),
        ("test_base", 0.9741, 0.9847),
        ("train_trans", 1.0, 1.0),
    ],
)
def test_ceiling_of_the_encoding(name, untyped, typed):
    # Decoded gold labels against the gold events as annotated: events with or without a trigger,
    # each once a document, an argument that is annotated twice kept twice (such an event is lost).
    documents = read_fewfc(data_folder() / "events" / "fewfc" / f"{name}.json")
    schema = EventSchema.from_documents(documents)
    for is_typed, ceiling in ((False, untyped), (True, typed)):
        labels = encode(documents, schema, typed=is_typed)
        assert labels.dropped == []
        decoded = decode_batch(*labels[:3], schema, len(documents), typed=is_typed)
        scores = evaluate(documents, decoded, require_trigger=False)
        assert round(scores.event.f1, 4) == ceiling
        assert scores.argument.f1 == 1.0


@fewfc
def test_fewfc_equals_the_oracle():
    documents = read_fewfc(data_folder() / "events" / "fewfc" / "test_base.json")[:300]
    schema = EventSchema.from_documents(documents)
    for typed in (False, True):
        tables = [table.tolist() for table in encode(documents, schema, typed=typed)[:3]]
        expected = []
        for number in range(len(documents)):
            alone = [[(0, *row[1:]) for row in table if row[0] == number] for table in tables]
            expected += oracle(*alone, schema, 1, typed)
        assert decode_batch(*tables, schema, len(documents), typed=typed) == expected
