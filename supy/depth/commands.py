"""``supy depth probe``, ``supy depth residual`` and ``supy depth gau``."""

from __future__ import annotations

import os
import sys

from supy._checks import positive
from supy.depth.analysis import gau_scale, residual_gain, save_gain_picture
from supy.depth.probe import FAMILIES, RATES, probe
from supy.depth.report import save_picture, sentences, table, to_json, write_json


def add_commands(commands) -> None:
    """Adds ``depth`` to the subcommands of ``supy``."""
    actions = commands.add_parser("depth", help="very deep networks").add_subparsers(required=True, metavar="ACTION")
    parser = actions.add_parser(
        "probe",
        help="measure what one step of training does at several depths",
        description="Builds a model at several depths, takes one step of SGD, Adam and LAMB, and says how far the "
        "output moves, how the loss changes, and how scales and gradients go through the layers.",
        epilog="A model of your own is package.module:function. The function takes a depth and returns a module, or "
        "(module, batch, loss): batch is a tensor, a tuple of arguments or a dictionary of keywords that the module is "
        "called with, and loss takes what it returns and gives a tensor with one number. A module alone is called with "
        "normal numbers [batch, tokens, width]. The layers are the lists of modules with as many entries as the depth.",
    )
    parser.add_argument("--model", default="deepnorm,post,pre", metavar="NAMES",
                        help=f"package.module:function, or of {', '.join(FAMILIES)}; several with commas "
                             "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--depths", default="6,12,25,50,100,200", metavar="N,...", help="default: %(default)s")
    rates = ",".join(f"{name}={rate:g}" for name, rate in RATES.items())
    parser.add_argument("--rates", default=rates, metavar="NAME=RATE,...",
                        help="optimisers and their learning rates (default: %(default)s)")  # fmt: skip
    parser.add_argument("--layers", metavar="NAME", help="the module's list of layers (default: found by its length)")
    parser.add_argument("--token-axis", type=int, default=1, help="of the layers' outputs (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="samples (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, default=16, help="of a sample (default: %(default)s)")
    parser.add_argument("--width", type=positive, default=64, help="default: %(default)s")
    parser.add_argument("--seeds", type=positive, default=3, help="runs to average (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.set_defaults(run=_probe)

    residual = actions.add_parser(
        "residual",
        help="why there are residual connections",
        description="How much x + epsilon f(x) lengthens what passes through it, for widths of 1 to 1024 (post 8994).",
    )
    residual.set_defaults(run=_residual)
    gau = actions.add_parser(
        "gau",
        help="how large a gated attention unit's result is at first",
        description="Measures the estimates of post 8990 at the size of GAU-alpha's units.",
    )
    gau.set_defaults(run=_gau)
    for action in (parser, residual, gau):
        action.add_argument("--json", metavar="FILE", help="write all numbers")
    for action in (parser, residual):
        action.add_argument("--picture", metavar="FILE", help="draw them into a PNG")


def _probe(args) -> None:
    depths = [_whole(text) for text in args.depths.split(",")]
    options = {
        "rates": dict(map(_rate, args.rates.split(","))),
        "seeds": args.seeds,
        "shape": (args.batch, args.tokens, args.width),
        "layers": args.layers,
        "token_axis": args.token_axis,
        "device": args.device,
    }
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a model beside the user is found
    studies = []
    for model in args.model.split(","):
        study = probe(model.strip(), depths, progress=sys.stderr.isatty(), **options)
        studies.append(study)
        print(table(study))
        print("\n".join(sentences(study)), flush=True)
    if args.json:
        write_json(args.json, to_json(studies, {"depths": depths, **options}))
        print(f"numbers written to {args.json}")
    if args.picture:
        save_picture(args.picture, studies)
        print(f"picture written to {args.picture}")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--depths has {text!r}, expected whole numbers with commas between them") from None


def _rate(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        raise ValueError(f"--rates has {text!r}, expected NAME=RATE, such as sgd=0.001") from None


def _residual(args) -> None:
    gain = residual_gain()
    print("width  cosine of v and v J  " + "  ".join(f"epsilon {e:g}" for e in gain.epsilons))
    for width, values in gain.one.items():
        print(f"{width:5}  {gain.cosines[width]:19.3f}  "
              + "  ".join(f"{value:{8 + len(f'{e:g}')}.2g}" for e, value in zip(gain.epsilons, values)))  # fmt: skip
    _finish(args, gain)
    if args.picture:
        save_gain_picture(args.picture, gain)
        print(f"picture written to {args.picture}")


def _gau(args) -> None:
    _finish(args, gau_scale())


def _finish(args, result) -> None:
    print("\n".join(result.sentences()))
    if args.json:
        write_json(args.json, result.to_json())
        print(f"numbers written to {args.json}")
