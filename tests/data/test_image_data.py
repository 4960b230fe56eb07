"""What processors of other models make of a batch, and that the models read it: without any of their weights."""

import copy

import pytest
import torch
import vision_models
from PIL import Image
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import reft_lightning as rl
from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.example import Example
from reft_lightning.data.image_data import EncodedImages, ImageCollator, processed
from reft_lightning.data.pictures import Picture
from reft_lightning.evaluation import ColumnReader, Decoding, generate, log_likelihood
from reft_lightning.training.objectives.base import inputs_of

# PaliGemma's processor makes arrays of tensors, in an older way of numpy's
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)


def letters(**special):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(special.values())})
    for name, token in special.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def gemma3():
    pictures = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    tokenizer = letters(boi_token="<boi>", eoi_token="<eoi>", image_token="<image>")
    return Gemma3Processor(pictures, tokenizer, image_seq_length=4), tokenizer.image_token_id


def idefics3():
    special = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    tokenizer = letters(**{f"t{i}": token for i, token in enumerate(special)})
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
    )
    return Idefics3Processor(pictures, tokenizer, image_seq_len=4), tokenizer.convert_tokens_to_ids("<image>")


def paligemma():
    pictures = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pictures.image_seq_length = 4
    tokenizer = letters(image_token="<image>")
    return PaliGemmaProcessor(pictures, tokenizer), tokenizer.convert_tokens_to_ids("<image>")


def qwen2_vl():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = letters(**{f"t{i}": f"<|{name}|>" for i, name in enumerate(QWEN)})
    pictures = Qwen2VLImageProcessor(patch_size=14, merge_size=2, min_pixels=56 * 56, max_pixels=56 * 56)
    processor = Qwen2VLProcessor(pictures, tokenizer, video_processor=Qwen2VLVideoProcessor())
    return processor, tokenizer.convert_tokens_to_ids("<|image_pad|>")


QWEN = ("image_pad", "video_pad", "vision_start", "vision_end")
PROCESSORS = {"gemma3": gemma3, "idefics3": idefics3, "paligemma": paligemma, "qwen2_vl": qwen2_vl}


@pytest.fixture(params=PROCESSORS)
def seeing(request):
    """A processor, and a tiny model of its architecture over bytes."""
    if request.param == "qwen2_vl":
        pytest.importorskip(
            "torchvision", reason="its processor of videos needs torchvision, of torch's own build"
        )
    processor, image = PROCESSORS[request.param]()
    sizes = copy.deepcopy(vision_models.CONFIGS[request.param])
    sizes["text_config"] |= {"vocab_size": len(processor.tokenizer)}
    key = "image_token_id" if "image_token_id" in sizes else "image_token_index"
    torch.manual_seed(1)
    others = {
        f"{name}_token_id": image + i
        for i, name in enumerate(("image", "video", "vision_start", "vision_end"))
    }
    own = others if request.param == "qwen2_vl" else {key: image}
    config = AutoConfig.for_model(request.param, **sizes | own)
    model = AutoModelForImageTextToText.from_config(config).eval()
    return request.param, processor, model


def picture(folder, i):
    path = folder / f"{i}.png"
    Image.effect_noise((40, 40), 40.0 + i).save(path)
    return Picture(path.name, path)


def test_rows_with_and_without_pictures_are_read_as_alone(seeing, tmp_path):
    name, processor, base = seeing
    counts = [1, 2, 1] if name == "paligemma" else [1, 0, 2]  # its processor takes no text without a picture
    mark = processor.image_token
    if name == "qwen2_vl":  # as its chat template has it
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
    processor, _ = paligemma()
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
        ValueError, match=r"train\.jsonl, line 3: Strict refuses the row: no picture in 'what\?'"
    ):
        processed(Strict(), example)


def test_an_answer_has_one_blank_before_it_where_the_tokenizer_puts_one_before_every_text(tmp_path):
    """Llama's and so LLaVA's: its own answers begin with one blank, an answer alone would begin with two."""
    processor, _ = idefics3()
    blank = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(blank)
    example = Example(
        "vqa", "<image> Which colour? ASSISTANT:", " red", "red", pictures=(picture(tmp_path, 0),)
    )
    (row,) = EncodedImages(processor, [example], 200)
    ids = processor.tokenizer("x red", add_special_tokens=False)["input_ids"]
    start = len(processor.tokenizer("x", add_special_tokens=False)["input_ids"])
    assert row.target_ids == [*ids[start:], processor.tokenizer.eos_token_id]
