"""``supy argmax check`` and ``supy argmax verify``."""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from supy.argmax.certificates import VERDICTS, verify
from supy.argmax.files import OPTIONS, read_head, read_labels, read_report, write_report
from supy.argmax.picture import check_picture, draw_margins
from supy.argmax.search import find_unargmaxable


def add_commands(commands) -> None:
    """Adds ``argmax`` to the subcommands of ``supy``."""
    actions = commands.add_parser("argmax", help="output classes that can never win").add_subparsers(
        required=True, metavar="ACTION"
    )
    check = actions.add_parser(
        "check",
        help="find classes that no input can make the argmax",
        description="Decides for every class of an output layer whether some input makes it the argmax, with proofs.",
    )
    _layer_options(check)
    check.add_argument("--labels", metavar="FILE", help="a class name a line, or an .npz with an array labels")
    check.add_argument("--json", metavar="FILE",
                       help="write the report with every certificate; until then FILE.partial keeps what is decided, "
                            "and the same command goes on from there")  # fmt: skip
    check.add_argument("--picture", metavar="FILE", help="draw the margins (.png, .pdf or .svg; needs matplotlib)")
    check.add_argument("--bound", type=float, help="only inputs with |x_j| at most this count")
    check.add_argument("--nonnegative", action="store_true", help="only inputs of at least 0 count, as behind a ReLU")
    check.add_argument("--lower", type=float, help="only inputs of at least this count")
    check.add_argument("--upper", type=float, help="only inputs of at most this count")
    check.set_defaults(run=_check)

    again = actions.add_parser(
        "verify",
        help="check the certificates of a report",
        description="Checks every certificate of a report against the layer, in float64, independently of the search.",
    )
    again.add_argument("report", metavar="REPORT", help="what check --json wrote")
    _layer_options(again)
    again.set_defaults(run=_verify)


def _layer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE",
                        help=".npz, .npy, .safetensors, a state dict, .onnx, or a model's folder")  # fmt: skip
    parser.add_argument("--weight", metavar="NAME", help="the weight's name in it")
    parser.add_argument("--bias", metavar="NAME", help="the bias's name in it")


def _check(args) -> None:
    weight, bias = read_head(args.file, args.weight, args.bias)
    labels = read_labels(args.labels) if args.labels else None
    if labels is not None and len(labels) != len(weight):
        raise ValueError(f"{args.labels}: {len(labels)} labels, the layer has {len(weight)} classes")
    options = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) not in (None, False)}
    if args.picture:
        check_picture(args.picture)
    partial = f"{args.json}.partial" if args.json else None
    begin = time.perf_counter()
    report = find_unargmaxable(weight, bias, progress=sys.stderr.isatty(), checkpoint=partial, **options)
    seconds = time.perf_counter() - begin
    for verdict in ("unargmaxable", "tied", "undecided"):
        for k in report.classes(verdict):
            proof = report.certificate(k)
            why = "neither could be proven"
            if verdict == "unargmaxable":
                why = f"below an average of {len(proof.dominators)} classes by {proof.surplus:.3g}"
            elif verdict == "tied":
                others = [str(other) for other in proof.twins[:6] if other != k]
                why = f"the same row as {', '.join(others[:5])}" + " and more" * (len(proof.twins) > 6)
            print(f"{k}\t{verdict}\t{labels[k] if labels else ''}\t{why}")
    counts = ", ".join(f"{report.verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
    print(f"{len(report)} classes in {seconds:.1f} s: {counts}")
    if args.json:
        write_report(args.json, report, options, labels)
        shutil.rmtree(partial, ignore_errors=True)  # a leftover is harmless: it is of this very search
        print(f"report written to {args.json}")
    if args.picture:
        draw_margins(args.picture, report)
        print(f"picture written to {args.picture}")


def _verify(args) -> int:
    certificates, options = read_report(args.report)
    weight, bias = read_head(args.file, args.weight, args.bias)
    problems = verify(weight, bias, certificates, **options)
    for problem in problems:
        print(problem)
    undecided = sum(proof.verdict == "undecided" for proof in certificates)
    print(f"{len(certificates)} certificates, {len(problems)} wrong, {undecided} undecided")
    return 1 if problems else 0
