"""Batches from the processors of other models, which their models can read; no weights are needed."""

import pytest
import torch
import vision_models
from PIL import Image
from tokenizers import normalizers

import reft_lightning as rl
from reft_lightning.data.example import Example
from reft_lightning.data.image_data import EncodedImages, ImageCollator, processed
from reft_lightning.data.pictures import Picture
from reft_lightning.evaluation import ColumnReader, Decoding, generate, log_likelihood
from reft_lightning.training.objectives.base import inputs_of

# PaliGemma's processor converts tensors to arrays in a way that numpy has deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)


@pytest.fixture(params=vision_models.PROCESSORS)
def seeing(request):
    """A processor, and a tiny model of its architecture over bytes."""
    if request.param == "qwen2_vl":
        pytest.importorskip(
            "torchvision", reason="its processor of videos needs torchvision, of torch's own build"
        )
    return request.param, *vision_models.with_processor(request.param)


def picture(folder, i):
    path = folder / f"{i}.png"
    Image.effect_noise((40, 40), 40.0 + i).save(path)
    return Picture(path.name, path)


def test_rows_with_and_without_pictures_are_read_as_alone(seeing, tmp_path):
    name, processor, base = seeing
    counts = [1, 2, 1] if name == "paligemma" else [1, 0, 2]  # its processor requires a picture
    mark = processor.image_token
    if name == "qwen2_vl":  # as in its chat template
        mark = f"<|vision_start|>{mark}<|vision_end|>"
    examples = [
        Example(
            "vision", mark * count + "what" + "?" * (i + 1), "red" * (i + 1), "red",
            pictures=tuple(picture(tmp_path, 10 * i + k) for k in range(count)), source=f"row {i}",
        )
        for i, count in enumerate(counts)
    ]  # fmt: skip
    rows = EncodedImages(processor, examples, 200)
    collate = ImageCollator(processor)
    batch = collate(list(rows))
    image = base.config.image_token_id
    assert ((batch["input_ids"] == image).sum(-1) == 4 * torch.tensor(counts)).all()
    torch.manual_seed(2)
    reft = rl.attach(base, "loreft", rank=2, positions="image+l2").eval()
    with torch.no_grad():
        whole = reft(**inputs_of(batch)).logits
        likelihood = log_likelihood(ColumnReader(reft), batch)
    texts = generate(reft, batch, processor.tokenizer, Decoding(3))
    for i in range(3):
        alone = collate([rows[i]])
        kept = len(rows[i].target_ids) + 1
        with torch.no_grad():
            expected = reft(**inputs_of(alone)).logits
        torch.testing.assert_close(whole[i, :kept], expected[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(
            likelihood[i : i + 1], log_likelihood(ColumnReader(reft), alone), atol=1e-3, rtol=1e-3
        )
        assert generate(reft, alone, processor.tokenizer, Decoding(3)) == [texts[i]]


def test_a_prefix_that_is_read_both_ways_ends_where_the_target_starts(tmp_path):
    processor, _ = vision_models.paligemma()
    example = Example(
        "vision", "<image>what?", "red", "red", pictures=(picture(tmp_path, 1),), source="row 0"
    )
    rows = EncodedImages(processor, [example], 200)
    batch = ImageCollator(processor)([rows[0]])
    assert batch["token_type_ids"].tolist() == [[0] * batch["boundary"] + [1] * 4]


def test_what_a_processor_refuses_is_named_by_its_row():
    class Strict:
        def __call__(self, **given):
            raise ValueError(f"no picture in {given['text'][0]!r}")

    example = Example("vision", "what?", "red", "red", pictures=(), source="train.jsonl, line 3")
    with pytest.raises(
        ValueError, match=r"train\.jsonl, line 3: Strict rejects the row: no picture in 'what\?'"
    ):
        processed(Strict(), example)


def test_an_answer_has_one_blank_before_it_where_the_tokenizer_puts_one_before_every_text(tmp_path):
    """With Llama's and LLaVA's tokenizer, answers begin with one blank; encoded separately, with two."""
    processor, _ = vision_models.idefics3()
    blank = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(blank)
    example = Example(
        "vqa", "<image> Which colour? ASSISTANT:", " red", "red", pictures=(picture(tmp_path, 0),)
    )
    (row,) = EncodedImages(processor, [example], 200)
    ids = processor.tokenizer("x red", add_special_tokens=False)["input_ids"]
    start = len(processor.tokenizer("x", add_special_tokens=False)["input_ids"])
    assert row.target_ids == [*ids[start:], processor.tokenizer.eos_token_id]
