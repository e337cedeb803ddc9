"""The fields of a `Scheme` as command line options, spelled alike in every command that fits."""

import argparse
from dataclasses import fields
from typing import get_args

from gradients.cli import non_negative_int, positive_int
from quant.artefact import Quantizers
from quant.presets import PRESETS
from quant.scheme import Axis, Range, Rope, Scheme, Thresholds, Weights


def add_scheme_arguments(parser: argparse.ArgumentParser, named: bool = True) -> None:
    """The fields of a `Scheme` as options, each the scheme's own unless given; `--scheme` unless told it is not `named`."""
    if named:
        parser.add_argument(
            "--scheme",
            required=True,
            help="{int|nf|nuq}BITS[-P%%][+fb], such as nuq3-1%%, or rdnuqBUDGET[g1][-P%%][+fb], such as rdnuq2.4, or "
            f"{{{'|'.join(PRESETS)}}}BITS",
        )
    parser.add_argument("--sink-tokens", type=non_negative_int, help="first tokens kept in fp16 (1)")
    parser.add_argument("--q-norm", action=argparse.BooleanOptionalAction, help="keep mean and deviation (no)")
    parser.add_argument("--weights", choices=get_args(Weights), help="of the k-means behind nuq (fisher*s^2)")
    parser.add_argument("--key-axis", choices=get_args(Axis), help="one range per channel or token (channel)")
    parser.add_argument("--value-axis", choices=get_args(Axis), help="(token)")
    parser.add_argument("--channel-range", choices=get_args(Range), help="of channels: calibrated or not (offline)")
    parser.add_argument("--group", type=positive_int, help="elements that share a dynamic range (all)")
    parser.add_argument("--key-rope", choices=get_args(Rope), help="keys before or after the rotary embedding (pre)")
    parser.add_argument("--thresholds", choices=get_args(Thresholds), help="of outliers, per vector or layer (vector)")
    parser.add_argument("--outlier-cap", type=non_negative_int, help="most outliers per token, channel-wise axes")
    parser.add_argument("--feedback", action=argparse.BooleanOptionalAction, help="error feedback, as +fb (no)")
    parser.add_argument("--groups", type=positive_int, help="channels that share a width, rdnuq: 16, or 1 as g1 (16)")
    parser.add_argument("--residual-tokens", type=non_negative_int, help="recent tokens kept exact (0)")


def add_exact_arguments(parser: argparse.ArgumentParser) -> None:
    """`--sink-tokens --residual-tokens` of commands that read fitted quantizers."""
    for name, which in (("--sink-tokens", "first"), ("--residual-tokens", "recent")):
        parser.add_argument(
            name, type=non_negative_int, metavar="N", help=f"{which} tokens kept exact; default: as the quantizers say"
        )


def exact_from(quantizers: Quantizers, arguments: argparse.Namespace) -> Quantizers:
    """The quantizers with what `add_exact_arguments` asks for."""
    return quantizers.with_exact(arguments.sink_tokens, arguments.residual_tokens)


def scheme_from(name: str, arguments: argparse.Namespace) -> Scheme:
    """The named scheme with the options of `add_scheme_arguments`. Raises `UserError` for an unknown name."""
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Scheme)}
    return Scheme.parse(name, **{option: value for option, value in given.items() if value is not None})
