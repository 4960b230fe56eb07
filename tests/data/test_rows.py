"""The rows of one file: every format, the source of each row, and the errors for broken files.

JSON and JSON Lines have further tests in test_sources.py.
"""

import gzip
import json
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_lightning.data.family import Task
from reft_lightning.data.files import READERS, arrow_rows, ending, read_csv, read_file, read_tsv
from reft_lightning.data.rows import DataSource, LocalRows, read_rows

FIXTURES = Path(__file__).parents[1] / "fixtures" / "custom"


def put(folder, name, text):
    path = folder / name
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def not_utf8(*cells):
    """A text column that is not entirely UTF-8, as other programs may write it."""
    return pa.array([c.encode() if isinstance(c, str) else c for c in cells], pa.binary()).view(pa.string())


def places(rows):
    return [where.partition("/")[2] for _, where in rows]


class TestFormats:
    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "rows.csv"])
    def test_the_same_ten_rows_come_out_of_every_format(self, name):
        rows = [row for row, _ in read_file(FIXTURES / name)]
        if name == "rows.csv":  # only text: lists are written with commas
            rows = [{**row, "topics": row["topics"].split(",")} for row in rows]
        assert rows == json.loads((FIXTURES / "rows.json").read_text(encoding="utf-8"))
        assert len(rows) == 10

    @pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv"])
    def test_text_may_be_gzipped_and_begin_with_a_byte_order_mark(self, tmp_path, name):
        content = (FIXTURES / name).read_bytes()
        expected = [row for row, _ in read_file(FIXTURES / name)]
        marked = put(tmp_path, f"{name}.gz", b"\xef\xbb\xbf" + content)
        assert [row for row, _ in read_file(marked)] == expected

    def test_an_unknown_ending_lists_the_known_ones(self, tmp_path):
        for name in ("rows.xlsx", "rows.parquet.gz"):
            with pytest.raises(
                ValueError, match=rf"\.json, \.jsonl, \.csv, \.tsv, \.parquet, .*got '{name}'"
            ):
                list(read_file(put(tmp_path, name, "")))

    @pytest.mark.parametrize("kind", [*READERS, ""])
    def test_a_missing_file_lists_what_is_there(self, tmp_path, kind):
        put(tmp_path, "other.csv", "a\n1\n")
        with pytest.raises(FileNotFoundError, match=r"does not exist; .* holds other\.csv"):
            list(read_file(tmp_path / f"rows{kind}"))

    def test_the_ending_is_read_in_front_of_gz_and_in_any_case(self):
        assert ending(Path("a.b/Rows.v1.JSONL.gz")) == ".jsonl"
        assert ending(Path("rows")) == ""


class TestJson:
    def test_a_row_of_a_list_is_named_by_number_and_line(self, tmp_path):
        path = put(tmp_path, "rows.json", '[\n {"a": "[x]\\n"},\n\n {\n"a": 2}, {"a": 3}\n]\n')
        assert list(read_file(path)) == [
            ({"a": "[x]\n"}, f"{tmp_path.name}/rows.json, row 0 (line 2)"),
            ({"a": 2}, f"{tmp_path.name}/rows.json, row 1 (line 4)"),
            ({"a": 3}, f"{tmp_path.name}/rows.json, row 2 (line 5)"),
        ]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('[{"a": 1}\n{"a": 2}]', r"line 2: not JSON \(Expecting ',' delimiter\)"),
            ('[{"a": 1},\n]', "line 2: not JSON"),
            ('[{"a": 1}', "line 1: not JSON"),
            ('[{"a": 1}]\nx', r"line 2: not JSON \(Extra data\)"),
            ("", "line 1: not JSON"),
        ],
    )
    def test_a_broken_list_names_its_line(self, tmp_path, text, words):
        with pytest.raises(ValueError, match=words):
            list(read_file(put(tmp_path, "rows.json", text)))

    @pytest.mark.parametrize(
        ("name", "text", "where"),
        [
            ("rows.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2"),
            ("rows.json", '[{"a": 1},\n{"a": 1, "b": [{"a": 2, "a": 3}]}]', r"row 1 \(line 2\)"),
            ("rows.json", '{"x": {"a": 1, "a": 2}}', r"rows\.json"),
        ],
    )
    def test_a_key_that_an_object_has_twice_is_named(self, tmp_path, name, text, where):
        with pytest.raises(ValueError, match=f"{where}: an object contains the key 'a' more than once"):
            list(read_file(put(tmp_path, name, text)))

    @pytest.mark.parametrize(
        ("name", "text", "where"),
        [("rows.jsonl", '{"a": 1}\n{"a": %s}', "line 2"), ("rows.json", '[{"a": 1}, {"a": %s}]', "row 1"),
         ("rows.json", '{"a": %s}', r"rows\.json")],
    )  # fmt: skip
    def test_json_that_is_nested_too_deeply_names_its_row(self, tmp_path, name, text, where):
        deep = "[" * 10**5 + "]" * 10**5
        with pytest.raises(ValueError, match=f"{where}.*: the JSON is nested too deeply"):
            list(read_file(put(tmp_path, name, text % deep)))

    def test_json_lines_under_the_wrong_name_are_recognised(self, tmp_path):
        with pytest.raises(ValueError, match=r"line 2: not JSON \(Extra data\); if this is JSON Lines"):
            list(read_file(put(tmp_path, "rows.json", '{"a": 1}\n{"a": 2}\n')))

    def test_an_empty_list_has_no_rows(self, tmp_path):
        assert list(read_file(put(tmp_path, "rows.json", " [ ] \n"))) == []


class TestTables:
    def test_a_quoted_line_break_keeps_the_line_numbers_right(self, tmp_path):
        path = put(tmp_path, "rows.csv", 'q,a\r\n"one\r\n""two""",1\r\n\r\nthree,3\r\n')
        rows = list(read_csv(path))
        assert [row for row, _ in rows] == [{"q": 'one\r\n"two"', "a": "1"}, {"q": "three", "a": "3"}]
        assert places(rows) == ["rows.csv, line 2", "rows.csv, line 5"]

    @pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
    def test_a_cell_may_be_longer_than_131072_characters(self, tmp_path, name):
        path = put(tmp_path, name, "q\n" + "x" * 140_000 + "\n")
        assert [len(row["q"]) for row, _ in read_file(path)] == [140_000]

    @pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
    @pytest.mark.parametrize(("cells", "count"), [(["x"], 1), (["x", "y", "z"], 3)])
    def test_a_row_with_too_many_or_too_few_cells_names_its_line(self, tmp_path, name, cells, count):
        mark = "," if name.endswith(".csv") else "\t"
        path = put(tmp_path, name, "\n".join(mark.join(line) for line in (["q", "a"], ["1", "2"], cells)))
        with pytest.raises(ValueError, match=rf"{name}, line 3: {count} cells for the 2 columns q, a; .*'x'"):
            list(read_file(path))

    @pytest.mark.parametrize(
        ("header", "words"),
        [
            ("q,a,q", r"line 1: the header contains 'q' more than once"),
            (",q", r"line 1: column 1 has no name; .*index=False"),
            ("", "is empty; its first line must name the columns"),
        ],
    )
    def test_a_header_names_each_column_once(self, tmp_path, header, words):
        with pytest.raises(ValueError, match=words):
            list(read_csv(put(tmp_path, "rows.csv", header)))

    def test_an_open_quotation_mark_names_the_row_it_began_in(self, tmp_path):
        path = put(tmp_path, "rows.csv", 'q,a\n1,2\n"3,4\n5,6\n')
        with pytest.raises(ValueError, match="the row that begins on line 3: not CSV"):
            list(read_csv(path))

    def test_quotation_marks_and_line_ends_but_a_line_feed_are_text_in_a_tsv(self, tmp_path):
        path = put(tmp_path, "rows.tsv", 'q\ta\n"he\rsaid\t1\nshe "said"\u2028\t2\n')
        rows = list(read_tsv(path))
        assert [row["q"] for row, _ in rows] == ['"he\rsaid', 'she "said"\u2028']
        assert places(rows) == ["rows.tsv, line 2", "rows.tsv, line 3"]

    def test_a_tsv_without_header_is_given_its_columns(self, tmp_path):
        path = put(tmp_path, "dev.tsv", "gj04\t1\t\tA sentence.\r\n")
        assert [row for row, _ in read_tsv(path, ("source", "label", "mark", "sentence"))] == [
            {"source": "gj04", "label": "1", "mark": "", "sentence": "A sentence."}
        ]


class TestDelimiters:
    @pytest.mark.parametrize("mark", [",", ";", "\t"])
    @pytest.mark.parametrize("quoted", [False, True])
    def test_the_header_shows_what_is_between_cells(self, tmp_path, mark, quoted):
        header = ["q, or p", "a", "b"] if quoted and mark != "," else ["q", "a", "b"]
        lines = [[f'"{name}"' for name in header] if quoted else header, ["1", "'x'", "3"]]
        path = put(tmp_path, "rows.csv", "\n".join(map(mark.join, lines)))
        assert [row for row, _ in read_file(path)] == [dict(zip(header, ["1", "'x'", "3"], strict=True))]

    @pytest.mark.parametrize(
        ("text", "row"),
        [("q;a\n1,5;2,5\n", {"q": "1,5", "a": "2,5"}), ("q\nwhere?\n", {"q": "where?"})],
        ids=["decimal commas", "one column"],
    )
    def test_what_is_not_between_the_cells_of_the_header_is_text(self, tmp_path, text, row):
        assert [found for found, _ in read_file(put(tmp_path, "rows.csv", text))] == [row]

    def test_another_delimiter_can_be_named(self, tmp_path):
        path = put(tmp_path, "rows.csv", "q;r|a\n1|2\n")
        with pytest.raises(
            ValueError,
            match=r"1 cells for the 2 columns q, r\|a;.* detected delimiter is ';' .*data\.delimiter",
        ):
            list(read_file(path))
        assert [row for row, _ in read_file(path, "|")] == [{"q;r": "1", "a": "2"}]

    def test_a_delimiter_of_another_format_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"rows\.tsv: data\.delimiter=';' applies to \.csv files only"):
            list(read_file(put(tmp_path, "rows.tsv", "q\ta\n"), ";"))


class TestParquet:
    def test_nested_values_and_nulls_survive(self, tmp_path):
        rows = [{"m": [{"role": "user", "content": "a"}], "n": None}, {"m": [], "n": 2}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        found = list(read_file(tmp_path / "rows.parquet"))
        assert [row for row, _ in found] == rows
        assert places(found) == ["rows.parquet, row 0", "rows.parquet, row 1"]

    @pytest.mark.parametrize(
        ("column", "words"),
        [
            (pa.array([0, 2**60], pa.timestamp("us")), "date value out of range"),
            (pa.array([0, 2**30], pa.date32()), "days=1073741824"),
            (not_utf8("good", b"\xff\xfe"), "can't decode byte 0xff"),
        ],
        ids=["timestamp", "date", "text"],
    )
    def test_a_cell_that_python_has_no_value_for_names_row_and_column(self, tmp_path, column, words):
        pq.write_table(pa.table({"q": ["a", "b"], "when": column}), tmp_path / "rows.parquet")
        with pytest.raises(
            ValueError, match=rf"rows\.parquet, row 1: column 'when' cannot be read: .*{words}"
        ):
            list(read_file(tmp_path / "rows.parquet"))

    def test_cells_of_json_are_read_as_the_values_they_hold(self, tmp_path):
        """A column of mixed types in `datasets`' format: the content of a message may be a text or a list of parts."""

        def kinds(text):
            message = pa.struct({"role": pa.string(), "content": text})
            return {"a": text, "m": pa.list_(message), "j": pa.large_list(text)}

        parts = [{"type": "text", "text": "a"}]
        rows = [
            {"a": "12", "m": [{"role": "user", "content": "a"}], "j": [{"b": 1}]},
            {"a": 2, "m": [{"role": "user", "content": parts}, None], "j": None},
            {"a": None, "m": None, "j": []},
        ]
        cells = {
            "a": ['"12"', "2", None],
            "m": [[{"role": "user", "content": '"a"'}],
                  [{"role": "user", "content": json.dumps(parts)}, None], None],
            "j": [['{"b": 1}'], None, []],
        }  # fmt: skip
        table = pa.table(cells, pa.schema(kinds(pa.string()))).cast(pa.schema(kinds(pa.json_())))
        pq.write_table(table, tmp_path / "rows.parquet")
        assert [row for row, _ in read_file(tmp_path / "rows.parquet")] == rows
        in_parts = list(arrow_rows(table.to_batches(max_chunksize=2), "rows"))
        assert in_parts == [(row, f"rows, row {i}") for i, row in enumerate(rows)]

    def test_a_cell_that_is_no_json_names_row_and_column(self):
        table = pa.table({"a": pa.array(["1", "{"], pa.json_())})
        with pytest.raises(ValueError, match="rows, row 1: column 'a' is not JSON"):
            list(arrow_rows([table], "rows"))

    def test_a_cut_file_and_something_else_under_its_name_are_named(self, tmp_path):
        pq.write_table(pa.table({"q": ["a" * 1000, "b"]}), tmp_path / "rows.parquet")
        for content in ((tmp_path / "rows.parquet").read_bytes()[:-40], "a,b\n1,2\n"):
            with pytest.raises(ValueError, match=r"rows\.parquet: not Parquet"):
                list(read_file(put(tmp_path, "rows.parquet", content)))


class TestSavedFolders:
    def saved(self, folder, rows):
        datasets = pytest.importorskip("datasets")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            datasets.disable_progress_bars()
            datasets.Dataset.from_list(rows).save_to_disk(str(folder))
            datasets.enable_progress_bars()
        return folder

    def test_a_folder_of_save_to_disk_is_read_as_a_file_is(self, tmp_path):
        rows = [{"q": f"{i}?", "m": [{"role": "user", "content": "a"}], "n": None} for i in range(3)]
        found = list(read_file(self.saved(tmp_path / "train", rows)))
        assert [row for row, _ in found] == rows
        assert found[2][1] == f"{tmp_path.name}/train, row 2"

    def test_a_broken_one_is_named(self, tmp_path):
        folder = self.saved(tmp_path / "train", [{"q": "a"}])
        next(folder.glob("*.arrow")).unlink()
        with pytest.raises(ValueError, match="train: incomplete folder of save_to_disk"):
            list(read_file(folder))


class TestBrokenFiles:
    @pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.tsv"])
    def test_another_encoding_is_named_with_its_line(self, tmp_path, name):
        lines = ['{"q": 1}'] * 20_000 if name == "rows.jsonl" else ["q"] * 20_000
        content = "\n".join([*lines[:15_000], "ä", *lines[15_000:]]).encode("latin-1")
        with pytest.raises(ValueError, match=rf"{name}, line 15001: not UTF-8 text \(.*\); save it as UTF-8"):
            list(read_file(put(tmp_path, name, content)))

    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
    @pytest.mark.parametrize("name", ["rows.csv", "rows.tsv.gz", "rows.json", "rows.jsonl"])
    def test_utf_16_is_known_by_its_byte_order_mark(self, tmp_path, name, encoding):
        texts = {".csv": "q,a\nä,1\n", ".tsv": "q\ta\nä\t1\n", ".json": '[{"q": "ä", "a": "1"}]',
                 ".jsonl": '{"q": "ä", "a": "1"}\n'}  # fmt: skip
        path = put(tmp_path, name, ("\ufeff" + texts[ending(Path(name))]).encode(encoding))
        assert [row for row, _ in read_file(path)] == [{"q": "ä", "a": "1"}]

    @pytest.mark.parametrize("content", [b"plain text", gzip.compress(b"x" * 10_000, mtime=0)[:30]])
    def test_a_broken_gzip_file_is_named(self, tmp_path, content):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: not a complete gzip file"):
            list(read_file(tmp_path / "rows.jsonl.gz"))


class TestLayouts:
    def test_a_layout_may_bring_its_own_reader(self, tmp_path):
        def read(path):
            for number, text in enumerate(path.read_text().split(";")):
                yield {"q": text}, f"{path.name}, part {number}"

        put(tmp_path, "train.txt", "a;b")
        task = Task("toy", lambda row, where: row, local={"train": (LocalRows(("train.txt",), read=read),)})
        rows, facts = read_rows(task, "train", DataSource("local", str(tmp_path)))
        assert rows == [({"q": "a"}, "train.txt, part 0"), ({"q": "b"}, "train.txt, part 1")]
        assert (facts["from"], facts["rows"]) == (["train.txt"], 2)

    def test_the_files_of_a_layout_may_have_any_known_format(self, tmp_path):
        put(tmp_path, "a.csv.gz", "q\n1\n")
        put(tmp_path, "b.jsonl", '{"q": "2"}\n')
        task = Task("toy", lambda row, where: row, local={"train": (LocalRows(("a.csv", "b.jsonl")),)})
        rows, _ = read_rows(task, "train", DataSource("local", str(tmp_path)))
        assert [row for row, _ in rows] == [{"q": "1"}, {"q": "2"}]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "columns", "count"),
    [
        ("glue/STS-B/train.tsv.gz", None, 5749),
        ("glue/QNLI/dev.tsv.gz", None, 5463),
        ("glue/SST-2/dev.tsv", None, 872),
        ("glue/CoLA/dev.tsv", ("source", "label", "mark", "sentence"), 1043),
    ],
)
def test_real_tsv_files_have_their_published_number_of_rows(shared, name, columns, count):
    assert sum(1 for _ in read_tsv(shared / "data" / name, columns)) == count


@pytest.mark.shared
def test_a_real_csv_file_has_its_published_number_of_rows(shared):
    path = shared / "data/instruct/alpaca_eval/alpaca_eval_gpt4_leaderboard.csv"
    rows = [row for row, _ in read_csv(path)]
    assert len(rows) == 102
    assert {"name", "win_rate", "filter"} <= set(rows[0])
