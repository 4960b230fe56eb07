"""Any damaged adapter is refused and leaves the model unchanged, or is the one that was saved."""

import json
import shutil

import pytest
import tiny
import torch
from adapted_models import state_of
from any_input import examples, tried
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reft_lightning import ReftModel, attach

FILES = ("reft_config.json", "reft.safetensors")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 99), st.floats(), st.text(max_size=6),
    st.lists(st.integers(-2, 9), max_size=3), st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(3)
    settings = {"rank": 2, "layers": [0, 2], "positions": "f2+l2", "tied": "group"}
    attach(tiny.model("llama"), "loreft", **settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base():
    return tiny.model("llama")


def answer(model):
    batch = tiny.padded(tiny.rows(5, 7))
    with torch.no_grad():
        return model(**batch).logits


@st.composite
def changes(draw):
    """Draw (file, what is done to it, numbers)."""
    how = draw(st.sampled_from(["cut", "flip", "foreign", "key", "tensor"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    return how, draw(st.sampled_from(FILES)), where, draw(st.integers(0, 7)), draw(VALUES)


def change(folder, how, name, where, bit, value):
    path = folder / name
    content = bytearray(path.read_bytes())
    at = int(where * len(content))
    if how == "cut":
        path.write_bytes(content[:at])
    elif how == "flip":
        content[at] ^= 1 << bit
        path.write_bytes(content)
    elif how == "foreign":
        path.write_bytes((folder / FILES[bit % 2]).read_bytes() if bit else json.dumps(value).encode())
    elif how == "key":
        values = json.loads((folder / FILES[0]).read_text())
        key = sorted(values)[int(where * len(values))]
        values[key] = value
        (folder / FILES[0]).write_text(json.dumps(values))
    else:
        state = load_file(folder / FILES[1])
        key = sorted(state)[int(where * len(state))]
        tensor = state[key]
        other = [tensor[:1], tensor.flip(0)[:0], tensor.half(), tensor.long(), tensor * float("nan"), tensor[..., None],
                 tensor, None]  # fmt: skip
        del state[key]
        if other[bit] is not None:
            state[key if bit != 6 else key + "x"] = other[bit].contiguous()
        save_file(state, folder / FILES[1])


@examples(120)
@given(changed=changes())
def test_any_file_is_refused_or_is_the_adapter_that_was_saved(saved, base, tmp_path, changed):
    folder = shutil.copytree(saved, tmp_path / "adapter", dirs_exist_ok=True)
    change(folder, *changed)
    plain, before = answer(base), state_of(base)
    reft, said = tried(lambda: ReftModel.from_pretrained(base, folder), ValueError, OSError)
    if said is not None:
        assert str(folder) in said
    else:
        if changed[0] == "flip" and changed[1] == FILES[1]:
            right = ReftModel.from_pretrained(tiny.model("llama"), saved)
            for name, tensor in right.adapter_state_dict().items():
                assert torch.equal(reft.adapter_state_dict()[name], tensor)
        if abs(reft.scale) < 1e9:  # a norm squares what it reads
            assert answer(reft).isfinite().all()
        reft.detach()
    assert state_of(base) == before
    assert torch.equal(answer(base), plain)
