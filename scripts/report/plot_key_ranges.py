"""The range of every channel of a layer's keys, before and after the rotary embedding.

    python -m scripts.report.plot_key_ranges --records records/ --layer 11

Why keys are quantized before it, per channel (KVQuant, sections 3.1 and 3.2): there channels have ranges and centres of
their own; the rotation mixes the two channels of a pair, widens them and centres them on zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gradients.cli import format_table, run_command
from gradients.records import Records
from quant.scheme import Rope, Scheme
from quant.side import channel_quantiles, read_side
from scripts.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = 0.01  # share of a channel's tokens beyond its band, half at each end: the outliers of nuq-1%


@dataclass(frozen=True)
class Ranges:
    """Ends `[C]` of every channel: of all its tokens, and of its band."""

    lowest: Tensor
    highest: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Ranges":
        """The ranges of `x` `[N, C]`."""
        return cls(*channel_quantiles(x, 0.0), *channel_quantiles(x, BAND))

    def summary(self) -> dict[str, float]:
        """What the eye compares: the bands' mean width, and their centres' mean distance from zero."""
        return {
            "mean_width": float((self.high - self.low).mean()),
            "mean_abs_centre": float(((self.high + self.low) / 2).abs().mean()),
        }


def read_ranges(records: Records, layer: int, sink_tokens: int) -> dict[str, Ranges]:
    """The ranges of the layer's keys on both sides of the rotary embedding. Raises `UserError` for unusable records."""
    sides: dict[str, Rope] = {"before RoPE": "pre", "after RoPE": "post"}
    ranges = {}
    for title, rope in sides.items():
        scheme = Scheme(datatype="int", bits=4, sink_tokens=sink_tokens, key_rope=rope)
        ranges[title] = Ranges.of(read_side(records, scheme, layer, "key").activation)
    return ranges


def draw(ranges: dict[str, Ranges], head_dim: int, title: str) -> "Figure":
    """One panel for each side of the rotary embedding, on one y axis."""
    figure, [axes] = figures.panels(1, len(ranges), (10, 3.8), sharey=True)
    for place, (name, one) in zip(axes, ranges.items(), strict=True):
        draw_ranges(place, one, head_dim)
        of = one.summary()
        place.set_title(f"{name}: mean width {of['mean_width']:.1f}, mean |centre| {of['mean_abs_centre']:.1f}")
    axes[0].set_ylabel("value of a key's element")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def draw_ranges(place: "Axes", ranges: Ranges, head_dim: int) -> None:
    """Each channel as a bar from its least to its greatest element, with the band and its centre in it."""
    channels = len(ranges.low)
    for low, high, colour, label in (
        (ranges.lowest, ranges.highest, figures.PALE_BLUE, "minimum to maximum"),
        (
            ranges.low,
            ranges.high,
            figures.BLUE,
            f"{BAND * 50:g} % to {100 - BAND * 50:g} % of the tokens, centre in white",
        ),
    ):
        place.bar(range(channels), (high - low).numpy(), 1.0, low.numpy(), color=colour, lw=0, label=label)
    centres, left = ((ranges.high + ranges.low) / 2).numpy(), np.arange(channels) - 0.5
    place.hlines(centres, left, left + 1, color="white", lw=1.2)
    place.use_sticky_edges = False  # leave room below the longest bar too
    for boundary in range(head_dim, channels, head_dim):
        place.axvline(boundary - 0.5, color=figures.GREY, lw=0.8, ls=(0, (4, 3)))
    place.set_xlim(-0.5, channels - 0.5)
    place.set_xticks(range(0, channels + 1, head_dim))
    place.set_xlabel("channel (dashed: the next head)")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = figures.plot_parser("key_ranges", __doc__)
    figures.add_records_arguments(parser)
    arguments = parser.parse_args(argv)
    with figures.style():
        records = figures.open_layer(arguments)
        ranges = read_ranges(records, arguments.layer, arguments.sink_tokens)
        title = f"Keys of {figures.model_name(records)}, layer {arguments.layer}"
        figures.save(draw(ranges, records.manifest.fingerprint.head_dim, title), arguments.output)
    rows = [{"keys": name, **one.summary()} for name, one in ranges.items()]
    print(format_table(rows))
    return {"output": str(arguments.output), "layer": arguments.layer, "rows": rows}


if __name__ == "__main__":
    run_command(main)
