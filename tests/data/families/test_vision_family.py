"""Questions about pictures: rows in both formats, errors for bad rows, VQA accuracy, batches of a processor."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from reft_lightning.base_models.processors import load_processor
from reft_lightning.data.example import placed
from reft_lightning.data.families.vision import vision_family
from reft_lightning.data.families.vqa_accuracy import comparable, vqa_accuracy
from reft_lightning.data.image_data import ImageCollator, ImageData
from reft_lightning.data.pictures import MARK, Picture
from reft_lightning.data.rows import DataSource, read_rows

QUESTIONS = {"prompt": "question", "target": "answers"}
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def processor():
    vision = TINY | {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("llava", text_config=TINY | {"model_type": "llama"}, vision_config=vision)
    return load_processor(config, source="random", tokenizer="bytes")


def picture(folder, name, colour="red"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 30), colour).save(path)
    return name


def write(folder, rows, name="train.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def examples(family, split="train"):
    rows, _ = read_rows(family.task("vision"), split, DataSource("local", "."))
    return [placed(family.task("vision").example, row, where) for row, where in rows]


def one(row, **settings):
    family = vision_family(path="owner/name", source="hub", **(settings or QUESTIONS))
    return placed(family.task("vision").example, row, "train.jsonl, line 3")


class TestRows:
    def test_a_question_has_its_picture_before_it(self, tmp_path):
        row = {"image": picture(tmp_path, "a/1.png"), "question": "Colour?", "answers": "red"}
        (example,) = examples(vision_family(path=str(write(tmp_path, [row])), **QUESTIONS))
        assert (example.prompt, example.target, example.answer) == (f"{MARK}\nColour?", "red", "red")
        assert example.pictures[0].open().size == (20, 30)
        assert example.recorded == {"picture": "a/1.png"}

    def test_the_commonest_answer_is_learnt_and_all_are_kept(self):
        people = ["pink", "red", "red", "rose"]
        found = one({"image": "1.png", "question": "?", "answers": people})
        assert (found.target, found.references) == ("red", tuple(people))
        objects = [{"answer": answer, "answer_id": i} for i, answer in enumerate(people)]
        assert one({"image": "1.png", "question": "?", "answers": objects}).references == tuple(people)

    def test_answers_may_stand_as_json_in_a_cell(self):
        example = one({"image": "1.png", "question": "?", "answers": '["2", "two", "2"]'})
        assert (example.answer, example.references) == ("2", ("2", "two", "2"))
        assert one({"image": "1.png", "question": "?", "answers": "[2"}).answer == "[2"

    def test_a_conversation_keeps_its_marks_and_its_last_answer_is_learnt(self):
        talk = [
            {"from": "human", "value": f"{MARK}\nWhat is this?"}, {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Its colour?"}, {"from": "gpt", "value": "Grey."},
        ]  # fmt: skip
        found = one({"image": "1.png", "conversations": talk}, messages="conversations")
        assert found.turns == (("user", f"{MARK}\nWhat is this?"), ("assistant", "A cat."))
        assert (found.prompt, found.target) == ("Its colour?", "Grey.")
        talk[0]["value"] = "What is this?"
        unmarked = one({"image": "1.png", "conversations": talk}, messages="conversations")
        assert unmarked.turns[0] == ("user", f"{MARK}\nWhat is this?")

    def test_the_hub_s_bytes_and_several_pictures_and_none(self):
        buffer = io.BytesIO()
        Image.new("L", (4, 4)).save(buffer, "PNG")
        cell = {"bytes": buffer.getvalue(), "path": "1.png"}
        found = one({"image": [cell, cell], "question": "Same?", "answers": ["yes"]})
        assert [p.open().mode for p in found.pictures] == ["RGB", "RGB"]
        assert found.prompt == f"{MARK * 2}\nSame?"
        assert one({"image": None, "question": "2 + 2?", "answers": "4"}).pictures == ()
        assert one({"question": "2 + 2?", "answers": "4"}).prompt == "2 + 2?"

    def test_a_photograph_is_seen_as_its_camera_was_held(self, tmp_path):
        lying = Image.new("RGB", (3, 2), "blue")
        lying.putpixel((0, 0), (255, 0, 0))
        about = Image.Exif()
        about[0x0112] = 6  # the camera was turned; viewers rotate the picture back, to the right
        lying.save(tmp_path / "1.png", exif=about)
        seen = Picture("1.png", tmp_path / "1.png").open()
        assert (seen.size, seen.getpixel((1, 0)), seen.getpixel((0, 0))) == ((2, 3), (255, 0, 0), (0, 0, 255))

    @pytest.mark.parametrize(("ending", "order"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2")])
    def test_grey_values_of_16_bits_keep_their_range(self, tmp_path, ending, order):
        values = np.array([[0, 255, 256, 32768, 65535]], order)
        path = tmp_path / f"1.{ending}"
        Image.fromarray(values).save(path)
        seen = np.asarray(Picture("1", path).open())
        assert seen.tolist() == [[[grey] * 3 for grey in (0, 0, 1, 128, 255)]]

    @pytest.mark.parametrize("kind", ["int32", "float32"])
    def test_grey_values_without_a_range_are_refused(self, tmp_path, kind):
        Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "1.tif")
        with pytest.raises(ValueError, match=r"'1\.tif' cannot be read: its grey values are 32-bit numbers"):
            Picture("1.tif", tmp_path / "1.tif").open()

    def test_the_same_question_about_another_picture_is_another_question(self, tmp_path):
        names = [picture(tmp_path, "1.png"), picture(tmp_path, "2.png", "blue"), picture(tmp_path, "3.png")]
        rows = [{"image": name, "question": "Colour?", "answers": "red"} for name in names]
        family = vision_family(path=str(write(tmp_path, rows)), **QUESTIONS)
        first, other, same = examples(family)
        data = ImageData(family, None, DataSource("local", "."), tasks=["vision"], batch_size=1, eval_batch_size=1,
                         validation_size=1)  # fmt: skip
        assert first.content != other.content
        assert data._question(first) == data._question(same) != data._question(other)

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            (
                {"image": 3, "question": "?", "answers": "a"},
                "'image' must contain the name of a picture file, or its bytes; got 3",
            ),
            ({"image": "1.png", "question": " ", "answers": "a"}, "has no question"),
            ({"image": "1.png", "question": "?", "answers": []}, "has no answer"),
            ({"image": "1.png", "question": "?", "answers": [None]}, "has no answer"),
            (
                {"image": "1.png", "question": f"{MARK}{MARK}?", "answers": "a"},
                "as many marks <image> as pictures; got pictures: 1, marks: 2",
            ),
            ({"image": "1.png", "answers": "a"}, "no column 'question'"),
            ({"image": "1.png", "question": "?", "answers": "[]"}, "has no answer"),
            (
                {"image": "1.png", "question": "?", "answers": f"a {MARK}"},
                "the answer contains the mark <image>",
            ),
        ],
    )
    def test_a_bad_row_is_named(self, row, said):
        with pytest.raises(ValueError, match=r"train\.jsonl, line 3") as raised:
            one(row)
        assert said in str(raised.value)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({}, "need either data.prompt and data.target"),
            ({"prompt": "q"}, "need either data.prompt and data.target"),
            (QUESTIONS | {"messages": "m"}, "need either data.prompt and data.target"),
            (QUESTIONS | {"image": None}, "need data.image"),
            ({"prompt": "questio", "target": "answers"}, "no column 'questio'.*did you mean 'question'"),
        ],
    )
    def test_a_bad_setting_is_named(self, tmp_path, settings, said):
        folder = write(tmp_path, [{"image": "1.png", "question": "?", "answers": "a"}])
        with pytest.raises(ValueError, match=said):
            vision_family(path=str(folder), **settings)


def spoil(folder, name, kind):
    if kind == "missing":
        return "lost.png"
    path = Path(folder / picture(folder, name))
    path.write_bytes(path.read_bytes()[:60] if kind == "cut" else b"no picture")
    return name


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "set data.image_folder"),
        ("cut", "cannot be read"),
        ("text", "is not in a format that PIL reads"),
    ],
)
def test_a_bad_picture_is_named_by_file_and_row(tmp_path, kind, said):
    rows = [{"image": picture(tmp_path, f"{i}.png"), "question": f"{i}?", "answers": "red"} for i in range(3)]
    rows[1]["image"] = spoil(tmp_path, "bad.png", kind)
    family = vision_family(path=str(write(tmp_path, rows)), **QUESTIONS)
    settings = {"tasks": ["vision"], "batch_size": 1, "eval_batch_size": 1, "validation_size": 1}
    data = ImageData(family, None, DataSource("local", "."), **settings)
    with pytest.raises(
        ValueError, match=rf"train.jsonl, line 2: .*'{rows[1]['image']}'.*{said}.*skip_invalid"
    ):
        data.check_train()
    data = ImageData(family, None, DataSource("local", "."), skip_invalid=True, **settings)
    data.check_train()
    assert data.data_versions["train"]["vision"]["left_out"] == 1


class TestScores:
    @pytest.mark.parametrize(
        ("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
    )
    def test_the_accuracy_is_the_mean_over_nine_of_ten_people(self, same, expected):
        """If 1 of 10 agrees: 0 others for that person, and 1/3 for each of the nine, so 0.3. By hand for each count."""
        people = ["red"] * same + [f"other {i}" for i in range(10 - same)]
        assert vqa_accuracy("Red", people) == pytest.approx(expected)

    def test_answers_are_compared_in_one_form(self):
        pairs = {
            "The DOG.": "dog", "two": "2", "1,000": "1000", "it's": "its", "3.5": "3.5", "left/right": "left right",
            "a cat, an owl": "cat owl", "none": "0", "zero": "0", "ten": "10", ".5": ".5", "5.": "5", "a.m.": "am",
        }  # fmt: skip
        assert {text: comparable(text) for text in pairs} == pairs

    def test_a_question_has_both_scores_and_a_single_answer_counts_as_ten(self):
        family = vision_family(path="owner/name", source="hub", **QUESTIONS)
        people = one({"question": "?", "answers": ["red"] * 3 + ["pink"] * 7})
        assert family.score([" Red."], people).scores == {
            "vqa_accuracy": pytest.approx(0.9),
            "exact_match": 0.0,
        }
        alone = one({"question": "?", "answers": "red"})
        assert family.score(["red", "blue"], alone).scores == {"vqa_accuracy": 0.5, "exact_match": 0.5}
        assert family.score(["  "], alone).answer is None
        assert family.main_measure(["vision"]) == "vqa_accuracy"

    def test_a_conversation_is_chosen_by_its_loss(self):
        family = vision_family(path="owner/name", source="hub", messages="conversations")
        assert (family.main_measure(["vision"]), family.measures) == ("loss", ("exact_match",))


class TestBatches:
    def rows(self, folder, processor, kinds=(1, 0, 2), **settings):
        rows = []
        for i, count in enumerate(kinds):
            names = [picture(folder, f"{i}_{k}.png", (40 * i, 60 * k, 0)) for k in range(count)]
            rows.append({"image": names, "question": "?" * (i + 1), "answers": "red"})
        family = vision_family(path=str(write(folder, rows)), **QUESTIONS)
        data = ImageData(
            family, processor, DataSource("local", "."), tasks=["vision"], batch_size=3, eval_batch_size=3,
            validation_size=0, group_by_length=False, **settings,
        )  # fmt: skip
        data.setup("fit")
        return data.train_rows

    def test_prompts_end_where_targets_start_and_pictures_take_their_places(self, tmp_path, processor):
        rows = self.rows(tmp_path, processor)
        batch = ImageCollator(processor)([rows[0], rows[1], rows[2]])
        image = processor.image_token_id
        assert (batch["input_ids"] == image).sum(-1).tolist() == [4, 0, 8]
        assert batch["pixel_values"].shape == (3, 3, 28, 28)
        boundary, tokenizer = batch["boundary"], processor.tokenizer
        assert (
            tokenizer.decode(batch["input_ids"][1, :boundary], skip_special_tokens=True)
            == "USER: ?? ASSISTANT: "
        )
        assert (batch["labels"][:, :boundary] == -100).all()
        assert (
            tokenizer.batch_decode(batch["input_ids"][:, boundary:], skip_special_tokens=True) == ["red"] * 3
        )
        assert int((batch["input_ids"][0] == tokenizer.bos_token_id).sum()) == 1

    def test_a_batch_without_pictures_has_no_pixels(self, tmp_path, processor):
        rows = self.rows(tmp_path, processor)
        assert "pixel_values" not in ImageCollator(processor)([rows[1]])

    def test_a_prompt_that_leaves_no_room_is_named(self, tmp_path, processor):
        with pytest.raises(
            ValueError, match=r"train.jsonl, line \d: the prompt has \d+ tokens, pictures included"
        ):
            self.rows(tmp_path, processor, max_length=25)

    def test_the_pixels_are_those_of_the_row_s_pictures(self, tmp_path, processor):
        rows = self.rows(tmp_path, processor)
        batch = ImageCollator(processor)([rows[2], rows[0]])
        alone = ImageCollator(processor)([rows[0]])
        assert torch.equal(batch["pixel_values"][2:], alone["pixel_values"])
