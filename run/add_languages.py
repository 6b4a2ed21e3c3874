#!/usr/bin/env python3
"""Copy a tokenizer, with a token for each language that has none: what texts are written and read in several by.

python run/add_languages.py xlm-roberta-base --language en,de,zh --out tokenizer.json
python run/add_languages.py mbart-large-cc25 --language sw,th --out tokenizer.json   # a folder, beside its 25
"""

from pathlib import Path

from jsonargparse import Namespace

from mug.data.builders.writers import replacing
from mug.data.config import DataConfig
from mug.data.tokenizer import Tokenizer, language_token
from mug.run.common.command_line import Parser
from mug.run.common.console import Console, run_command
from mug.run.common.errors import RunError
from mug.run.common.output import check_new_file


def main(console: Console) -> None:
    options = parse()
    tokenizer, out = Tokenizer.load(options.tokenizer), Path(options.out)
    wanted = dict.fromkeys(DataConfig(language=options.language).languages())
    new = [one for one in wanted if one not in tokenizer.languages]
    if not new:
        raise RunError(f"--language {options.language}: {options.tokenizer} has a token for each")
    tokenizer.backend.add_special_tokens([language_token(language) for language in new])
    with replacing(out) as file:
        file.write(tokenizer.backend.to_str(pretty=True).encode())
    console.info(f"{out}: {tokenizer.vocab_size:,} tokens, the last {len(new)} of {', '.join(new)}")


def parse(arguments: list[str] | None = None) -> Namespace:
    """Parse the command line.

    Raises:
        RunError: an unknown flag, or --out exists or cannot be written.
    """
    parser = Parser(prog="add_languages.py", description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=str, help="a tokenizer.json, its folder, or a name on the Hugging Face hub")
    parser.add_argument("--out", type=str, required=True, help="the tokenizer.json to write")
    parser.add_argument("--language", type=str, required=True, help="codes of the languages: en,de,pt-BR")
    options = parser.parse_args(arguments)
    check_new_file(Path(options.out), "--out")
    return options


if __name__ == "__main__":
    run_command(main)
