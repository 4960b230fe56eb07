"""A damaged file is named, with what is wrong in it, in one line."""

import pytest

from reft_lightning.storage.reading import read_json, read_yaml


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "but is empty"),
        (b" \n", "but is empty"),
        (b'{"a": [1,', "is damaged or not"),
        (b"[1, 2]", "but contains a list"),
        (b"3", "but contains a int"),
        (bytes(range(256)), "is damaged or not"),
        (b"[" * 5000, "is damaged or not"),
    ],
    ids=["empty", "blank", "cut off", "list", "number", "binary", "nested"],
)
def test_a_damaged_file_is_named_in_one_line(read, content, said, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is damaged")
    assert "\n" not in message


def test_an_object_is_returned(tmp_path):
    path = tmp_path / "file"
    path.write_text('{"a": [1, null], "b": "c"}')
    assert read_json(path) == read_yaml(path) == {"a": [1, None], "b": "c"}
