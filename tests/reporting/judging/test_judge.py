"""Judging: what is kept when a judge fails midway, what is never reused, endpoints and files of judgements."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock

from reft_lightning.data.files import read_json_file
from reft_lightning.reporting.judging import judges
from reft_lightning.reporting.judging.command import judge_pairs, judgement_key, main, pair_up, read_journal
from reft_lightning.reporting.judging.judges import (
    EndpointJudge,
    JudgeFailed,
    PairRefused,
    is_model_first,
    look_up,
    parse_verdict,
    question,
)

FOLDER = Path(__file__).parents[2] / "fixtures" / "instruction" / "alpaca_eval"
OUTPUTS = FOLDER / "invented-7b.model_outputs.json"
REFERENCE = FOLDER / "text_davinci_003.model_outputs.json"
ANNOTATIONS = FOLDER / "invented-7b.annotations.json"
PAIR = {"instruction": "Say A.", "output_1": "reference says", "generator_1": "theirs", "dataset": "koala",
        "output_2": "model says", "generator_2": "mine"}  # fmt: skip


def read(path):
    return [row for row, _ in read_json_file(path)]


def pairs():
    return pair_up(read(OUTPUTS), read(REFERENCE))


class Scripted:
    """A judge that prefers the longer output, until it is told to fail or to refuse."""

    def __init__(self, name="longer", fail_at=None, refuse=()):
        self.name, self.settings = name, {"judge": name}
        self.fail_at, self.refuse, self.asked = fail_at, refuse, []

    def __call__(self, pair):
        if len(self.asked) == self.fail_at:
            raise JudgeFailed("the line is dead")
        self.asked.append(pair["instruction"])
        if len(self.asked) - 1 in self.refuse:
            raise PairRefused("content filter")
        return float(len(pair["output_2"]) > len(pair["output_1"]))


class Endpoint:
    """A local server; `replies` says what to do with the request of each number, `default` with all others."""

    def __init__(self):
        self.requests, self.headers, self.replies, self.default = [], [], {}, "1"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reply = outer.replies.get(len(outer.requests), outer.default)
                outer.requests.append((self.path, json.loads(body)))
                outer.headers.append(self.headers)
                if reply == "hang up":
                    self.close_connection = True
                    return
                status, content = reply if isinstance(reply, tuple) else (200, completion(reply))
                self.send_response(status)
                self.send_header("Retry-After", "0.01")
                if status == 307:
                    self.send_header("Location", content.decode())
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def elsewhere():
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def endpoint(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(judges, "RETRIES", 1)
    server = Endpoint()
    yield server
    server.close()


class TestResume:
    def test_a_judge_that_fails_midway_resumes_without_asking_twice_and_as_if_nothing_had_happened(
        self, tmp_path
    ):
        journal, again = tmp_path / "judgements.jsonl", Scripted()
        with pytest.raises(JudgeFailed, match=r"the line is dead\n4 of 10 judgements are kept in .*resumes"):
            judge_pairs(pairs(), Scripted(fail_at=4), journal)
        assert len(read_journal(journal)) == 4
        resumed = judge_pairs(pairs(), again, journal)
        assert again.asked == [pair["instruction"] for pair in pairs()[4:]]
        assert resumed == judge_pairs(pairs(), Scripted(), tmp_path / "whole.jsonl")
        assert journal.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert judge_pairs(pairs(), Scripted(fail_at=0), journal) == resumed

    def test_a_line_that_was_cut_off_by_a_crash_is_judged_again(self, tmp_path):
        journal, again = tmp_path / "j.jsonl", Scripted()
        whole = judge_pairs(pairs(), Scripted(), journal)
        content = journal.read_bytes()
        journal.write_bytes(content[:-20])
        assert judge_pairs(pairs(), again, journal) == whole
        assert len(again.asked) == 1
        assert journal.read_bytes() == content

    def test_a_broken_line_inside_names_file_and_line(self, tmp_path):
        journal = tmp_path / "j.jsonl"
        journal.write_text('{"key": "a", "preference": 1}\nrubbish\n')
        with pytest.raises(ValueError, match=r"j.jsonl, line 2: not a judgement by reft-judge: b'rubbish'"):
            judge_pairs(pairs(), Scripted(), journal)

    @pytest.mark.parametrize("name", ["output_1", "output_2", "instruction", "generator_1", "generator_2"])
    def test_judgements_of_another_pair_are_never_reused(self, tmp_path, name):
        journal, again = tmp_path / "j.jsonl", Scripted()
        judge_pairs([PAIR], Scripted(), journal)
        judge_pairs([PAIR | {name: "another"}], again, journal)
        assert len(again.asked) == 1

    def test_judgements_by_another_judge_or_under_other_settings_are_never_reused(self):
        urls = ("http://a/v1", "http://b/v1")
        asked = [EndpointJudge(url, "m", temperature=t) for url in urls for t in (0.0, 0.5, None)]
        asked += [EndpointJudge(urls[0], "n"), EndpointJudge(urls[0], "m", max_tokens=8)]
        assert len({judgement_key(PAIR, judge) for judge in asked}) == 8

    def test_unjudged_pairs_are_asked_again(self, tmp_path):
        journal = tmp_path / "j.jsonl"
        found = judge_pairs(pairs(), Scripted(refuse=[3]), journal)
        assert [row["preference"] is None for row in found].count(True) == 1
        again = Scripted()
        assert judge_pairs(pairs(), again, journal)[3]["preference"] is not None
        assert again.asked == [pairs()[3]["instruction"]]

    def test_a_text_that_utf8_cannot_write_is_judged_and_kept(self, tmp_path):
        odd = PAIR | {"output_2": "half of a \ud83d"}
        found = judge_pairs([odd], Scripted(), tmp_path / "j.jsonl")
        assert found[0]["output_2"] == "half of a \ud83d"
        assert judge_pairs([odd], Scripted(fail_at=0), tmp_path / "j.jsonl") == found

    def test_two_processes_do_not_write_one_journal(self, tmp_path):
        with (
            FileLock(f"{tmp_path}/j.jsonl.lock"),
            pytest.raises(ValueError, match="another process is writing to"),
        ):
            judge_pairs([PAIR], Scripted(), tmp_path / "j.jsonl")

    def test_some_refused_pairs_do_not_stop_the_others(self, tmp_path):
        found = judge_pairs(pairs(), Scripted(refuse=range(4)), tmp_path / "j.jsonl")
        assert [row["preference"] is None for row in found] == [True] * 4 + [False] * 6

    @pytest.mark.parametrize(("rows", "asked"), [(10, 5), (2, 2)])
    def test_a_judge_that_refuses_all_of_the_first_pairs_is_given_up(self, tmp_path, rows, asked):
        judge = Scripted(refuse=range(10))
        with pytest.raises(JudgeFailed, match=rf"the first {asked} pairs were all refused.*content filter"):
            judge_pairs(pairs()[:rows], judge, tmp_path / "j.jsonl")
        assert len(judge.asked) == asked

    def test_a_judge_that_has_answered_before_may_refuse_all_that_is_left(self, tmp_path):
        judge_pairs(pairs()[:1], Scripted(), tmp_path / "j.jsonl")
        found = judge_pairs(pairs(), Scripted(refuse=range(10)), tmp_path / "j.jsonl")
        assert [row["preference"] is None for row in found] == [False] + [True] * 9


class TestEndpoint:
    @pytest.mark.parametrize(("reply", "share"), [("1", 1.0), ("2", 0.0), ("0", 0.5)])
    def test_the_verdict_is_read_in_the_order_that_was_shown(self, endpoint, reply, share):
        endpoint.default = reply
        for pair in pairs():
            model_first = is_model_first(pair["instruction"])
            assert EndpointJudge(endpoint.url, "m")(pair) == (share if model_first else 1 - share)
        assert {is_model_first(pair["instruction"]) for pair in pairs()} == {True, False}

    def test_the_order_decides_what_the_judge_reads_first(self):
        assert question(PAIR, True).index("model says") < question(PAIR, True).index("reference says")
        assert question(PAIR, False).index("model says") > question(PAIR, False).index("reference says")

    def test_it_speaks_the_chat_completions_format(self, endpoint):
        EndpointJudge(endpoint.url, "some-model", "secret", max_tokens=8)(PAIR)
        path, body = endpoint.requests[0]
        assert path == "/v1/chat/completions"
        assert body["model"] == "some-model"
        content = question(PAIR, is_model_first(PAIR["instruction"]))
        assert body["messages"] == [{"role": "user", "content": content}]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 8)
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"

    def test_settings_of_none_are_left_out(self, endpoint):
        EndpointJudge(endpoint.url, "some-model", temperature=None)(PAIR)
        assert {"temperature", "max_tokens"}.isdisjoint(endpoint.requests[0][1])

    @pytest.mark.parametrize("trouble", [(503, b"busy"), (429, b"slow down"), "hang up"])
    def test_passing_trouble_is_waited_out(self, endpoint, trouble):
        endpoint.replies = {0: trouble}
        assert EndpointJudge(endpoint.url, "m")(PAIR) in (0.0, 1.0)
        assert len(endpoint.requests) == 2

    @pytest.mark.parametrize(("reply", "message", "asked"), [
        ((503, b"closed for the night"), "503: closed for the night", 2),
        ((401, b"bad key"), "401: bad key; does the variable given by key_env contain the key", 1),
        ((404, b""), "404: nothing", 1),
        ((200, b"<html>"), "did not answer with a chat completion", 1),
        ((200, b'{"choices": []}'), "did not answer with a chat completion", 1),
        ((200, b'["x"]'), "did not answer with a chat completion", 1),
    ])  # fmt: skip
    def test_lasting_trouble_ends_in_its_own_words(self, endpoint, reply, message, asked):
        endpoint.default = reply
        with pytest.raises(JudgeFailed, match=message):
            EndpointJudge(endpoint.url, "m")(PAIR)
        assert len(endpoint.requests) == asked

    def test_an_address_where_nothing_answers_is_named(self, endpoint):
        endpoint.server.server_close()
        with pytest.raises(JudgeFailed, match=r"cannot reach http://127.0.0.1:\d+/v1"):
            EndpointJudge(endpoint.url, "m")(PAIR)

    def test_a_redirection_to_another_server_is_not_given_the_key(self, endpoint, elsewhere):
        endpoint.default = (307, f"{elsewhere.url}/chat/completions".encode())
        EndpointJudge(endpoint.url, "m", "secret")(PAIR)
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"
        assert "secret" not in str(elsewhere.headers[0])

    def test_a_request_that_is_refused_concerns_its_pair(self, endpoint):
        endpoint.default = (400, b"content filter")
        with pytest.raises(PairRefused, match="400: content filter"):
            EndpointJudge(endpoint.url, "m")(PAIR)

    def test_a_reply_without_a_verdict_leaves_the_pair_unjudged(self, endpoint):
        endpoint.default = "Both have their merits: 1 is longer, 2 is kinder."
        assert EndpointJudge(endpoint.url, "m")(PAIR) is None

    def test_another_scheme_is_refused(self):
        with pytest.raises(ValueError, match="url must start with http"):
            EndpointJudge("file:///etc", "m")

    @pytest.mark.parametrize(("text", "verdict"), [
        ("1", 1), (" 2\n", 2), ("**1**", 1), ("Answer 2.", 2), ("Verdict: 0", 0), ("tie", 0), ("Final answer: 1", 1),
        ("Long thoughts about 2.\n\n1", 1), ("<think>2 or 1?</think>\n2", 2), ("", None), ("  ", None), ("3", None),
        ("12", None), ("1 or 2", None), ("There are 2 problems.", None), ("neither", None), ("-1", None),
    ])  # fmt: skip
    def test_only_clear_replies_are_verdicts(self, text, verdict):
        assert parse_verdict(text) == verdict


class TestFile:
    ROW = {"instruction": "Say A.", "output_1": "reference says", "output_2": "model says"}  # noqa: RUF012
    TURNED = {"instruction": "Say A.", "output_1": "model says", "output_2": "reference says"}  # noqa: RUF012

    def test_a_pair_is_found_in_either_order(self):
        assert look_up([PAIR], [self.ROW | {"preference": 2}]) == [1.0]
        assert look_up([PAIR], [self.TURNED | {"preference": 2}]) == [0.0]

    @pytest.mark.parametrize("column", ["instruction", "output_1", "output_2"])
    def test_judgements_of_other_texts_do_not_count(self, column):
        assert look_up([PAIR], [self.ROW | {"preference": 2, column: "something else"}]) == [None]

    @pytest.mark.parametrize(
        ("row", "preference", "shares"),
        [(ROW, 1, "1 and 0"), (ROW, 1.5, "1 and 0.5"), (TURNED, 2, "0 and 1")],
    )
    def test_two_judgements_of_the_same_texts_must_agree(self, row, preference, shares):
        first, none = ({**self.ROW, "preference": value} for value in (2, None))
        with pytest.raises(
            ValueError, match=rf"judgements 0 and 2 contradict each other on 'Say A.': {shares}"
        ):
            look_up([PAIR], [first, none, row | {"preference": preference}])

    def test_judgements_that_agree_and_rows_without_one_count_once(self):
        given = [(self.ROW, None), (self.ROW, 1.3), (self.TURNED, 1.7), (self.ROW, None)]
        found = look_up([PAIR], [row | {"preference": preference} for row, preference in given])
        assert found == [pytest.approx(0.3)]

    def test_equal_outputs_are_a_pair_like_any_other(self):
        same = PAIR | {"output_1": "A", "output_2": "A", "preference": 1}
        assert look_up([same], [same, same]) == [0.0]

    def test_a_row_without_its_texts_is_refused(self):
        with pytest.raises(ValueError, match="judgement 0: no column 'output_1'"):
            look_up([PAIR], [{"instruction": "Say A.", "preference": 2}])


class TestPairs:
    def test_outputs_without_a_reference_output_are_refused(self):
        with pytest.raises(ValueError, match=r"3 of 10 instructions in outputs have no output in reference"):
            pair_up(read(OUTPUTS), read(REFERENCE)[3:])

    def test_white_space_around_an_instruction_does_not_part_a_pair(self):
        rows = [row | {"instruction": f"{row['instruction']}\n"} for row in read(REFERENCE)]
        found = pair_up(read(OUTPUTS), rows)
        assert [pair["instruction"] for pair in found] == [row["instruction"] for row in rows]

    def test_two_outputs_for_one_instruction_are_refused(self):
        rows = read(OUTPUTS)
        with pytest.raises(ValueError, match="outputs, row 10: a second output"):
            pair_up([*rows, rows[0] | {"output": "other"}], read(REFERENCE))

    def test_a_model_without_a_name_is_asked_for(self):
        rows = [{k: v for k, v in row.items() if k != "generator"} for row in read(OUTPUTS)]
        with pytest.raises(ValueError, match=r"got none .*generator=NAME"):
            pair_up(rows, read(REFERENCE))
        assert pair_up(rows, read(REFERENCE), "mine")[0]["generator_2"] == "mine"


class TestCommand:
    def options(self, tmp_path, **more):
        return {
            "outputs": str(OUTPUTS),
            "reference": str(REFERENCE),
            "out": str(tmp_path / "result.json"),
        } | more

    def test_a_file_of_judgements_gives_the_win_rate(self, tmp_path):
        options = self.options(tmp_path, judge="file", annotations=str(ANNOTATIONS))
        found = main(options)
        assert found["win_rate"] == pytest.approx(100 * 5 / 9)
        assert (found["n_wins"], found["n_draws"], found["n_unjudged"]) == (4, 2, 1)
        assert (found["generator"], found["reference"]) == ("invented-7b", "text_davinci_003")
        assert found["judge"] == "invented_judge"
        assert json.loads((tmp_path / "result.json").read_text()) == found
        alone = main({name: options[name] for name in ("judge", "annotations", "out")})
        assert alone["win_rate"] == found["win_rate"]

    def test_annotations_of_other_outputs_are_refused(self, tmp_path):
        rows = [row | {"output_2": "Another model said this."} for row in read(ANNOTATIONS)]
        other = tmp_path / "annotations.json"
        other.write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="has no judgement of these 10 pairs"):
            main(self.options(tmp_path, judge="file", annotations=str(other)))

    @pytest.mark.parametrize("names", ["outputs reference judge annotations out", "judge annotations out"])
    def test_a_file_by_several_judges_is_refused(self, tmp_path, names):
        rows = read(ANNOTATIONS)
        mixed = tmp_path / "annotations.json"
        mixed.write_text(json.dumps([*rows[1:], rows[0] | {"annotator": "other"}]))
        options = self.options(tmp_path, judge="file", annotations=str(mixed))
        with pytest.raises(ValueError, match=r"annotator must be the same name .* got invented_judge, other"):
            main({name: options[name] for name in names.split()})

    def test_an_endpoint_judges_and_what_it_wrote_is_a_file_of_judgements(
        self, tmp_path, endpoint, monkeypatch
    ):
        monkeypatch.setenv("MY_KEY", "secret")
        asked = {"judge": "endpoint", "url": endpoint.url, "model": "some-model", "key_env": "MY_KEY"}
        found = main(self.options(tmp_path, **asked))
        assert found["n_total"] == 10
        journal = tmp_path / "result.judgements.jsonl"
        of_file = {"judge": "file", "annotations": str(journal), "out": str(tmp_path / "b.json")}
        again = main(self.options(tmp_path, **of_file))
        assert again["win_rate"] == found["win_rate"]
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"
        assert all("secret" not in path.read_text() for path in tmp_path.iterdir())

    def test_an_endpoint_that_dies_midway_is_resumed(self, tmp_path, endpoint):
        options = self.options(tmp_path, judge="endpoint", url=endpoint.url, model="m")
        endpoint.replies = {n: (500, b"") for n in (6, 7)}
        with pytest.raises(JudgeFailed, match="6 of 10 judgements are kept"):
            main(options)
        assert main(options)["n_total"] == 10
        assert len(endpoint.requests) == 6 + 2 + 4

    def test_a_key_is_sent_only_where_it_is_asked_for(self, tmp_path, endpoint, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        main(self.options(tmp_path, judge="endpoint", url=endpoint.url, model="m", limit="2"))
        assert len(endpoint.requests) == 2
        assert endpoint.headers[0]["Authorization"] == "Bearer none"

    def test_files_are_written_next_to_the_outputs_and_name_reference_and_judge(self, tmp_path, endpoint):
        outputs = tmp_path / "mine.json"
        outputs.write_bytes(OUTPUTS.read_bytes())
        options = self.options(tmp_path, judge="endpoint", url=endpoint.url, model="org/some-model")
        main({name: value for name, value in options.items() if name != "out"} | {"outputs": str(outputs)})
        stem = "mine.vs_text_davinci_003.org_some-model"
        names = {path.name for path in tmp_path.glob("mine.vs*json*")}
        assert names >= {f"{stem}.win_rate.json", f"{stem}.judgements.jsonl"}

    @pytest.mark.parametrize(("options", "message"), [
        ({"judge": "fil"}, r"judge must be one of file, endpoint; got 'fil'; did you mean 'file'"),
        ({}, r"judge must be one of file, endpoint"),
        ({"judge": "endpoint", "model": "m"}, r"judge=endpoint needs url="),
        ({"judge": "file"}, r"judge=file needs annotations="),
        ({"judge": "file", "annotation": "a"}, r"judge=file takes no annotation; did you mean 'annotations'"),
        ({"judge": "endpoint", "url": "http://x", "model": "m", "max_tokens": "many"}, r"must be an integer"),
        ({"judge": "endpoint", "url": "http://x", "model": "m", "limit": "0"}, r"limit must be positive; got '0'"),
        ({"judge": "endpoint", "url": "http://x", "model": "m", "key_env": "NOT_THERE"}, r"is not set"),
    ])  # fmt: skip
    def test_options_that_do_not_fit_are_explained(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            main(self.options(tmp_path, **options))


@pytest.mark.shared
class TestPublished:
    def test_alpaca_7b_has_its_published_win_rate(self, shared, tmp_path):
        path = shared / "data/instruct/alpaca_eval/alpaca-7b.alpaca_eval_gpt4.annotations.json.gz"
        found = main({"judge": "file", "annotations": str(path), "out": str(tmp_path / "r.json")})
        assert f"{found['win_rate']:.4f}" == "26.4596"
        assert (found["generator"], found["reference"]) == ("alpaca-7b", "text_davinci_003")

    def test_its_judgements_do_not_count_for_other_reference_outputs_of_the_same_name(self, shared, tmp_path):
        # the annotations were made against another version of text_davinci_003's outputs: 20 of 805 are the same
        folder = shared / "data/instruct/alpaca_eval"
        options = {
            "outputs": str(folder / "alpaca-7b.model_outputs.json.gz"),
            "reference": str(folder / "text_davinci_003.model_outputs.json.gz"),
            "annotations": str(folder / "alpaca-7b.alpaca_eval_gpt4.annotations.json.gz"),
        }
        found = main({"judge": "file", "out": str(tmp_path / "r.json")} | options)
        assert (found["n_total"], found["n_unjudged"]) == (20, 785)
