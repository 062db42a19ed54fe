"""Trains an event extractor, shows what it finds in sentences that it has not seen, and scores it.

    python examples/event_extraction.py [--epochs N] [--out DIR]

With FewFC at hand (SUPY_DATA; see README.md) it trains on train_base and scores on test_base, else on generated sentences.
"""

from __future__ import annotations

import argparse
import time

from supy.events import (
    Document,
    EventExtractor,
    EventSchema,
    TrainingOptions,
    data_folder,
    decode_batch,
    encode,
    evaluate,
    generate_sample,
    read_fewfc,
)
from supy.info import info

FEWFC = "https://github.com/TimeBurningFish/FewFC"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="passes over the training data")
    parser.add_argument("--out", default="runs/events", help="folder for the model (default: %(default)s)")
    args = parser.parse_args()

    print(info(), end="\n\n")
    train, test, epochs = load()
    options = TrainingOptions(epochs=args.epochs or epochs)

    start = time.perf_counter()
    extractor = EventExtractor().fit(train, options=options, folder=args.out)
    print(f"\ntrained in {time.perf_counter() - start:.0f} s; the model is in {args.out}\n")

    start = time.perf_counter()
    predicted = extractor.extract(document.text for document in test)
    seconds = time.perf_counter() - start
    for gold, found in [pair for pair in zip(test, predicted) if 2 <= len(pair[1].events) <= 3][:5]:
        show(found, gold)
    print(f"{len(test)} sentences that it has not seen, {seconds:.1f} s:\n\n{evaluate(test, predicted)}\n")
    compare_decoders(test, extractor.model.schema)


def load() -> tuple[list[Document], list[Document], int]:
    """Training documents, test documents, and epochs."""
    folder = data_folder()
    if folder is None:
        print("SUPY_DATA is not set: training on 1,200 generated sentences about invented companies.")
        print(f"For real ones get FewFC, {FEWFC}, and see README.md.\n")
        documents = generate_sample(1500)
        return documents[:1200], documents[1200:], 15
    fewfc = folder / "events" / "fewfc"
    test = read_fewfc(fewfc / "test_base.json")
    seen = {document.text for document in test}
    train = [d for d in read_fewfc(fewfc / "train_base.json") if d.text not in seen]
    print(f"FewFC: {len(train)} sentences of train_base to train on, {len(test)} of test_base to score on.\n")
    return train, test, TrainingOptions().epochs


def show(found: Document, gold: Document) -> None:
    """One sentence for each event, with the words that play its roles marked."""
    for event in found.events:
        right = "as annotated" if event in gold.events else "differs from the annotation"
        print(f"{event.type} ({right})")
        print(f"  {mark(found.text, event.arguments)}")
    print()


def mark(text: str, arguments) -> str:
    """ "Ann sells" with a seller and a trigger: "[seller: Ann] [trigger: sells]"."""
    pieces, at = [], 0
    for role, start, end in sorted(arguments, key=lambda a: (a.start, -a.end)):
        if start < at:  # inside or across the one before
            pieces.append(f" [{role}: {text[start:end]}]")
        else:
            pieces += [text[at:start], f"[{role}: {text[start:end]}]"]
            at = end
    return "".join([*pieces, text[at:]])


def compare_decoders(documents: list[Document], schema: EventSchema) -> None:
    """Times supy's decoding of the gold labels beside the recursive search in plain Python that was published."""
    known = set(schema.types)
    documents = [Document(d.text, [e for e in d.events if e.type in known]) for d in documents]
    spans, heads, tails, _ = encode(documents, schema, typed=True)
    seconds = {"supy": float("inf"), "plain Python": float("inf")}
    for _ in range(3):  # the first time is that of loading
        start = time.perf_counter()
        ours = decode_batch(spans, heads, tails, schema, len(documents), typed=True)
        seconds["supy"] = min(seconds["supy"], time.perf_counter() - start)
        start = time.perf_counter()
        theirs = plain_python(spans.tolist(), heads.tolist(), tails.tolist(), schema, len(documents))
        seconds["plain Python"] = min(seconds["plain Python"], time.perf_counter() - start)
    assert [len(found) for found in ours] == theirs, "the two decoders disagree"
    print(f"decoding the annotations of {len(documents)} sentences to {sum(theirs)} events:")
    for name, value in seconds.items():
        print(f"  {name:13} {value * 1e3:8.1f} ms   {value / seconds['supy']:5.1f} x")


def plain_python(spans, heads, tails, schema: EventSchema, count: int) -> list[int]:
    """The number of events of each document, by the search of kexue.fm post 8926 (without its duplicated nodes)."""
    heads, tails = set(map(tuple, heads)), set(map(tuple, tails))
    groups: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for document, label, start, end in spans:
        kind = schema.type_id(schema.labels[label][0])
        groups.setdefault((document, kind), []).append((label, start, end))
    events = [0] * count
    for (document, kind), nodes in groups.items():

        def linked(a, b, document=document, kind=kind):
            return (document, kind, min(a[1], b[1]), max(a[1], b[1])) in heads and (
                (document, kind, min(a[2], b[2]), max(a[2], b[2])) in tails
            )

        near = {a: {b for b in nodes if b == a or linked(a, b)} for a in nodes}
        events[document] += len(cliques(frozenset(nodes), near))
    return events


def cliques(nodes: frozenset, near: dict) -> set[frozenset]:
    """Every maximal clique: of a pair that is not linked, each lies among the neighbours of one or outside both."""
    smaller = {
        nodes & near[c] for a in nodes for b in nodes if b not in near[a] for c in (a, b)
    }
    return set().union(*(cliques(part, near) for part in smaller)) if smaller else {nodes}


if __name__ == "__main__":
    main()
