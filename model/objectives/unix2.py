"""ERNIE-UniX²: images and texts of many languages, by an encoder of each, one of both, and a decoder.

Where the paper is silent: a batch of a kind computes the losses of all tasks of that kind, which share one pass through
each part; the states of both encoders' first tokens are projected without bias to `embedding_width`; ITM replaces the
text of half of the samples by one drawn from the group, at random or near the image; MLM hides 15% of the words as BERT
does; there is no dropout. Dimension letters: B batch, V texts a sample, T tokens, L encoded image tokens, R tokens of
all texts packed, S fused sequences, F their states packed, K masked words, D width, E size of an embedding.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from mug.model import flops, interchange
from mug.model.captioning import CaptionTask, autoregressive, masked_language
from mug.model.contrastive import LogitScale, gather, pair_loss
from mug.model.encoder import Encoder
from mug.model.generate import write
from mug.model.likelihood import log_likelihoods
from mug.model.multilingual import (
    FusionEncoder,
    MaskedHead,
    MultilingualConfig,
    MultilingualDecoder,
    MultilingualEncoder,
    fused_rows,
)
from mug.model.objectives.objective import Batch, Context, CoupledObjective, Losses, Metrics, ObjectiveError
from mug.model.presets import ModelConfigError
from mug.model.text_decoder import CaptionHead, TextBlock, pack, packed_rows
from mug.model.texts import as_source, as_target, hard_negatives, lengths_of, mismatched, split_prefix
from mug.model.vit import Block, init_weights

MAX_SCALE = 1000.0  # a temperature of 0.001, as in ALBEF


class Tasks(NamedTuple):
    """The losses of a kind of batch: of embeddings, of masked words, and of text that is written."""

    contrast: str
    masked: str
    written: str


TASKS = {
    "pairs": Tasks("cmcl", "mlm", "vplm"),  # and itm
    "bitext": Tasks("clcl", "", "mt"),
    "text": Tasks("", "mlm", "plm"),
    "image_bitext": Tasks("", "mmmt_mlm", "mmmt"),
}


class Reading(NamedTuple):
    """What is read of a batch.

    texts: sources [B, T] each; those that are not fused stand first, what the decoder writes from stands last.
    alone: how many of them are not fused. masked: the text, by number, that hides words, and what to predict.
    written: what the decoder reads and predicts. matched: bool [B], of the first that is fused, for ITM.
    """

    texts: list[Tensor]
    alone: int = 0
    masked: tuple[int, Tensor] | None = None
    written: CaptionTask | None = None
    matched: Tensor | None = None


class UniX2(CoupledObjective):
    """Reads batches of four kinds, with int64 `position` [B] each, and texts [B, T] as of mug.model.texts:

    pairs: uint8 `image` [B, 3, H, W] and `tokens`, a source. CMCL, ITM, MLM, vPLM.
    bitext: `source` and `target`. CLCL, MT.
    text: `tokens`, a source. MLM, PLM.
    image_bitext: `image`, `source` and `target`. mMMT, and MLM on its source.

    A sample without one of its texts has no loss that needs it. A loss that is not active is not computed.
    """

    Config = MultilingualConfig
    losses: ClassVar = dict.fromkeys(("cmcl", "clcl", "itm", "mlm", "plm", "vplm", "mt", "mmmt", "mmmt_mlm"), 1.0)
    kinds = ("pairs", "bitext", "text", "image_bitext")
    zero3_leaves = (Block, TextBlock)

    def __init__(self, config: MultilingualConfig, context: Context):
        super().__init__(config, context)
        if self.vocabulary.mask is None:
            raise ModelConfigError("objective unix2 needs a tokenizer with a mask token: give one by data.tokenizer")
        if config.itm_negatives == "hard" and "itm" in self.active and "cmcl" not in self.active:
            raise ModelConfigError("model.itm_negatives hard needs CMCL: give loss_weights.cmcl a weight, or random")
        self.encoder = Encoder(config)
        self.encoder.learn_positions()
        self.head = CaptionHead(config.text_width, self.vocabulary)
        self.text_encoder = MultilingualEncoder(config, self.head)
        self.fusion_encoder = FusionEncoder(config)
        self.decoder = MultilingualDecoder(config, self.head)
        self.masked_head = MaskedHead(config.text_width)
        self.match_head = nn.Linear(config.text_width, 1)
        self.image_projection = nn.Linear(config.width, config.embedding_width, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embedding_width, bias=False)
        self.sentence_projection = nn.Linear(config.text_width, config.embedding_width, bias=False)
        self.pair_scale, self.sentence_scale = LogitScale(maximum=MAX_SCALE), LogitScale(maximum=MAX_SCALE)
        self.apply(init_weights)

    # --- What is read of a batch ------------------------------------------------------------------------------

    def shared(self, batch: Batch) -> tuple[str, ...]:
        """Returns what ITM draws other texts from."""
        draws = "itm" in self.active and kind_of(batch) == "pairs" and "texts" not in batch
        return ("tokens", "position") if draws else ()

    def prepare(self, batch: Batch) -> Batch:
        """Adds all that is read of the batch, so that nothing waits for a GPU; a batch that has it stays as it is.

        int64 `texts` [V·B, T] and `text_rows` [R], which of their tokens there are; `fused_rows` [F] and
        `fused_lengths` [S]; `memory_rows`, those among F that the decoder sees; `masked_rows` [K], those to predict
        `masked_targets` at; `written` [B, T], its packed `written_rows`, their `written_targets`, and `kept_rows`,
        which of these there are. bool `matched` [B].
        """
        if "texts" in batch and "itm_texts" not in batch:
            return batch
        reading, pad = self._reading(batch), self.vocabulary.pad
        prepared = copy.copy(batch)  # which keeps its kind
        for name in ("itm_texts", *(f"group/{name}" for name in self.shared(batch))):
            prepared.pop(name, None)
        T = max(text.shape[1] for text in reading.texts)
        prepared["texts"] = torch.cat([_padded(text, T, pad) for text in reading.texts])
        prepared["text_rows"] = packed_rows(self._lengths(prepared["texts"]), T)
        if reading.alone < len(reading.texts):
            prepared |= self._fused(prepared, reading)
        if reading.written is not None:
            row_R = packed_rows(reading.written.lengths_B, reading.written.inputs.shape[1])
            target_R = reading.written.targets.flatten()[row_R]
            prepared |= {"written": reading.written.inputs, "written_rows": row_R, "written_targets": target_R}
            prepared["kept_rows"] = (target_R != pad).nonzero().squeeze(1)
        if reading.matched is not None:
            prepared["matched"] = reading.matched
        return prepared

    def _fused(self, batch: Batch, reading: Reading) -> dict[str, Tensor]:
        """Returns where the sequences that are fused begin, and what is predicted of their words."""
        B, L, (_, T) = len(batch["position"]), self._image_tokens(batch), batch["texts"].shape
        lengths = self._lengths(batch["texts"]).clamp(min=1)
        row_F, text_F = fused_rows(lengths, reading.alone * B, L, B)
        lengths_S = 1 + L + lengths[reading.alone * B :]
        memory = int(lengths_S[-B:].sum())
        rows = {"fused_rows": row_F, "fused_lengths": lengths_S}
        rows["memory_rows"] = torch.arange(len(row_F) - memory, len(row_F), device=row_F.device)
        if reading.masked is not None:
            number, target_BT = reading.masked
            target = torch.full_like(batch["texts"], self.vocabulary.pad)
            target[number * B : (number + 1) * B] = _padded(target_BT, T, self.vocabulary.pad)
            target_R = target.flatten()[batch["text_rows"]][-int(text_F.sum()) :]  # of the texts that are fused
            masked_R = target_R != self.vocabulary.pad
            rows |= {"masked_rows": text_F.nonzero().squeeze(1)[masked_R], "masked_targets": target_R[masked_R]}
        return rows

    def _reading(self, batch: Batch) -> Reading:
        if not self._names(batch):
            raise ObjectiveError(f"no loss of {kind_of(batch)} data has a weight: leave out that stream")
        read = {"pairs": self._of_pairs, "bitext": self._of_bitext, "text": self._of_text}
        return read.get(kind_of(batch), self._of_image_bitext)(batch)

    def _of_pairs(self, batch: Batch) -> Reading:
        tokens_BT, position_B = batch["tokens"], batch["position"]
        texts, matched = ([tokens_BT] if "cmcl" in self.active else []), None
        alone = len(texts)
        if "itm" in self.active:
            group_MT = batch.get("group/tokens", tokens_BT)
            group_M = batch.get("group/position", position_B)
            pad, seed = self.vocabulary.pad, self.context.seed
            text_BT = batch.get("itm_texts")
            if text_BT is None:
                text_BT = mismatched(tokens_BT, position_B, group_MT, group_M, pad, seed)
            texts.append(text_BT)
            matched = (text_BT == tokens_BT).all(1)
        return self._with_words(batch, Reading(texts, alone, matched=matched))

    def _of_text(self, batch: Batch) -> Reading:
        return self._with_words(batch, Reading([]))

    def _with_words(self, batch: Batch, reading: Reading) -> Reading:
        """Returns the reading, and a text of masked words and one that is cut in two."""
        tasks, texts, masked, written = TASKS[kind_of(batch)], [*reading.texts], None, None
        if tasks.masked in self.active:
            hidden_BT, target_BT = self._masked(batch["tokens"], batch["position"])
            masked = len(texts), target_BT
            texts.append(hidden_BT)
        if tasks.written in self.active:
            arguments = batch["tokens"], batch["position"], self.vocabulary, self.context.seed
            prefix_BT, target_BT = split_prefix(*arguments)
            written = self._written(target_BT, batch)
            texts.append(prefix_BT)
        return reading._replace(texts=texts, masked=masked, written=written)

    def _of_bitext(self, batch: Batch) -> Reading:
        texts, writes = [batch["source"]], "mt" in self.active
        if "clcl" in self.active:
            texts.insert(0, as_source(batch["target"], self.vocabulary))
        written = self._written(self._translation(batch), batch) if writes else None
        return Reading(texts, len(texts) - writes, written=written)

    def _of_image_bitext(self, batch: Batch) -> Reading:
        hidden_BT, target_BT = self._masked(batch["source"], batch["position"])
        masked = (0, target_BT) if "mmmt_mlm" in self.active else None
        written = self._written(self._translation(batch), batch) if "mmmt" in self.active else None
        return Reading([hidden_BT], 0, masked, written)

    def _masked(self, tokens_BT: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Returns texts with hidden words, and what these were, PAD elsewhere."""
        task, pad = masked_language(tokens_BT, position_B, self.vocabulary, self.context.seed), self.vocabulary.pad
        ends_BT = (task.inputs == pad) & (tokens_BT != pad)  # a random word that is PAD would cut the text short
        assert self.vocabulary.mask is not None
        return task.inputs.masked_fill(ends_BT, self.vocabulary.mask), task.targets

    def _translation(self, batch: Batch) -> Tensor:
        """Returns the targets of the samples that have a source."""
        no_source_B1 = batch["source"][:, :1] == self.vocabulary.pad
        return batch["target"].masked_fill(no_source_B1, self.vocabulary.pad)

    def _written(self, target_BT: Tensor, batch: Batch) -> CaptionTask:
        return autoregressive(target_BT, batch["position"], self.vocabulary, self.context.seed)

    # --- Losses -----------------------------------------------------------------------------------------------

    def counts(self, batch: Batch) -> dict[str, int]:
        """Returns the numbers of samples that have all they need, of masked words, and of tokens to write."""
        batch, tasks = self.prepare(batch), TASKS[kind_of(batch)]
        counts = {tasks.masked: "masked_rows", tasks.written: "kept_rows"}
        counts = {name: len(batch[rows]) for name, rows in counts.items() if name in self.active}
        samples = {name: int(self._complete(batch).sum()) for name in (tasks.contrast, "itm")}
        return {name: (counts | samples)[name] for name in self._names(batch)}

    def flops(self, batch: Batch) -> float:
        """Returns FLOP without padding of texts."""
        batch, config, B = self.prepare(batch), self.config, len(batch["position"])
        width, words, image = config.text_width, self.vocabulary.size, self._image_tokens(batch)
        total = flops.blocks(width, config.text_layers, *_sums(self._lengths(batch["texts"])))
        if image:
            total += B * flops.encoder(config)
        if TASKS[kind_of(batch)].contrast in self.active:
            total += flops.linear(B, (config.width if image else width) + width, config.embedding_width)
        if "fused_rows" in batch:
            total += flops.blocks(width, config.fusion_layers, *_sums(batch["fused_lengths"]))
            total += flops.linear(B * image, config.width, width)
        if "masked_rows" in batch:
            total += flops.mlp(len(batch["masked_rows"]), (width, width, words))
        if "written" in batch:
            written_B = self._lengths(batch["written"])
            tokens, pairs = _sums(written_B)
            sizes = zip(written_B.tolist(), batch["fused_lengths"][-B:].tolist(), strict=True)
            cross = sum(flops.cross_attention(queries, memory, width, width) for queries, memory in sizes)
            total += flops.blocks(width, config.decoder_layers, tokens, pairs / 2) + config.decoder_layers * cross
            total += flops.linear(len(batch["kept_rows"]), width, words)
        return total

    def features(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        batch, B = self.prepare(batch), len(batch["position"])
        text_RD, cls_VD = self._read(batch["texts"], batch["text_rows"])
        image_BLD = self.encoder(batch["image"]) if self._image_tokens(batch) else None
        rest = image_BLD, text_RD
        if TASKS[kind_of(batch)].contrast not in self.active:
            return {}, rest
        valid_B = self._complete(batch)
        if image_BLD is None:
            target_BE, source_BE = _unit(self.sentence_projection(cls_VD[: 2 * B])).chunk(2)
            return {"source": source_BE, "target": target_BE, "valid": valid_B}, rest
        image_BE, text_BE = _unit(self.image_projection(image_BLD[:, 0])), _unit(self.text_projection(cls_VD[:B]))
        drawn_from = {name: batch[name] for name in ("tokens", "position")} if self.draws(batch) else {}
        return {"image": image_BE, "text": text_BE, "valid": valid_B, **drawn_from}, rest

    def draws(self, batch: Batch) -> bool:
        """Whether ITM's negatives are hard. Of held-out batches they are at random, as the one pass has them."""
        return self.config.itm_negatives == "hard" and "itm" in self.active and kind_of(batch) == "pairs"

    def draw(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns `itm_texts` [B, T]: half are those of other samples, on any rank, near the image by CMCL. Texts
        alone are exchanged; images stay where they are."""
        text_ME, group_MT, group_M = (gather(features[name]) for name in ("text", "tokens", "position"))
        logits_BM = features["image"] @ text_ME.T * self.pair_scale()
        tokens_BT, position_B, seed = features["tokens"], features["position"], self.context.seed
        pad = self.vocabulary.pad
        return {"itm_texts": hard_negatives(logits_BM, tokens_BT, position_B, group_MT, group_M, pad, seed)}

    def coupled_losses(self, features: dict[str, Tensor]) -> tuple[Losses, Metrics]:
        """Returns the sum of both directions (equation 1), and the mean of their accuracies."""
        if "image" in features:
            name, scale, sides = "cmcl", self.pair_scale, ("image", "text")
        else:
            name, scale, sides = "clcl", self.sentence_scale, ("source", "target")
        loss, accuracy = pair_loss(features[sides[0]], features[sides[1]], scale(), features["valid"])
        return {name: 2 * loss}, {f"accuracy/{name}": accuracy}

    def own_losses(self, batch: Batch, rest: tuple[Tensor | None, Tensor]) -> tuple[Losses, Metrics]:
        batch, tasks, found = self.prepare(batch), TASKS[kind_of(batch)], {}
        if "fused_rows" not in batch:
            return {}, {}
        x_FD, starts = self._fuse(*rest, batch["fused_rows"], batch["fused_lengths"])
        if "matched" in batch:
            found["itm"] = self._match_loss(x_FD[starts[: len(batch["matched"])].long()], batch)
        if "masked_rows" in batch:
            hidden_KD, target_K = self.masked_head(x_FD[batch["masked_rows"]]), batch["masked_targets"]
            kept_K = torch.arange(len(target_K), device=target_K.device)
            found[tasks.masked] = self.head(hidden_KD, target_K, kept_K)
        if "written" in batch:
            found[tasks.written] = self._writing_loss(x_FD[batch["memory_rows"]], starts, batch)
        losses = {name: loss for name, (loss, _) in found.items()}
        return losses, {f"accuracy/{name}": accuracy for name, (_, accuracy) in found.items()}

    def _read(self, texts: Tensor, row_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the states of texts [V, T], packed [R, D], and of the first token of each, [V, D]."""
        packing = pack(self._lengths(texts), texts.shape[1], 0, row_R)
        text_RD = self.text_encoder(texts, packing)
        return text_RD, text_RD[packing.starts[:-1].long()]

    def _fuse(
        self, image_BLD: Tensor | None, text_RD: Tensor, row_F: Tensor, lengths_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the states of the fused sequences, packed [F, D], and where each begins, int32 [S + 1]."""
        image = 0 if image_BLD is None else image_BLD.shape[1]
        packing = pack(lengths_S, 1 + image + self.config.text_length + 1, 0, row_F)
        return self.fusion_encoder(image_BLD, text_RD, row_F, packing), packing.starts

    def _match_loss(self, cls_BD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (loss, accuracy) of telling whether image and text belong together (equation 3)."""
        logit_B, matched_B = self.match_head(cls_BD)[:, 0].float(), batch["matched"]
        valid_B = self._complete(batch).float()
        count = valid_B.sum().clamp(min=1)
        loss_B = binary_cross_entropy_with_logits(logit_B, matched_B.float(), reduction="none")
        hit_B = (logit_B.detach() > 0) == matched_B
        return loss_B @ valid_B / count, hit_B.float() @ valid_B / count

    def _writing_loss(self, memory: Tensor, starts: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (loss, accuracy) of what is written from the last fused sequences, their states packed."""
        B, T = batch["written"].shape
        longest = 1 + self._image_tokens(batch) + batch["texts"].shape[1]
        packing = pack(self._lengths(batch["written"]), T, 0, batch["written_rows"])
        packing = packing._replace(memory_starts=starts[-B - 1 :] - starts[-B - 1], longest_memory=longest)
        hidden_RD = self.decoder(batch["written"], memory, packing=packing)
        return self.head(hidden_RD, batch["written_targets"], batch["kept_rows"])

    # --- Abilities --------------------------------------------------------------------------------------------

    def load_language_model(self, state: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
        interchange.load_language_model(self, state, settings)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Returns the masked words, those to write, and of ITM whether image and text belong together."""
        batch, tasks, found = self.prepare(batch), TASKS[kind_of(batch)], {}
        if "masked_rows" in batch:
            found[tasks.masked] = batch["masked_targets"]
        if "written" in batch:
            found[tasks.written] = batch["written_targets"][batch["kept_rows"]]
        if "matched" in batch:
            found["itm"] = batch["matched"][self._complete(batch)].long()
        return found

    def chance(self, samples: int) -> dict[str, float]:
        """Returns the contrast of both directions, of embeddings that are all the same."""
        return dict.fromkeys(("cmcl", "clcl"), 2 * math.log(samples))

    def embed_image(self, image_BCHW: Tensor) -> Tensor:
        return _unit(self.image_projection(self.encoder(image_BCHW)[:, 0]))

    def embed_text(self, tokens_BT: Tensor) -> Tensor:
        return _unit(self.text_projection(self._read(tokens_BT)[1]))

    def embed_sentence(self, tokens_BT: Tensor) -> Tensor:
        """As CLCL does; of a model without it, as CMCL."""
        project = self.sentence_projection if "clcl" in self.active else self.text_projection
        return _unit(project(self._read(tokens_BT)[1]))

    def languages(self) -> tuple[str, ...]:
        return self.vocabulary.languages

    def check_captions(self) -> None:
        if "vplm" not in self.active:
            raise ObjectiveError("the model never learned to write captions: its loss_weights.vplm is 0")

    def caption(self, image_BCHW: Tensor, beams: int = 1, language: int = 0) -> Tensor:
        first = self.vocabulary.language_ids[language : language + 1]
        return self._write(self._memory_of_images(self.encoder(image_BCHW), first), language, beams)

    def caption_log_likelihoods(self, image_BCHW: Tensor, tokens_CT: Tensor) -> Tensor:
        """As of ScoresCaptions; the captions are sources, each to write in its language."""
        image_BLD, target_CT = self.encoder(image_BCHW), as_target(tokens_CT, self.vocabulary)
        found_BC = torch.empty(len(image_BLD), len(target_CT), device=image_BLD.device)
        for first in target_CT[:, 0].unique().tolist():
            memory_BLD = self._memory_of_images(image_BLD, [first] if self.languages() else [])
            here_C = target_CT[:, 0] == first
            found_BC[:, here_C] = log_likelihoods(self.decoder, self.vocabulary.pad, memory_BLD, target_CT[here_C])
        return found_BC

    def check_translations(self) -> None:
        if not {"mt", "mmmt"} & {*self.active}:
            raise ObjectiveError(
                "the model never learned to translate: its loss_weights.mt and loss_weights.mmmt are 0"
            )

    def translate(self, source_BT: Tensor, language: int, beams: int = 1, image_BCHW: Tensor | None = None) -> Tensor:
        memory_BLD, lengths_B = self._memory(source_BT, None if image_BCHW is None else self.encoder(image_BCHW))
        return self._write(memory_BLD, language, beams, lengths_B)

    def _memory(self, source_BT: Tensor, image_BLD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the fused states, [B, L', D] with padding after them, and how many each has, int64 [B]."""
        B, L = len(source_BT), 0 if image_BLD is None else image_BLD.shape[1]
        text_B = self._lengths(source_BT).clamp(min=1)
        lengths_B = 1 + L + text_B
        x_FD, _ = self._fuse(image_BLD, self._read(source_BT)[0], fused_rows(text_B, 0, L, B)[0], lengths_B)
        kept_BL = torch.arange(int(lengths_B.max()), device=lengths_B.device) < lengths_B[:, None]
        memory_BLD = x_FD.new_zeros(*kept_BL.shape, x_FD.shape[1])
        memory_BLD[kept_BL] = x_FD
        return memory_BLD, lengths_B

    def _memory_of_images(self, image_BLD: Tensor, language: Sequence[int]) -> Tensor:
        """Returns [B, L', D], the fused states of images without words, to write in the language of this token."""
        nothing = [self.vocabulary.bos, self.vocabulary.eos, *language]
        return self._memory(torch.tensor(nothing, device=image_BLD.device).expand(len(image_BLD), -1), image_BLD)[0]

    def _write(self, memory_BLD: Tensor, language: int, beams: int, lengths_B: Tensor | None = None) -> Tensor:
        """Returns what the decoder writes in a language: BOS … EOS PAD."""
        first = self.vocabulary.language_ids[language : language + 1]
        written_BT = write(self.decoder, self.vocabulary, memory_BLD, beams, first, lengths_B).clone()
        written_BT[:, 0] = self.vocabulary.bos
        return written_BT

    # --- Of a batch -------------------------------------------------------------------------------------------

    def _names(self, batch: Batch) -> list[str]:
        """Returns the active losses of this kind of batch."""
        names = (*TASKS[kind_of(batch)], *(["itm"] if kind_of(batch) == "pairs" else []))
        return [name for name in self.active if name in names]

    def _complete(self, batch: Batch) -> Tensor:
        """bool [B], which samples have all of their texts."""
        texts = [batch[name] for name in ("tokens", "source", "target") if name in batch]
        return torch.stack([text[:, 0] != self.vocabulary.pad for text in texts]).all(0)

    def _image_tokens(self, batch: Batch) -> int:
        """L; 0 of a batch without images."""
        return 1 + self.config.patches if kind_of(batch) in ("pairs", "image_bitext") else 0

    def _lengths(self, tokens: Tensor) -> Tensor:
        return lengths_of(tokens, self.vocabulary)


def kind_of(batch: Batch) -> str:
    """Returns the kind of a batch; pairs unless it has one."""
    return getattr(batch, "kind", "pairs")


def _unit(x: Tensor) -> Tensor:
    return normalize(x.float(), dim=-1)


def _padded(tokens_BT: Tensor, T: int, pad: int) -> Tensor:
    return nn.functional.pad(tokens_BT, (0, T - tokens_BT.shape[1]), value=pad)


def _sums(lengths: Tensor) -> tuple[float, float]:
    """Returns the sums of lengths, and of their squares."""
    return float(lengths.sum()), float(lengths.square().sum())
