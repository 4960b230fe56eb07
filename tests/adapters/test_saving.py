"""A saved adapter is three files, exact for every variant, and never code."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from adapted_models import adapted
from safetensors.torch import load_file, save_file

import reft_lightning as rl
from reft_lightning.adapters.reft.config import CONFIG_FILE
from reft_lightning.adapters.saving import CARD_FILE, TENSOR_FILE, check_fit
from reft_lightning.integrations.transformers import as_pretrained

METHODS = ["loreft", "noreft", "direft", "direft_orthonormal", "consreft", "lobireft"]
IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def attached(method="loreft", family="llama", **settings):
    torch.manual_seed(3)
    settings = {"rank": 2, "positions": "f1+l2"} | settings
    reft = rl.attach(tiny.model(family), method, **settings).eval()
    with torch.no_grad():
        for parameter in reft.interventions.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return reft


def logits(reft):
    with torch.no_grad():
        return reft(input_ids=IDS, attention_mask=MASK).logits


@pytest.mark.parametrize(
    ("method", "tied"),
    [("loreft", "all"), ("loreft", "position"), *((method, "group") for method in METHODS)],
)
def test_save_and_load_give_equal_logits_and_generate_the_same_ids(method, tied, tmp_path):
    # pyreft: reload forgets settings (D9), cannot read NoReFT and the paper's DiReFT (D37); adapters: DiReFT -> NoReFT
    reft = attached(method, tied=tied, dropout=0.1, dropout_on="output")
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert torch.equal(logits(again), logits(reft))
    generation = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(IDS, **generation), reft.generate(IDS, **generation))
    phi = next(iter(again.interventions["0"]))
    assert (phi.dropout, phi.dropout_on) == (0.1, "output")
    assert again.config == reft.config
    saved, state = (
        load_file(tmp_path / TENSOR_FILE),
        reft.adapter_state_dict(),
    )  # pyreft: d x d bases (D60, D63)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    assert sum(tensor.numel() for tensor in saved.values()) == reft.parameter_count().trainable
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, TENSOR_FILE])


def test_settings_by_layer_and_component_come_back(tmp_path):
    layers = {0: {"rank": 1, "positions": "prompt"}, 2: {"method": "direft"}}
    reft = attached(layers=layers, component="mlp_output")
    reft.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert torch.equal(logits(again), logits(reft))
    assert next(iter(again.interventions["0"])).rank == 1
    assert type(next(iter(again.interventions["2"]))) is rl.DiReFT


def test_saving_again_replaces_the_old_adapter(tmp_path):  # pyreft skips a folder that is not empty (D10)
    attached().save_pretrained(tmp_path)
    other = attached(layers=[1])
    other.save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert torch.equal(logits(again), logits(other))


def test_a_config_cannot_name_code_to_import(tmp_path):  # pyreft imports any class a config names (D72)
    attached().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"method": "subprocess.Popen"}))
    with pytest.raises(ValueError, match=r"unknown intervention 'subprocess\.Popen'"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)


def test_a_folder_without_an_adapter_says_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"reft_config.json is missing; it has notes.txt"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("files", "reader"),
    [
        (["config.json", "intkey_layer.0.bin"], "rl.from_pyreft(model, folder, positions=...)"),
        (["adapter_config.json", "adapter_model.safetensors"], "PeftModel.from_pretrained(model, folder)"),
        (["adapter_config.json", "pytorch_adapter.bin"], "rl.from_adapters(model, folder)"),
    ],
)
def test_a_folder_of_another_library_says_what_reads_it(files, reader, tmp_path):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=rf"reft_config.json is missing; it has .*{re.escape(reader)}$"
    ):
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)


def first_token(prompt, target):
    return prompt & (prompt.cumsum(-1) == 1)


def test_a_position_function_is_passed_again_when_loading(tmp_path):
    reft = attached(positions=first_token)
    reft.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="code is not stored"):
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path, positions=first_token).eval()
    assert torch.equal(logits(again), logits(reft))


def test_a_position_function_of_one_layer_cannot_be_saved(tmp_path):
    reft = attached(layers={0: {"positions": first_token}, 1: {}})
    with pytest.raises(ValueError, match="layer 0 has its own position function"):
        reft.save_pretrained(tmp_path)


def test_a_crash_while_saving_leaves_the_old_adapter(tmp_path, monkeypatch):
    reft = attached()
    reft.save_pretrained(tmp_path)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("reft_lightning.adapters.saving.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        attached(layers=[1]).save_pretrained(tmp_path)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    assert torch.equal(logits(again), logits(reft))


def test_the_model_card_says_how_to_load_and_what_was_set(tmp_path):
    attached().save_pretrained(tmp_path)
    card = (tmp_path / CARD_FILE).read_text()
    assert "rl.ReftModel.from_pretrained" in card
    assert "f1+l2" in card
    assert "2404.03592" in card


@pytest.fixture
def uploads(monkeypatch):
    """What is said to a pretended hub, in order."""
    said = []

    class Api:
        def __init__(self, token=None):
            said.append(("login", token))

        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            said.append(("repository", repo_id, private, exist_ok))

        def create_branch(self, repo_id, *, branch, exist_ok=False):
            said.append(("branch", repo_id, branch, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, revision=None, commit_message=None, create_pr=None):
            files = {path.name for path in Path(folder_path).iterdir()}
            said.append(("files", repo_id, files, revision, commit_message, create_pr))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return said


FILES = {CARD_FILE, CONFIG_FILE, TENSOR_FILE}


def test_push_to_hub_uploads_the_three_files(uploads):
    attached().push_to_hub("me/my-adapter", private=True, token="secret")
    assert uploads == [
        ("login", "secret"),
        ("repository", "me/my-adapter", True, True),
        ("files", "me/my-adapter", FILES, None, None, False),
    ]


def test_a_push_may_name_a_branch_and_a_message(uploads):
    attached().push_to_hub("me/my-adapter", revision="v2", commit_message="Train longer", create_pr=True)
    assert uploads[2:] == [
        ("branch", "me/my-adapter", "v2", True),
        ("files", "me/my-adapter", FILES, "v2", "Train longer", True),
    ]
    as_pretrained(attached()).push_to_hub("me/my-adapter", revision="refs/pr/3")
    assert uploads[-1] == ("files", "me/my-adapter", FILES, "refs/pr/3", None, False)
    assert uploads[-2][0] == "repository"  # that branch is there


def test_what_cannot_be_saved_makes_no_repository(uploads):
    with pytest.raises(ValueError, match="has its own position function"):
        attached(layers={0: {"positions": first_token}, 1: {}}).push_to_hub("me/my-adapter")
    assert [what for what, *_ in uploads] == ["login"]


BROKEN = [
    (
        lambda t: torch.full_like(t, torch.nan),
        r"has NaN or infinite values in .*basis: its training diverged",
    ),
    (lambda t: t.index_fill(0, torch.tensor([1]), -torch.inf), r"has NaN or infinite values in .*basis"),
    (lambda t: t.half().fill_(torch.inf), r"has NaN or infinite values in .*basis"),
    (lambda t: t.mul(100).to(torch.int8), r"has integer weights: .*basis \(int8\)"),
    (lambda t: t.bool(), r"has integer weights: .*basis \(bool\)"),
]


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [*(("loreft", *broken) for broken in BROKEN),
     *((method, *BROKEN[0]) for method in ("peft/lora", "bitfit", "loreft + peft/lora"))],
)  # fmt: skip
def test_tensors_that_are_no_weights_are_refused(method, change, said):
    model = adapted("bert", method)
    state = {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
    name = list(state)[-1]
    with pytest.raises(ValueError, match=said.replace("basis", re.escape(name))):
        model.load_adapter_state_dict(state | {name: change(state[name])})
    assert torch.equal(model.adapter_state_dict()[name], state[name])
    model.load_adapter_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_of_half_precision_load_with_a_warning(dtype, tmp_path, caplog):
    reft = attached()
    reft.save_pretrained(tmp_path)
    state = load_file(tmp_path / TENSOR_FILE)
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, tmp_path / TENSOR_FILE)
    again = rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path).eval()
    (record,) = caplog.records
    assert "lower precision than it was trained with" in record.getMessage()
    assert f"interventions.0.0.basis is {str(dtype)[6:]}, used as float32" in record.getMessage()
    torch.testing.assert_close(logits(again), logits(reft), atol=0.1, rtol=0.1)


def test_heads_of_a_16_bit_base_load_into_float32_without_a_word(caplog):
    own = {"heads.score.weight": torch.zeros(2, 3), "interventions.0.0.bias": torch.zeros(2)}
    check_fit(own, own | {"heads.score.weight": torch.ones(2, 3, dtype=torch.bfloat16)})
    assert caplog.records == []
    check_fit({n: t.bfloat16() for n, t in own.items()}, own)  # the other way round digits are lost
    assert "heads.score.weight is float32, used as bfloat16" in caplog.text


def test_tensors_of_their_own_precision_load_without_a_word(tmp_path, caplog):
    for number, settings in enumerate(({"weight_dtype": "bfloat16"}, {})):
        attached(**settings).save_pretrained(tmp_path / str(number))
        rl.ReftModel.from_pretrained(tiny.model("llama"), tmp_path / str(number))
    wide = attached().double()
    wide.load_adapter_state_dict(load_file(tmp_path / "1" / TENSOR_FILE))
    assert caplog.records == []
