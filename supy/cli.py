"""The command ``supy``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from supy._checks import positive
from supy.argmax import commands as argmax_commands
from supy.depth import commands as depth_commands
from supy.diffusion import commands as diffusion_commands
from supy.events import (
    DataError,
    EncoderConfig,
    EventExtractor,
    EventSchema,
    TrainingOptions,
    evaluate,
    event_to_json,
    read_duee,
    read_fewfc,
)
from supy.info import info


class InputError(Exception):
    """What the user gave cannot be used; the message is the one line he sees."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 2 with one line on stderr for bad input."""
    parser = _parser()
    args = parser.parse_args(argv)
    logging.basicConfig(format="supy: %(message)s", level=logging.WARNING)
    for pipeline in ("supy.events", "supy.diffusion"):
        logging.getLogger(pipeline).setLevel(logging.INFO)
    try:
        return args.run(args) or 0
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("supy: interrupted", file=sys.stderr)
        return 130
    except DataError as error:
        for problem in error.problems:
            print(f"supy: error: {problem}", file=sys.stderr)
        return 2
    except (InputError, ValueError, OSError, ImportError, FloatingPointError) as error:
        print("supy: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="supy", description="Pipelines over supy's operators.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = commands.add_parser("info", help="operators and backends on this machine")
    about.set_defaults(run=_info)

    events = commands.add_parser("events", help="event extraction").add_subparsers(
        required=True, metavar="ACTION"
    )
    train = events.add_parser(
        "train",
        help="train an extractor",
        description="Trains GPLinker on annotated documents. The same command goes on after a kill.",
    )
    train.add_argument("--train", required=True, metavar="FILE", help="documents to train on")
    train.add_argument("--dev", metavar="FILE", help="to choose the best weights (default: a tenth of --train)")
    train.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    train.add_argument("--schema", metavar="FILE", help="event types and roles (default: those of --train)")
    train.add_argument("--encoder", metavar="NAME", help="a Hugging Face model instead of the small GAU encoder")
    train.add_argument("--links", choices=["typed", "span"], default="typed",
                       help="links know the event type, or, as published, only the spans")  # fmt: skip
    train.add_argument("--epochs", type=positive)
    train.add_argument("--batch-size", type=positive)
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--seed", type=int)
    train.set_defaults(run=_train)
    _data_options(train)

    extract = events.add_parser(
        "extract",
        help="extract events from texts",
        description="Reads texts and writes a JSON line for each, with its events, as it goes.",
    )
    extract.add_argument("input", nargs="?", default="-", metavar="FILE", help="a text a line; - is stdin")
    extract.add_argument("--model", required=True, metavar="DIR")
    extract.add_argument("--json", action="store_true",
                         help='lines are objects with "text" or "content" and perhaps "id" '
                              "(default for files ending in .json or .jsonl)")  # fmt: skip
    extract.set_defaults(run=_extract)

    score = events.add_parser("evaluate", help="score an extractor on annotated documents")
    score.add_argument("--model", required=True, metavar="DIR")
    score.add_argument("--data", required=True, metavar="FILE")
    score.add_argument("--json", action="store_true", help="the scores as JSON")
    score.set_defaults(run=_evaluate)
    _data_options(score)

    diffusion_commands.add_commands(commands)
    argmax_commands.add_commands(commands)
    depth_commands.add_commands(commands)
    return parser


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=["fewfc", "duee"], default="fewfc")
    parser.add_argument("--skip-bad", action="store_true", help="leave out bad records, each with a warning")


def _info(args) -> None:
    print(info())


def _read(path: str, args, schema=None):
    read = {"fewfc": read_fewfc, "duee": read_duee}[args.format]
    return read(path, schema=schema, on_error="skip" if args.skip_bad else "raise")


def _train(args) -> None:
    schema = EventSchema.read(args.schema) if args.schema else None
    documents = _read(args.train, args, schema)
    dev = _read(args.dev, args, schema or EventSchema.from_documents(documents)) if args.dev else None
    given = {
        name: getattr(args, name)
        for name in ("epochs", "batch_size", "learning_rate", "seed")
        if getattr(args, name) is not None
    }
    extractor = EventExtractor(
        schema, encoder=args.encoder or EncoderConfig(), typed=args.links == "typed"
    )
    extractor.fit(documents, dev, options=TrainingOptions(**given), folder=args.out)
    print(f"model written to {args.out}")


def _evaluate(args) -> None:
    extractor = EventExtractor.load(args.model)
    gold = _read(args.data, args)
    start = time.perf_counter()
    scores = evaluate(gold, extractor.extract(document.text for document in gold))
    seconds = time.perf_counter() - start
    if args.json:
        print(json.dumps(scores.to_dict(), ensure_ascii=False, indent=1))
    else:
        print(scores)
        print(f"{len(gold)} documents in {seconds:.1f} s")


def _extract(args) -> int:
    extractor = EventExtractor.load(args.model)
    as_json = args.json or Path(args.input).suffix in (".json", ".jsonl")
    bad = 0
    records: list[dict] = []  # those read ahead of the extractor

    def texts() -> Iterator[str]:
        nonlocal bad
        with open(args.input, "rb") if args.input != "-" else sys.stdin.buffer as file:
            for number, line in enumerate(file, 1):
                try:
                    record = _record(line, as_json)
                except InputError as error:
                    bad += 1
                    name = "stdin" if args.input == "-" else args.input
                    print(f"supy: {name}:{number}: {error}", file=sys.stderr)
                    continue
                if record is not None:
                    records.append(record)
                    yield record["text"]

    for document in extractor.extract_each(texts()):
        events = [event_to_json(event, document.text) for event in document.events]
        print(json.dumps({**records.pop(0), "events": events}, ensure_ascii=False), flush=True)
    if bad:
        print(f"supy: {bad} bad lines were left out", file=sys.stderr)
    return 2 if bad else 0


def _record(line: bytes, as_json: bool) -> dict | None:
    """{"id"?, "text"} of one line; None for an empty one."""
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"expected UTF-8, got byte 0x{line[error.start]:02x}") from None
    if not text.strip():
        return None
    if not as_json:
        return {"text": text}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON object, got {error}") from None
    content = value.get("text", value.get("content")) if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise InputError('expected an object with a string "text" or "content"')
    return ({"id": value["id"]} if "id" in value else {}) | {"text": content}


if __name__ == "__main__":
    sys.exit(main())
