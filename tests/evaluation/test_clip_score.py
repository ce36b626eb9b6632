"""The CLIP score of samples and their captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import compare, noise, refusal, write_pngs
from saved_models import save_tokenizer

from speedit_plugins.trainer.evaluation.npz import write_npz


def save_clip(folder: Path) -> str:
    import transformers as t

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    model = t.CLIPModel(
        t.CLIPConfig(
            text_config={**size, "vocab_size": 16, "eos_token_id": 1, "max_position_embeddings": 12},
            vision_config={**size, "image_size": 32, "patch_size": 16},
            projection_dim=8,
        )
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def test_the_score_is_the_mean_cosine_of_samples_and_captions(tmp_path: Path) -> None:
    import transformers as t

    clip = save_clip(tmp_path / "clip-tiny")
    images, captions = noise(5, 32, 32, 3), ["a red apple", "green", "3 left", "a heart", "7 moving left"]
    samples = write_pngs(tmp_path / "a", images)
    lines = [json.dumps({"file_name": f"{i:03d}.png", "caption": text}) for i, text in enumerate(captions)]
    (tmp_path / "a" / "captions.jsonl").write_text("\n".join(lines) + "\n")
    content = compare(
        tmp_path,
        samples=samples,
        evaluation__metrics="[clip_score]",
        evaluation__clip=clip,
        evaluation__batch_size=2,
    )
    metric = content["figures"]["clip_score[clip-tiny]"]
    assert (metric["num_samples"], metric["num_reference"]) == (5, None)
    model = t.CLIPModel.from_pretrained(clip)
    tokenizer = t.AutoTokenizer.from_pretrained(clip)
    # The images have the model's size, so that its preprocessing is only the normalisation.
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    cosines = []
    for image, caption in zip(images, captions, strict=True):
        pixels = ((torch.from_numpy(image) / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.no_grad():
            found = model(**tokenizer([caption], return_tensors="pt"), pixel_values=pixels)
        cosines.append(float(torch.cosine_similarity(found.image_embeds, found.text_embeds)))
    # The tolerance covers padding to longer captions, and float32.
    assert metric["value"] == pytest.approx(100 * np.mean(np.maximum(cosines, 0)), abs=1e-3)


def test_missing_clip_and_captions_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_npz(tmp_path / "samples.npz", noise(40, 8, 8, 3))
    needs = {"samples": tmp_path / "samples.npz", "evaluation__metrics": "[clip_score]"}
    assert "clip_score needs evaluation.clip" in refusal(tmp_path, capfd, **needs)
    clip = save_clip(tmp_path / "clip-tiny")
    assert "clip_score needs the captions of" in refusal(tmp_path, capfd, evaluation__clip=clip, **needs)
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "captions.jsonl").write_text('{"file_name": "000000.png", "caption": "a heart"}\n')
    assert "needs 40 captions, got 1 in" in refusal(tmp_path, capfd, evaluation__clip=clip, **needs)
