"""Calibration and evaluation text, cut into windows of equal length.

A corpus is named (`wikitext2`, `c4`, `ptb`, `pydoc`) or is the path of a UTF-8 text file, `FILE:START-END` taking
a part of it in percent of its characters (`validation.txt:0-50`). It is tokenized as one string. Calibration
windows are drawn at random places, evaluation windows are consecutive and do not overlap. Where a model wants to see
`<bos>` first, every window begins with it, as every sequence does in deployment; the window is then one token of text shorter.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from gradients.cli import UserError

Split = Literal["calibration", "evaluation"]

_PART_OF_FILE = re.compile(r"(?P<path>.+):(?P<start>\d+(?:\.\d+)?)-(?P<end>\d+(?:\.\d+)?)")
_PYDOC_CALIBRATION_SHARE = 0.8
_C4_DOCUMENTS = 1100  # enough for 16 windows of 32K tokens; one shard holds 356K documents


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus."""

    name: str
    tokens: Tensor  # [n] int64
    bos: int | None = None  # what every window begins with

    @cached_property
    def digest(self) -> str:
        """Hash of the token stream: equal digests mean equal text under an equal tokenizer."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()[:16]

    def calibration_windows(self, seqlen: int, count: int, seed: int) -> Tensor:
        """`count` windows `[count, seqlen]` at random places, drawn as the original implementation draws them.

        Raises `UserError` when the text is too short for one window and the token after it.
        """
        own = self._own(seqlen)
        self._check_length(own + 1, seqlen)
        draw = random.Random(seed)
        starts = [draw.randint(0, len(self.tokens) - own - 1) for _ in range(count)]
        return self._begun(torch.stack([self.tokens[start : start + own] for start in starts]))

    def evaluation_windows(self, seqlen: int, count: int | None = None) -> Tensor:
        """The first `count` (default: all) consecutive windows, `[windows, seqlen]`.

        Raises `UserError` when the text holds fewer than `count` windows, or none.
        """
        own = self._own(seqlen)
        self._check_length(own, seqlen)
        available = len(self.tokens) // own
        if count is not None and count > available:
            raise UserError(
                f"text {self.name!r} holds {available} windows of {seqlen} tokens, {count} were asked for; "
                f"lower --windows to {available} or give a longer text"
            )
        count = available if count is None else count
        return self._begun(self.tokens[: count * own].view(count, own))

    def _own(self, seqlen: int) -> int:
        """Tokens of the text in a window."""
        return seqlen if self.bos is None else seqlen - 1

    def _begun(self, windows: Tensor) -> Tensor:
        return windows if self.bos is None else torch.nn.functional.pad(windows, (1, 0), value=self.bos)

    def _check_length(self, needed: int, seqlen: int) -> None:
        if len(self.tokens) < needed:
            raise UserError(
                f"text {self.name!r} has {len(self.tokens)} tokens, fewer than one window needs ({needed}); "
                f"lower --seqlen (now {seqlen}) or give a longer text"
            )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer begins a text with `<bos>` by itself."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("a", verbose=False).input_ids[:1] == [bos]


def bos_token(tokenizer: PreTrainedTokenizerBase, wanted: bool | None) -> int | None:
    """The token that every window begins with, if any; `wanted` None: where the tokenizer adds it by itself.

    Raises `UserError` when it is wanted of a tokenizer that has none.
    """
    if wanted is False or (wanted is None and not adds_bos(tokenizer)):
        return None
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise UserError("--bos: the model's tokenizer has no such token; use --no-bos")
    return int(bos)


def load_corpus(text: str, split: Split, tokenizer: PreTrainedTokenizerBase, bos: bool | None = False) -> Corpus:
    """Read and tokenize a corpus; `split` picks the part of a named corpus meant for calibration or evaluation.

    `bos` says whether windows begin with `<bos>` (None: where the tokenizer adds it by itself); without it the text is
    tokenized in one piece, as the paper's code does, and only its first window has what the tokenizer adds.
    Raises `UserError` for a missing, unreadable or empty text.
    """
    begin = bos_token(tokenizer, bos)
    content = load_text(text, split)
    if not content.strip():
        raise UserError(f"text {text!r} is empty; give a text with words in it")
    special = {} if begin is None else {"add_special_tokens": False}
    tokens = tokenizer(content, return_tensors="pt", verbose=False, **special).input_ids[0]
    return Corpus(text, tokens.to(torch.int64), begin)


def load_text(text: str, split: Split) -> str:
    """The characters of a named corpus's split, of a file, or of a part of a file."""
    if text in _NAMED and not Path(text).is_file():
        try:
            return _NAMED[text](split)
        except UserError:
            raise
        except Exception as error:  # the hub's client raises many kinds; all mean the corpus could not be had
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"cannot load corpus {text!r}: {reason}; check the network, or give --text pydoc or a text file"
            ) from error
    path, start, end = text, 0.0, 100.0
    match = _PART_OF_FILE.fullmatch(text)
    if match and not Path(text).exists():
        path, start, end = match["path"], float(match["start"]), float(match["end"])
        if not 0 <= start < end <= 100:
            raise UserError(
                f"text part {start:g}-{end:g} of {path!r} is not within 0-100; use FILE:START-END in percent"
            )
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"text {path!r} cannot be read ({error.strerror}); give a UTF-8 text file or one of {', '.join(_NAMED)}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"text {path!r} is not UTF-8 (byte {error.start}); convert it first") from error
    return content[round(len(content) * start / 100) : round(len(content) * end / 100)]


def _wikitext2(split: Split) -> str:
    from datasets import load_dataset

    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train" if split == "calibration" else "test")
    return "\n\n".join(rows["text"])


def _ptb(split: Split) -> str:
    from datasets import load_dataset

    # the repository itself still holds a loading script, which `datasets` no longer runs
    rows = load_dataset(
        "ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        split="train" if split == "calibration" else "test",
    )
    return " ".join(rows["sentence"])


def _c4(split: Split) -> str:
    from datasets import load_dataset

    shard = (
        "en/c4-train.00000-of-01024.json.gz" if split == "calibration" else "en/c4-validation.00000-of-00008.json.gz"
    )
    rows = load_dataset("allenai/c4", data_files={"rows": shard}, split="rows")
    return " ".join(rows.select(range(_C4_DOCUMENTS))["text"])


def _pydoc(split: Split) -> str:
    """The language reference inside every CPython; its wording differs a little between Python versions."""
    from pydoc_data.topics import topics

    articles = [topics[name] for name in sorted(topics)]
    cut = round(len(articles) * _PYDOC_CALIBRATION_SHARE)
    return "\n\n".join(articles[:cut] if split == "calibration" else articles[cut:])


_NAMED: dict[str, Callable[[Split], str]] = {"wikitext2": _wikitext2, "c4": _c4, "ptb": _ptb, "pydoc": _pydoc}
