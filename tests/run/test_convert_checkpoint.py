"""Checkpoints of format 2, as the version before format 3 wrote them, converted: what format 3 says of them."""

import json
import sys

import pytest
import torch

from mug.run import convert_checkpoint
from mug.run.common.errors import RunError
from mug.run.state import checkpoint
from mug.run.state.restore import model_of
from mug.run.state.sharded_state import (
    KINDS,
    ParamSlice,
    SavedState,
    digest_of,
    hexadecimal,
    load_weights,
    write_pieces,
)

SIZES = {"preset": "tiny", "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2}
MUG_SIZES = SIZES | {"pixel_width": 16, "pixel_depth": 1, "pixel_heads": 2, "text_width": 16, "text_heads": 2}
MUG_SIZES |= {"text_unimodal_layers": 1, "text_cross_layers": 1, "text_length": 8, "tied_head": True}
MUG_SIZES |= {"captioning": "autoregressive", "mask_ratio": 0.75, "normalize_patches": True}
VOCABULARY = {"size": 20, "pad": 0, "bos": 1, "eos": 2, "mask": 3}
PRETRAINED = {
    "model": {"objective": {"name": "mug", "seed": 7}, "vocabulary": VOCABULARY, "config": MUG_SIZES},
    "recipe": {"loss_weights": {"pixels": 1.0, "caption": 0.0}, "data": {"ahead": 4}, "model": MUG_SIZES, "seed": 7},
    "data": {"version": 2, "next_position": 16, "ledger": {"entries": 0, "sha256": ""}},
}
CLASSIFIER = {
    "model": {
        "config": MUG_SIZES | {"mask_ratio": 0.75},
        "classifier": {"pool": "mean", "norm_eps": 1e-6, "names": ["cat", "dog"]},
    },
    "recipe": {
        "model": {**SIZES, "width": None, "drop_path": 0.2, "norm_eps": 1e-6, "pool": "mean"},
        "data": {"central_share": 0.9},
        "seed": 5,
    },
    "data": {"version": 2, "next_position": 16},
}


def write(monkeypatch, output, manifest, weights):
    """A run's folder of format 2, with weights in two files a kind."""
    partial, files, digests = checkpoint.open_partial(output, 4), {}, {}
    for kind in KINDS:
        digests[kind] = 0
        for rank in range(2):
            pieces = {
                ParamSlice(name, rank * (len(flat) // 2)): flat[: len(flat) // 2]
                if rank == 0
                else flat[len(flat) // 2 :]
                for name, flat in weights.items()
            }
            name = f"{kind}-{rank:05}-of-00002.safetensors"
            files[name], digest = write_pieces(partial / name, pieces)
            digests[kind] += digest
    state = manifest | {"digests": {kind: hexadecimal(value) for kind, value in digests.items()}, "adam_steps": 4}
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.commit(output, 4, files, state, {"tokenizer.json": "{}"} if "vocabulary" in manifest["model"] else {}, 1)
    monkeypatch.undo()
    (output / "metrics.jsonl").write_text("{}\n", encoding="utf-8")


def convert(monkeypatch, capsys, *folders):
    class Console:
        warn = info = staticmethod(print)

    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, folders)])
    convert_checkpoint.main(Console())
    return capsys.readouterr().out


def weights_of(manifest) -> dict[str, torch.Tensor]:
    """Of a model as format 3 describes it, flat."""
    torch.manual_seed(0)
    return {name: torch.randn(p.numel()) for name, p in model_of(manifest).named_parameters()}


def test_pre_training_keeps_its_files_and_is_described_again(tmp_path, monkeypatch, capsys):
    context = {"seed": 7, "vocabulary": VOCABULARY, "class_names": [], "losses": ["pixels"]}
    described = {"objective": "mug", "config": MUG_SIZES, "context": context}
    weights = weights_of({"model": described})
    write(monkeypatch, tmp_path / "old", PRETRAINED, weights)
    with pytest.raises(
        RunError, match=r"format 2, not 3; convert it: python run/convert_checkpoint\.py \S+/checkpoint-4 NEW"
    ):
        checkpoint.resume(tmp_path / "old", pytest.fail)
    assert "old/checkpoint-4 to " in convert(monkeypatch, capsys, tmp_path / "old", tmp_path / "new")
    with pytest.raises(RunError, match="checkpoint-4 already has the current format, 3: there is nothing to convert"):
        convert(monkeypatch, capsys, tmp_path / "new", tmp_path / "newer")
    found = checkpoint.newest(tmp_path / "new", pytest.fail)
    old = json.loads((tmp_path / "old" / "checkpoint-4" / "manifest.json").read_text(encoding="utf-8"))
    assert found.manifest["model"] == described
    assert found.manifest["digests"] == old["digests"] and found.manifest["files"] == old["files"]
    assert found.manifest["data"] == {"version": 2, "next_position": 16, "bad_samples": {"entries": 0, "sha256": ""}}
    for name in old["files"]:
        assert (found.folder / name).samefile(tmp_path / "old" / "checkpoint-4" / name)
    assert (tmp_path / "new" / "metrics.jsonl").is_file()
    model = model_of(found.manifest)
    load_weights(model, SavedState(found.folder))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), weights[name]), name


def test_a_classifier_s_norm_is_now_the_encoder_s(tmp_path, monkeypatch, capsys):
    context = {"seed": 5, "vocabulary": None, "class_names": ["cat", "dog"], "losses": ["class"]}
    config = SIZES | {"drop_path": 0.2, "norm_eps": 1e-6, "pool": "mean"}
    described = {"objective": "classify", "config": config, "context": context}
    weights = weights_of({"model": described})
    then = {name.replace("encoder.norm.", "norm."): values for name, values in weights.items()}
    assert "norm.weight" in then
    write(monkeypatch, tmp_path / "old", CLASSIFIER, then)
    convert(monkeypatch, capsys, tmp_path / "old" / "checkpoint-4", tmp_path / "new")
    found = checkpoint.newest(tmp_path / "new", pytest.fail)
    assert found.manifest["model"] == described
    assert found.manifest["recipe"]["data"]["crop_pct"] == 0.9
    assert found.manifest["recipe"]["model"] == config
    whole = sum(digest_of(ParamSlice(name, 0), values.numpy()) for name, values in weights.items())
    assert found.manifest["digests"] == dict.fromkeys(KINDS, hexadecimal(whole))
    model = model_of(found.manifest)
    load_weights(model, SavedState(found.folder))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), weights[name]), name


def test_what_cannot_be_converted_is_refused(tmp_path, monkeypatch, capsys):
    write(monkeypatch, tmp_path / "old", CLASSIFIER | {"model": {"config": SIZES, "segmenter": {}}}, {})
    for folders, line in (
        (("old", "new"), "is not a checkpoint of pretrain.py or finetune.py"),
        (("old", "old"), "old holds checkpoints: choose another directory"),
        (("none", "new"), "none does not hold a checkpoint"),
    ):
        with pytest.raises(RunError, match=line):
            convert(monkeypatch, capsys, *(tmp_path / folder for folder in folders))
    assert not (tmp_path / "new").exists()
