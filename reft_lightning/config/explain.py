"""What a configuration may contain: the keys of the schema, the groups of YAML files and their options.

Error messages are built here, so that each says what was written and where, the closest name and the allowed names.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..suggest import did_you_mean
from .schema import keys

# The types of the schema, as error messages name them.
TYPES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}

CUTOFF = 0.7  # of difflib's ratio: a lower one misleads (learning_rate would suggest warmup_ratio)

SHOWN = 12  # list the files of a folder by name up to this number

# Other trainers' names for a key, by their last part.
ALIASES = {
    "learning_rate": "optimizer.lr",
    "wd": "optimizer.weight_decay",
    "warmup": "scheduler.warmup_ratio",
    "warmup_steps": "scheduler.warmup_ratio",
    "schedule": "scheduler",
    "lr_scheduler": "scheduler",
    "lr_scheduler_type": "scheduler",
    "betas": "optimizer.options",
    "eps": "optimizer.options",
    "momentum": "optimizer.options",
    "train_batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "per_device_eval_batch_size": "data.eval_batch_size",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "steps": "trainer.max_steps",
    "num_steps": "trainer.max_steps",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "average_tokens_across_devices": "loss_reduction",
    "max_grad_norm": "trainer.gradient_clip_val",
    "device": "trainer.accelerator",
    "gpus": "trainer.devices",
    "num_processes": "trainer.devices",
    "patience": "checkpoint.early_stopping_patience",
    "ckpt_path": "resume",
    "resume_from_checkpoint": "resume",
    "r": "intervention.rank",
}


def _split(name: str) -> tuple[str, str]:
    parent, _, last = name.rpartition(".")
    return parent, last


def _dotted(values: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}.{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}.{key}")


def shown(options: Sequence[str], opened: str = "") -> str:
    """Return the options of a group on one line; files in large folders are counted, except in the opened folder."""
    names = [option for option in options if "/" not in option]
    for folder in sorted({option.partition("/")[0] for option in options if "/" in option}):
        inside = [option for option in options if option.startswith(f"{folder}/")]
        few = len(inside) <= SHOWN or folder == opened
        names += inside if few else [f"{folder}/... ({len(inside)} files)"]
    return ", ".join(names)


class Vocabulary:
    """The keys of the schema, and the groups in ``conf/`` and, with ``--config-dir``, in a folder of the user's."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self.keys = keys()

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """Every group and its options; those in subfolders contain a slash."""
        found: dict[str, set[str]] = {}
        for folder in self.folders:
            for file in folder.rglob("*.yaml"):
                parts = file.relative_to(folder).with_suffix("").parts
                for depth in range(1, len(parts)):
                    found.setdefault("/".join(parts[:depth]), set()).add("/".join(parts[depth:]))
        return {group: sorted(options) for group, options in sorted(found.items())}

    @cached_property
    def entries(self) -> set[str]:
        """Every dotted key in the groups' files: the known entries of the schema's dictionaries."""
        found: set[str] = set()
        for folder in self.folders:
            for file in folder.glob("*/**/*.yaml"):
                group = file.relative_to(folder).parts[0]
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
                if group in self.keys and isinstance(content, dict):
                    found |= set(_dotted(content, group))
        return found

    def unknown_entry(self, name: str) -> str | None:
        """Return the message for a dictionary entry that no file sets; None for any other key."""
        if name.startswith(("+", "~")) or name in self.keys or name in self.entries or not self.is_free(name):
            return None
        hint = did_you_mean(name, self.entries)
        return f"{name} is not set by any file{hint}\na new entry of a dictionary needs a plus: +{name}=..."

    def file(self, name: str) -> str:
        """Return the path of the YAML file that Hydra calls ``name``, or the name if no folder has it."""
        files = [folder / f"{name}.yaml" for folder in reversed(self.folders)]
        return str(next((file for file in files if file.is_file()), name))

    def is_free(self, name: str) -> bool:
        """Whether ``name`` is inside a dictionary of the schema, whose entries the user may choose."""
        hint = self.keys.get(self._known_parent(name))
        return hint is Any or typing.get_origin(hint) is dict

    def nearest_key(self, name: str) -> str | None:
        """Return the key or group that ``name`` most likely means.

        In this order: another trainer's name for it (``learning_rate``), a key of the same section with a similar last
        part (``optimizer.lrr``), the same last part elsewhere (``lr``), a similar full name unless the section exists,
        and a similar last part elsewhere.
        """
        parent, last = _split(name)
        allowed = [*self.keys, *self.groups]
        siblings = {_split(key)[1]: key for key in allowed if _split(key)[0] == parent}
        leaves = {_split(key)[1]: key for key in reversed(allowed)}
        for names in (
            [siblings[last]] if last in siblings else [],
            [ALIASES[last]] if last in ALIASES else [],
            [siblings[m] for m in difflib.get_close_matches(last, siblings, n=1, cutoff=CUTOFF)],
            [leaves[last]] if last in leaves else [],
            difflib.get_close_matches(name, allowed if parent not in self.keys else (), n=1, cutoff=CUTOFF),
            [leaves[m] for m in difflib.get_close_matches(last, leaves, n=1, cutoff=CUTOFF)],
        ):
            if names:
                return names[0]
        return None

    def unknown_key(self, name: str, where: str) -> str:
        """Return the message for a key that the schema does not have."""
        parent = self._known_parent(name)
        siblings = [_split(key)[1] for key in self.keys if _split(key)[0] == parent]
        near = self.nearest_key(name)
        hint = f"; did you mean {near!r}?" if near else ""
        return f"{where}: unknown key {name!r}{hint}\n{parent or 'the top level'} has {', '.join(siblings)}"

    def unknown_option(self, group: str, option: str, where: str) -> str:
        """Return the message for an option that a group does not have."""
        options = self.groups[group]
        hint = did_you_mean(option, options, f"{group}=")
        folder = option.partition("/")[0]
        return f"{where}: {group} has no option {option!r}{hint}\n{group} must be one of {shown(options, folder)}"

    def unknown_group(self, group: str, where: str) -> str:
        """Return the message for a group that no folder has."""
        hint = did_you_mean(group, self.groups)
        return f"{where}: unknown group {group!r}{hint}\nthe groups are {', '.join(self.groups)}"

    def wrong_type(self, name: str, reason: str) -> str:
        """Return the message for a value whose type differs from the schema's."""
        hint = self.keys.get(name)
        if typing.get_origin(hint) is list:
            return f"{name} must be a list, such as {name}=[a,b]: {reason}"
        kinds = typing.get_args(hint) or (hint,)
        words = " or ".join(TYPES[kind] for kind in kinds if kind in TYPES)
        return f"{name} must be {words}: {reason}" if words else f"{name}: {reason}" if name else reason

    def _known_parent(self, name: str) -> str:
        parent = _split(name)[0]
        while parent and parent not in self.keys:
            parent = _split(parent)[0]
        return parent
