"""What a retrieval test compares: the model as it is, schemes fitted to records, and fitted quantizers; and how they run."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from deployment.text.saved import quantizers_digest
from gradients.cli import UserError, positive_int
from gradients.records import Records
from quant.artefact import Quantizers, load_quantizers
from quant.fit import fit
from quant.options import add_scheme_arguments, exact_from, scheme_from
from quant.scheme import Scheme

Row = dict[str, Any]
UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class Candidate:
    """What is compared: a scheme and where its quantizers come from; neither for the model as it is."""

    scheme: Scheme | None = None
    records_digest: str | None = None
    fit: Callable[[], Quantizers] | None = None
    fitted: tuple[tuple[str, Any], ...] = ()  # fields of a row that say to what, or which they are

    @cached_property
    def quantizers(self) -> Quantizers | None:
        """Fitted when first asked for."""
        return self.fit() if self.fit else None

    def identity(self, arguments: argparse.Namespace) -> Row:
        """The fields of a row that say whose it is and how it was run."""
        if self.scheme is None:
            return {"scheme": UNQUANTIZED, "mode": UNQUANTIZED, "records": None}
        run: Row = {"scheme": self.scheme.describe(), "mode": arguments.mode, "records": self.records_digest}
        run |= dict(self.fitted)
        if arguments.mode == "packed":
            run |= {"prefill_chunk": arguments.prefill_chunk, "exact_chunk": arguments.exact_chunk}
        return run


def add_candidate_arguments(parser: argparse.ArgumentParser) -> None:
    """`--quantizers`, or `--records` and `--schemes`, and the way they run."""
    parser.add_argument("--quantizers", nargs="+", default=[], help="files written by `python -m quant.fit`")
    parser.add_argument("--records", help="folder written by `python -m gradients`, to fit --schemes to")
    parser.add_argument(
        "--schemes", nargs="+", default=[], help="such as nuq3-1%% int4; the options below hold for all"
    )
    # of --quantizers, what they were fitted with stays: --sink-tokens and --residual-tokens alone are asked anew
    add_scheme_arguments(parser, named=False)
    packed = {"action": "store_const", "const": "packed", "default": "simulated"}
    parser.add_argument("--packed", dest="mode", **packed, help="through the packed cache; without, simulated")
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="prompt tokens per cached forward")
    parser.add_argument(
        "--exact-chunk",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="packed: a chunk sees itself in full precision; without, any chunk gives what is simulated",
    )


def _same(quantizers: Quantizers) -> Quantizers:
    return quantizers


def candidates_from(arguments: argparse.Namespace) -> list[Candidate]:
    """The unquantized model, the `--schemes`, the `--quantizers`. Raises `UserError` for unusable ones."""
    candidates = [Candidate()]
    if arguments.schemes and not arguments.records:
        raise UserError(f"--schemes {arguments.schemes[0]} ... are fitted to records; give --records as well")
    if arguments.schemes:
        records = Records.open(arguments.records)
        schemes = [scheme_from(name, arguments) for name in dict.fromkeys(arguments.schemes)]
        manifest = records.manifest
        windows = (("calibration_windows", manifest.windows), ("moment_windows", manifest.moment_windows))
        candidates += [Candidate(scheme, manifest.digest, partial(fit, records, scheme), windows) for scheme in schemes]
    for path in arguments.quantizers:
        quantizers = exact_from(load_quantizers(path), arguments)
        which = (("quantizers", quantizers_digest(quantizers)),)
        candidates.append(Candidate(quantizers.scheme, quantizers.records_digest, partial(_same, quantizers), which))
    for candidate in candidates:
        if arguments.mode == "packed" and candidate.scheme and candidate.scheme.simulated_only:
            raise UserError(f"scheme {candidate.scheme.describe()!r} has no packed cache; drop --packed")
    return candidates
