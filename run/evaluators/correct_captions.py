"""How many written captions are correct, and how many of their parts: nouns, relations.

Of pairs whose json says what the caption is made of: `parts`, by language, each kind of part with its phrases, as in
{"en": {"nouns": ["cake", "owl"], "relations": ["above"]}}. Case and punctuation do not count.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mug.data.captions import parts
from mug.model.objectives.objective import Captions, CaptionsVisible
from mug.run.cluster import hardware
from mug.run.common.command_line import check_min
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.held_out_pairs import Pair, PairsConfig, held_out_shards, images_of, name_of_pairs, open_pairs
from mug.run.evaluators.pictures import writes_captions
from mug.run.evaluators.sharing import gather_numbered

WHOLE, VISIBLE = "correct", "correct from the visible patches"
Counts = Counter[tuple[str, str, str]]  # (WHOLE or VISIBLE, kind of part or "captions", "all" or "correct")


@dataclass(frozen=True)
class CorrectCaptionsConfig(PairsConfig):
    """Share of captions, and of each kind of their parts, that are correct.

    Args:
        beams: 1 is greedy.
    """

    beams: int = 1

    def check(self) -> None:
        super().check()
        check_min(self, {"beams": 1})


class CorrectCaptions(Evaluator):
    """`correct/captions`, and `correct/KIND` for each kind of part; `correct from the visible patches/…` of captions
    that are written from what a mask leaves, where the objective has one. Shares, 0 to 1; none where the run held out
    no pairs, or is configured to write no captions.

    A caption is correct if it is one of the pair's true ones, a part if its words stand in the written caption.
    """

    Config = CorrectCaptionsConfig
    needs = Captions

    def __init__(self, config: CorrectCaptionsConfig, context: EvalContext):
        super().__init__(config, context)
        known = config.shards or (context.pairs and held_out_shards(context.pairs))
        self.pairs = open_pairs(config, context) if known else None

    def run(self, subject: Subject) -> Result:
        if self.pairs is None or not writes_captions(subject.module):
            return Result({})
        objective, counts, rows = subject.whole, Counts(), []
        for pairs in self.pairs.captioned_share(objective.config.image_size, self.context.micro_batch):
            self.context.progress(f"correct captions, pair {pairs[0].number:,} of {len(self.pairs):,}")
            for source, texts in self._write(objective, pairs).items():
                for pair, text in zip(pairs, texts, strict=True):
                    one = count(text, pair, self.pairs.languages)
                    counts += Counts({(source, *of): n for of, n in one.items()})
                    if source == WHOLE:
                        rows.append((pair.number, {"key": pair.key, "written": text, "true": pair.captions}))
        counts = sum(hardware.gather([counts]), Counts())
        rows = gather_numbered(rows)
        self.pairs.report()
        metrics = {
            f"{source}/{kind}": counts[source, kind, "correct"] / n
            for (source, kind, which), n in counts.items()
            if which == "all"
        }
        about = {"method": "correct captions", "encoder": self.encoder_name(subject)}
        about |= {"data": name_of_pairs(self.config), "images": len(rows)}
        return Result(metrics, [about | metrics], rows)

    @torch.inference_mode()
    def _write(self, objective: Any, pairs: list[Pair]) -> dict[str, list[str]]:
        """Returns the captions written from the whole images, and from their visible patches where there are some."""
        image_BCHW, beams = images_of(pairs), self.config.beams
        written = {WHOLE: objective.caption(image_BCHW, beams)}
        if isinstance(objective, CaptionsVisible):
            position_B = torch.tensor([pair.number for pair in pairs], device=image_BCHW.device)
            written[VISIBLE] = objective.caption_visible(image_BCHW, position_B, beams)
        return {source: self.context.decode(tokens_BT) for source, tokens_BT in written.items()}


def count(written: str, pair: Pair, languages: tuple[str, ...]) -> Counter[tuple[str, str]]:
    """Returns the numbers of captions and of their parts: by kind, "all" and those that are "correct"."""
    correct = words(written) in map(words, pair.captions)
    counts = Counter({("captions", "all"): 1, ("captions", "correct"): int(correct)})
    for kind, phrases in parts(pair.meta, languages).items():
        counts[kind, "all"] += len(phrases)
        counts[kind, "correct"] += sum(found(phrases, written))
    return counts


def found(phrases: Sequence[str], written: str) -> list[bool]:
    """Returns of each phrase whether its words stand in the written caption; no word there serves two phrases."""
    rest, hits = f" {words(written)} ", []
    for phrase in phrases:
        wanted = f" {words(phrase)} "
        hits.append(wanted in rest)
        rest = rest.replace(wanted, " \n ", 1)
    return hits


def words(caption: str) -> str:
    """Returns the words alone, in lower case, one space between two."""
    return " ".join(re.findall(r"\w+", caption.casefold()))
