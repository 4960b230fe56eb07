"""A method's name tells its properties before torch or peft is imported."""

import sys

import pytest
import yaml

from reft_lightning import INTERVENTIONS
from reft_lightning.adapters.methods import METHODS, method_named


def test_every_file_of_the_group_names_a_known_method(root):
    named = {yaml.safe_load(f.read_text())["method"] for f in (root / "conf/intervention").rglob("*.yaml")}
    assert named <= {*METHODS, *INTERVENTIONS}
    assert METHODS.keys() <= named  # each baseline can be chosen by a file


def test_a_record_does_not_contradict_itself():
    for name in METHODS:
        method = method_named(name)
        assert method.name == name
        assert not method.takes_settings
        assert (method.in_place is not None) + bool(method.peft) + method.ignores_settings == 1, name
        assert method.trains or not method.trains_all_layers
        assert hash(method) == hash(method_named(name))


def test_other_names_are_interventions():
    for name in (*INTERVENTIONS, "package.module.Mine", INTERVENTIONS["loreft"]):
        method = method_named(name)
        assert method.takes_settings
        assert method.compiles
    with pytest.raises(
        ValueError, match=r"unknown baseline 'peft/dorra'; known are .*did you mean 'peft/dora'"
    ):
        method_named("peft/dorra")
    with pytest.raises(ValueError, match=r"unknown intervention 'frozn'.*did you mean 'frozen'"):
        method_named("frozn").check_options({})


def test_options_name_the_nearest():
    with pytest.raises(ValueError, match=r"loreft takes no option 'rnak'; did you mean 'rank'"):
        method_named("loreft").check_options({"rnak": 1})
    with pytest.raises(ValueError, match=r"bitfit takes no option 'r'\nit takes none"):
        method_named("bitfit").check_options({"r": 1})


def test_a_record_costs_no_heavy_import():
    import subprocess

    code = (
        "import sys, reft_lightning.adapters.methods as m; m.method_named('peft/lora'); print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "peft", "transformers"} & set(found.split())
