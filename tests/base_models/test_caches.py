"""The cache among the arguments of a call, under the names that versions of transformers give it."""

import pytest

from reft_lightning.base_models import caches

NEW = {"cache": "the cache", "other": 1}


@pytest.mark.parametrize("given", [NEW, *({old: "the cache", "other": 1} for old in caches.RENAMED)])
def test_old_names_of_the_cache_are_renamed_if_transformers_has_a_new_one(monkeypatch, given):
    monkeypatch.setattr(caches, "CACHE", "cache")
    assert caches.with_new_name(given) == NEW
    monkeypatch.setattr(caches, "CACHE", "past_key_values")
    assert caches.with_new_name(given) == given


@pytest.mark.parametrize("name", caches.RENAMED)
def test_a_name_without_a_cache_hides_no_cache_of_another_name(monkeypatch, name):
    monkeypatch.setattr(caches, "CACHE", "cache")
    for given in ({**NEW, name: None}, {name: None, **NEW}):
        assert caches.with_new_name(given) == NEW
    with pytest.raises(ValueError, match=f"the cache is given twice, as cache and as {name}"):
        caches.with_new_name({**NEW, name: "another"})
