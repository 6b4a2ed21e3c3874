"""Fine-tuning on questions about images as users start it, and its evaluation in a language that it did not have."""

import io
import json
from pathlib import Path

import pytest
from launch import rows, run
from PIL import Image

from mug.data.builders.unigram_training import train_unigram
from mug.data.builders.writers import write_tar

SIZES = {"image_size": 16, "patch_size": 8, "width": 32, "depth": 1, "heads": 2, "text_width": 32, "text_heads": 2}
SIZES |= {"text_length": 12, "text_layers": 1, "fusion_layers": 1}
ASKED = {"en": "is it bright?", "de": "ist es hell?"}


def write_questions(folder: Path) -> None:
    for split, count in (("train", 64), ("held_out", 40)):
        members = []
        for i in range(count):
            Image.new("RGB", (16, 16), ((40 + i % 7 if i % 2 else 200 + i % 7),) * 3).save(png := io.BytesIO(), "PNG")
            meta = {"label": "no" if i % 2 else "yes", "captions": ASKED}
            members += [(f"{i:03d}.json", json.dumps(meta).encode()), (f"{i:03d}.png", png.getvalue())]
        write_tar(folder / f"{split}.tar", members)
    (folder / "labels.txt").write_text("no\nyes\n", encoding="utf-8")
    tokenizer = train_unigram([*ASKED.values()] * 9, 1100, ("en", "de"))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


@pytest.mark.slow
def test_questions_are_learned_and_asked_in_every_language(tmp_path):
    pytest.importorskip("sentencepiece")
    write_questions(tmp_path)
    options = {f"--model.{name}": value for name, value in SIZES.items()}
    options |= {"--data.shards": tmp_path / "train.tar", "--data.held_out": tmp_path / "held_out.tar"}
    options |= {"--data.labels": tmp_path / "labels.txt", "--data.tokenizer": tmp_path / "tokenizer.json"}
    options |= {"--data.cache": tmp_path / "cache", "--data.workers": 0, "--output": tmp_path / "run"}
    options |= {"--trainer.global_batch": 32, "--trainer.micro_batch": 16, "--trainer.max_steps": 12}
    options |= {"--trainer.base_learning_rate": 0.04, "--trainer.warmup_samples": 0, "--trainer.eval_every": 12}
    options |= {"--evals.answers.languages": '["en", "de"]', "--config": "run/recipes/answer/statements_tiny.yaml"}
    options |= {"--deepspeed": "ds_configs/zero3.json", "--trainer.log_every": 4}
    done = run(["run/finetune.py", *(str(one) for pair in options.items() for one in pair)])
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = rows(tmp_path / "run", "eval")
    assert found["accuracy/answers, en, trained"] > 0.9
    assert found["accuracy/answers, commonest answer"] == 0.5 and "accuracy/answers, de, zero-shot" in found
    again = run(["run/evaluate.py", str(tmp_path / "run"), "--eval", "answers", "--answers.languages", '["en"]'])
    assert again.returncode == 0, again.stdout + again.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    english = next(one for one in records if one["feature"] == "en")
    assert english["accuracy"] == found["accuracy/answers, en, trained"] and english["test_images"] == 40
