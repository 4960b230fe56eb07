"""Judges: what is kept when one fails midway, what is never reused, and the three kinds."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.rows import read_json_file
from reft_lightning.reporting.judging.command import (
    OPTIONS,
    judge_pairs,
    judgement_key,
    main,
    pair_up,
    read_journal,
)
from reft_lightning.reporting.judging.judges import (
    EndpointJudge,
    FileJudge,
    JudgeFailed,
    ModelJudge,
    Pair,
    PairRefused,
    ask,
    parse_verdict,
)

FOLDER = Path(__file__).parents[2] / "fixtures" / "instruction" / "alpaca_eval"
OUTPUTS = FOLDER / "invented-7b.model_outputs.json"
REFERENCE = FOLDER / "text_davinci_003.model_outputs.json"
ANNOTATIONS = FOLDER / "invented-7b.annotations.json"


def read(path):
    return [row for row, _ in read_json_file(path)]


def pairs():
    return pair_up(read(OUTPUTS), read(REFERENCE))


class Scripted:
    """A judge that prefers the longer output, until it is told to fail."""

    def __init__(self, name="longer", fail_at=None):
        self.name, self.fail_at, self.asked = name, fail_at, []

    @property
    def settings(self):
        return {"judge": self.name}

    def __call__(self, pair, model_first):
        if len(self.asked) == self.fail_at:
            raise JudgeFailed("the line is dead")
        self.asked.append((pair.instruction, model_first))
        return float(len(pair.output) > len(pair.reference_output))


class Endpoint:
    """A local server; `replies` says what to do with the request of each number, and what in all others."""

    def __init__(self, monkeypatch):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        self.requests, self.headers, self.replies, self.default = [], [], {}, "1"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                number = len(outer.requests)
                outer.requests.append((self.path, json.loads(body)))
                outer.headers.append(dict(self.headers))
                reply = outer.replies.get(number, outer.default)
                if reply == "hang up":
                    self.close_connection = True
                    return
                status, content, extra = reply if isinstance(reply, tuple) else (200, completion(reply), {})
                self.send_response(status)
                for key, value in extra.items():
                    self.send_header(key, value)
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
def endpoint(monkeypatch):
    server = Endpoint(monkeypatch)
    yield server
    server.close()


@pytest.fixture
def waits():
    return []


@pytest.fixture
def judge(endpoint, waits):
    return EndpointJudge(endpoint.url, "some-model", attempts=3, sleep=waits.append)


PAIR = Pair("Say A.", "model says", "reference says", "mine", "theirs", "koala")


class TestResume:
    def test_a_judge_that_fails_midway_keeps_what_it_has_judged(self, tmp_path):
        journal = tmp_path / "judgements.jsonl"
        with pytest.raises(
            JudgeFailed, match=r"the line is dead\n4 of 10 judgements are kept in .*goes on from"
        ):
            judge_pairs(pairs(), Scripted(fail_at=4), journal)
        assert len(read_journal(journal)) == 4

    def test_it_resumes_without_asking_twice_and_ends_as_if_nothing_had_happened(self, tmp_path):
        journal, again = tmp_path / "judgements.jsonl", Scripted()
        with pytest.raises(JudgeFailed):
            judge_pairs(pairs(), Scripted(fail_at=4), journal)
        resumed = judge_pairs(pairs(), again, journal)
        assert [instruction for instruction, _ in again.asked] == [p.instruction for p in pairs()[4:]]
        assert resumed == judge_pairs(pairs(), Scripted(), tmp_path / "whole.jsonl")
        assert journal.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_complete_journal_asks_nobody(self, tmp_path):
        judge_pairs(pairs(), Scripted(), tmp_path / "j.jsonl")
        again = Scripted(fail_at=0)
        assert len(judge_pairs(pairs(), again, tmp_path / "j.jsonl")) == 10

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
        with pytest.raises(ValueError, match=r"j.jsonl, line 2: no judgement by reft-judge: b'rubbish'"):
            judge_pairs(pairs(), Scripted(), journal)

    @pytest.mark.parametrize(
        "change",
        [
            {"output": "another text"},
            {"reference_output": "another text"},
            {"instruction": "another text"},
            {"generator": "another"},
            {"reference": "another"},
        ],
    )
    def test_judgements_of_another_pair_are_never_reused(self, tmp_path, change):
        journal, again = tmp_path / "j.jsonl", Scripted()
        judge_pairs([PAIR], Scripted(), journal)
        judge_pairs([Pair(**{**vars(PAIR), **change})], again, journal)
        assert len(again.asked) == 1

    def test_judgements_of_another_judge_are_never_reused(self, tmp_path):
        journal, other = tmp_path / "j.jsonl", Scripted("other")
        judge_pairs([PAIR], Scripted(), journal)
        judge_pairs([PAIR], other, journal)
        assert len(other.asked) == 1

    def test_judgements_under_other_settings_are_never_reused(self):
        urls = ("http://a/v1", "http://b/v1")
        judges = [EndpointJudge(url, "m", temperature=t) for url in urls for t in (0.0, 0.5, None)]
        assert len({judgement_key(PAIR, judge, both) for judge in judges for both in (True, False)}) == 12

    def test_unjudged_pairs_are_asked_again(self, tmp_path):
        journal = tmp_path / "j.jsonl"

        class Mute(Scripted):
            def __call__(self, pair, model_first):
                return None

        assert judge_pairs([PAIR], Mute(), journal)[0]["preference"] is None
        assert judge_pairs([PAIR], Scripted(), journal)[0]["preference"] == 1.0

    def test_a_text_that_utf8_cannot_write_is_judged_and_kept(self, tmp_path):
        odd = Pair("Say A.", "half of a \ud83d", "reference says", "mine", "theirs")
        again = Scripted(fail_at=0)
        found = judge_pairs([odd], Scripted(), tmp_path / "j.jsonl")
        assert found[0]["output_2"] == "half of a \ud83d"
        assert judge_pairs([odd], again, tmp_path / "j.jsonl") == found

    def test_two_processes_do_not_write_one_journal(self, tmp_path):
        from filelock import FileLock

        with (
            FileLock(f"{tmp_path}/j.jsonl.lock"),
            pytest.raises(ValueError, match="another process judges into"),
        ):
            judge_pairs([PAIR], Scripted(), tmp_path / "j.jsonl")


class TestOrders:
    def test_each_instruction_has_its_own_order_and_keeps_it(self, tmp_path):
        one, two = Scripted(), Scripted("two")
        judge_pairs(pairs(), one, tmp_path / "j.jsonl")
        judge_pairs(pairs(), two, tmp_path / "j.jsonl")
        assert one.asked == two.asked
        assert {model_first for _, model_first in one.asked} == {True, False}

    def test_both_orders_average_a_judge_that_likes_the_first_place_to_a_draw(self, tmp_path):
        class First(Scripted):
            def __call__(self, pair, model_first):
                return float(model_first)

        found = judge_pairs(pairs(), First(), tmp_path / "j.jsonl", both_orders=True)
        assert {row["preference"] for row in found} == {1.5}

    def test_the_order_decides_what_the_judge_reads_first(self):
        assert ask(PAIR, True).index("model says") < ask(PAIR, True).index("reference says")
        assert ask(PAIR, False).index("model says") > ask(PAIR, False).index("reference says")


class TestEndpoint:
    @pytest.mark.parametrize(("reply", "model_first", "share"), [
        ("1", True, 1.0), ("1", False, 0.0), ("2", True, 0.0), ("2", False, 1.0), ("0", True, 0.5),
    ])  # fmt: skip
    def test_the_verdict_is_read_in_the_order_that_was_shown(
        self, endpoint, judge, reply, model_first, share
    ):
        endpoint.default = reply
        assert judge(PAIR, model_first) == share

    def test_it_speaks_the_chat_completions_format(self, endpoint):
        EndpointJudge(endpoint.url, "some-model", "secret", max_tokens=8)(PAIR, True)
        path, body = endpoint.requests[0]
        assert path == "/v1/chat/completions"
        assert body["model"] == "some-model"
        assert body["messages"] == [{"role": "user", "content": ask(PAIR, True)}]
        assert (body["temperature"], body["max_tokens"]) == (0.0, 8)
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"

    def test_no_key_no_header(self, endpoint, judge):
        judge(PAIR, True)
        assert "Authorization" not in endpoint.headers[0]

    @pytest.mark.parametrize("trouble", [
        (503, b"busy", {}), (500, b"", {}), (429, b"slow down", {}), (200, b"<html>", {}),
        (200, b'{"choices": []}', {}), (200, b'["x"]', {}), "hang up",
    ])  # fmt: skip
    def test_passing_trouble_is_waited_out(self, endpoint, judge, waits, trouble):
        endpoint.replies = {0: trouble, 1: trouble}
        assert judge(PAIR, True) == 1.0
        assert waits == [1.0, 2.0]

    def test_the_server_says_how_long_to_wait(self, endpoint, judge, waits):
        endpoint.replies = {0: (429, b"", {"Retry-After": "7"}), 1: (429, b"", {"Retry-After": "9999"})}
        judge(PAIR, True)
        assert waits == [7.0, 60.0]

    def test_lasting_trouble_ends_in_its_own_words(self, endpoint, judge, waits):
        endpoint.default = (503, b"closed for the night", {})
        with pytest.raises(JudgeFailed, match=r"503 .*closed for the night; gave up after 3 attempts"):
            judge(PAIR, True)
        assert len(endpoint.requests) == 3

    def test_a_wrong_key_is_not_tried_again(self, endpoint, judge, waits):
        endpoint.default = (401, b"bad key", {})
        with pytest.raises(
            JudgeFailed, match=r"401 .*bad key; is the key in the variable that key_env names"
        ):
            judge(PAIR, True)
        assert len(endpoint.requests) == 1

    def test_nobody_at_the_address_is_said(self, endpoint, waits):
        url = endpoint.url
        endpoint.server.server_close()
        with pytest.raises(JudgeFailed, match="cannot be reached"):
            EndpointJudge(url, "m", attempts=2, sleep=waits.append, timeout=2)(PAIR, True)

    def test_a_redirection_is_not_followed_with_the_key(self, endpoint, judge):
        endpoint.replies = {0: (302, b"", {"Location": f"{endpoint.url}/elsewhere"})}
        with pytest.raises(JudgeFailed, match="302"):
            judge(PAIR, True)
        assert len(endpoint.requests) == 1

    def test_garbage_is_no_verdict_and_the_others_are_judged(self, endpoint, judge, tmp_path):
        endpoint.replies = {n: "Both have their merits: 1 is longer, 2 is kinder." for n in range(3)}
        found = judge_pairs(pairs(), judge, tmp_path / "j.jsonl")
        assert [row["preference"] is None for row in found] == [True] + [False] * 9

    def test_a_pair_that_is_refused_does_not_stop_the_others(self, endpoint, judge, tmp_path):
        endpoint.replies = {3: (400, b"content filter", {})}
        found = judge_pairs(pairs(), judge, tmp_path / "j.jsonl")
        assert [row["preference"] is None for row in found].count(True) == 1

    def test_a_first_pair_that_is_refused_does_not_stop_the_others_either(self, endpoint, judge, tmp_path):
        endpoint.replies = {n: (400, b"content filter", {}) for n in range(4)}
        found = judge_pairs(pairs(), judge, tmp_path / "j.jsonl")
        assert [row["preference"] is None for row in found] == [True] * 4 + [False] * 6

    @pytest.mark.parametrize(("rows", "asked"), [(10, 5), (2, 2)])
    def test_a_judge_that_refuses_all_of_the_first_pairs_is_given_up(
        self, endpoint, judge, tmp_path, rows, asked
    ):
        endpoint.default = (400, b"max_tokens is not supported", {})
        with pytest.raises(
            JudgeFailed, match=rf"the first {asked} pairs were all refused.*max_tokens is not supported"
        ):
            judge_pairs(pairs()[:rows], judge, tmp_path / "j.jsonl")
        assert len(endpoint.requests) == asked

    def test_a_judge_that_has_answered_before_may_refuse_all_that_is_left(self, endpoint, judge, tmp_path):
        judge_pairs(pairs()[:1], judge, tmp_path / "j.jsonl")
        endpoint.default = (400, b"content filter", {})
        found = judge_pairs(pairs(), judge, tmp_path / "j.jsonl")
        assert [row["preference"] is None for row in found] == [False] + [True] * 9

    def test_an_endpoint_that_dies_midway_is_resumed(self, endpoint, judge, tmp_path):
        endpoint.replies = {n: (500, b"", {}) for n in range(6, 9)}
        with pytest.raises(JudgeFailed, match="6 of 10 judgements are kept"):
            judge_pairs(pairs(), judge, tmp_path / "j.jsonl")
        found = judge_pairs(pairs(), judge, tmp_path / "j.jsonl")
        assert len(endpoint.requests) == 6 + 3 + 4
        assert {row["annotator"] for row in found} == {"some-model"}

    def test_another_scheme_is_refused(self):
        with pytest.raises(ValueError, match="url must begin with http"):
            EndpointJudge("file:///etc", "m")


class TestVerdicts:
    @pytest.mark.parametrize(("text", "verdict"), [
        ("1", 1), (" 2\n", 2), ("**1**", 1), ("Answer 2.", 2), ("Verdict: 0", 0), ("tie", 0), ("Final answer: 1", 1),
        ("Long thoughts about 2.\n\n1", 1), ("<think>2 or 1?</think>\n2", 2),
    ])  # fmt: skip
    def test_clear_replies_are_read(self, text, verdict):
        assert parse_verdict(text) == verdict

    @pytest.mark.parametrize(
        "text", ["", "  ", "3", "12", "1 or 2", "There are 2 problems.", "neither", "-1"]
    )
    def test_unclear_replies_are_no_verdict(self, text):
        assert parse_verdict(text) is None


@pytest.fixture(scope="module")
def tiny_judge():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.5,
    )  # fmt: skip
    return ModelJudge(LlamaForCausalLM(config).eval(), tokenizer, "tiny")


class TestModel:
    def test_it_compares_the_two_digits_after_the_question(self, tiny_judge):
        from reft_lightning.data.example import Example
        from reft_lightning.data.prompts import alpaca

        text = alpaca(Example("t", ask(PAIR, True), "1", "1")).prompt
        ids = torch.tensor([tiny_judge.tokenizer(text)["input_ids"]])
        one, two = (tiny_judge.tokenizer.convert_tokens_to_ids(digit) for digit in "12")
        with torch.no_grad():
            logits = tiny_judge.model(ids).logits[0, -1]
        expected = torch.softmax(logits[[one, two]], 0)[0]
        assert tiny_judge(PAIR, True) == pytest.approx(float(expected), abs=1e-5)

    def test_the_order_turns_the_share(self, tiny_judge):
        same = Pair("Say A.", "A", "A", "mine", "theirs")
        assert tiny_judge(same, True) == pytest.approx(1 - tiny_judge(same, False))

    def test_a_pair_longer_than_the_model_reads_is_refused_not_cut(self, tiny_judge):
        with pytest.raises(PairRefused, match=r"the question has \d+ tokens, tiny reads 2048"):
            tiny_judge(Pair("Say A.", "a" * 3000, "b", "mine", "theirs"), True)

    def test_a_model_that_does_not_say_how_much_it_reads_is_asked_for_it(self):
        config = BloomConfig(vocab_size=300, hidden_size=8, n_layer=1, n_head=1)
        model, tokenizer = BloomForCausalLM(config), byte_tokenizer()
        with pytest.raises(
            ValueError, match=r"configuration of tiny \(bloom\) does not say .* write max_length=N"
        ):
            ModelJudge(model, tokenizer, "tiny")
        assert ModelJudge(model, tokenizer, "tiny", max_length=100).max_length == 100

    def test_a_chat_model_is_asked_through_its_template(self, tiny_judge):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        chatting = ModelJudge(tiny_judge.model, tokenizer, "tiny")
        assert chatting.settings["template"] == "chat"
        assert chatting(PAIR, True) != tiny_judge(PAIR, True)


class TestFile:
    def judged(self, **change):
        row = {
            "instruction": "Say A.",
            "output_1": "reference says",
            "output_2": "model says",
            "preference": 2,
        }
        return FileJudge([row | change], "someone")(PAIR, True)

    def test_it_looks_the_pair_up(self):
        assert self.judged() == 1.0

    def test_a_pair_in_the_other_order_is_turned(self):
        assert self.judged(output_1="model says", output_2="reference says") == 0.0

    @pytest.mark.parametrize("column", ["instruction", "output_1", "output_2"])
    def test_judgements_of_other_texts_do_not_count(self, column):
        assert self.judged(**{column: "something else"}) is None

    ROW = {"instruction": "Say A.", "output_1": "reference says", "output_2": "model says"}  # noqa: RUF012
    TURNED = {"instruction": "Say A.", "output_1": "model says", "output_2": "reference says"}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("row", "preference", "shares"),
        [(ROW, 1, "1 and 0"), (ROW, 1.5, "1 and 0.5"), (TURNED, 2, "0 and 1")],
    )
    def test_two_judgements_of_the_same_texts_must_agree(self, row, preference, shares):
        rows = [
            self.ROW | {"preference": 2},
            self.ROW | {"preference": None},
            row | {"preference": preference},
        ]
        with pytest.raises(ValueError, match=f"judgements 0 and 2 contradict each other: {shares} of a win"):
            FileJudge(rows, "someone")

    def test_judgements_that_agree_and_rows_without_one_count_once(self):
        said = [(self.ROW, None), (self.ROW, 1.3), (self.TURNED, 1.7), (self.ROW, None)]
        judge = FileJudge([row | {"preference": preference} for row, preference in said], "someone")
        assert judge(PAIR, True) == pytest.approx(0.3)

    def test_equal_outputs_are_a_pair_like_any_other(self):
        row = {"instruction": "Say A.", "output_1": "A", "output_2": "A", "preference": 1}
        assert FileJudge([row, row], "someone")(Pair("Say A.", "A", "A", "mine", "theirs"), True) == 0.0

    def test_a_row_without_its_texts_is_refused(self):
        with pytest.raises(ValueError, match="judgement 0: no column 'output_1'"):
            FileJudge([{"instruction": "Say A.", "preference": 2}], "someone")


class TestPairs:
    def test_outputs_without_a_reference_output_are_refused(self):
        with pytest.raises(
            ValueError, match=r"3 of 10 instructions of outputs have no output of the reference"
        ):
            pair_up(read(OUTPUTS), read(REFERENCE)[3:])

    def test_white_space_around_an_instruction_does_not_part_a_pair(self):
        rows = [row | {"instruction": f"{row['instruction']}\n"} for row in read(REFERENCE)]
        found = pair_up(read(OUTPUTS), rows)
        assert [pair.instruction for pair in found] == [row["instruction"] for row in rows]

    def test_two_outputs_for_one_instruction_are_refused(self):
        rows = read(OUTPUTS)
        with pytest.raises(ValueError, match="outputs, row 10: a second output"):
            pair_up([*rows, rows[0] | {"output": "other"}], read(REFERENCE))

    def test_a_model_without_a_name_is_asked_for(self):
        rows = [{k: v for k, v in row.items() if k != "generator"} for row in read(OUTPUTS)]
        with pytest.raises(ValueError, match="name no generator: write generator=NAME"):
            pair_up(rows, read(REFERENCE))
        assert pair_up(rows, read(REFERENCE), "mine")[0].generator == "mine"


class TestCommand:
    def options(self, tmp_path, **more):
        return {
            "outputs": str(OUTPUTS),
            "reference": str(REFERENCE),
            "out": str(tmp_path / "result.json"),
        } | more

    def test_a_file_of_judgements_gives_the_win_rate(self, tmp_path):
        found = main(self.options(tmp_path, judge="file", annotations=str(ANNOTATIONS)))
        assert found["win_rate"] == pytest.approx(100 * 5 / 9)
        assert (found["n_wins"], found["n_draws"], found["n_unjudged"]) == (4, 2, 1)
        assert (found["generator"], found["reference"]) == ("invented-7b", "text_davinci_003")
        assert found["judge"] == "invented_judge"
        assert json.loads((tmp_path / "result.json").read_text()) == found

    def test_annotations_alone_give_the_same_win_rate(self, tmp_path):
        options = self.options(tmp_path, judge="file", annotations=str(ANNOTATIONS))
        alone = main({name: options[name] for name in ("judge", "annotations", "out")})
        assert alone["win_rate"] == main(options)["win_rate"]

    def test_annotations_of_other_outputs_are_refused(self, tmp_path):
        rows = [row | {"output_2": "Another model said this."} for row in read(ANNOTATIONS)]
        other = tmp_path / "annotations.json"
        other.write_text(json.dumps(rows))
        with pytest.raises(ValueError, match="it has 10 of the 10 instructions, but with other outputs"):
            main(self.options(tmp_path, judge="file", annotations=str(other)))

    def test_an_endpoint_judges_and_what_it_wrote_is_a_file_of_judgements(
        self, tmp_path, endpoint, monkeypatch
    ):
        monkeypatch.setenv("MY_KEY", "secret")
        asked = {"judge": "endpoint", "url": endpoint.url, "model": "some-model", "key_env": "MY_KEY"}
        found = main(self.options(tmp_path, **asked, both_orders="true"))
        assert (found["win_rate"], found["n_draws"]) == (50.0, 10)  # it always says 1
        journal = tmp_path / "result.judgements.jsonl"
        again = main(
            self.options(tmp_path, judge="file", annotations=str(journal), out=str(tmp_path / "b.json"))
        )
        assert again["win_rate"] == found["win_rate"]
        assert endpoint.headers[0]["Authorization"] == "Bearer secret"
        assert all("secret" not in path.read_text() for path in tmp_path.iterdir())

    def test_a_key_is_sent_only_where_it_is_asked_for(self, tmp_path, endpoint, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        main(self.options(tmp_path, judge="endpoint", url=endpoint.url, model="m", limit="2"))
        assert len(endpoint.requests) == 2
        assert "Authorization" not in endpoint.headers[0]

    def test_files_lie_beside_the_outputs_and_name_reference_and_judge(self, tmp_path, endpoint):
        outputs = tmp_path / "mine.json"
        outputs.write_bytes(OUTPUTS.read_bytes())
        options = self.options(tmp_path, judge="endpoint", url=endpoint.url, model="org/some-model")
        main({name: value for name, value in options.items() if name != "out"} | {"outputs": str(outputs)})
        stem = "mine.vs_text_davinci_003.org_some-model"
        assert {path.name for path in tmp_path.glob("mine.vs*json*")} >= {
            f"{stem}.win_rate.json",
            f"{stem}.judgements.jsonl",
        }

    @pytest.mark.parametrize(("options", "message"), [
        ({"judge": "fil"}, r"judge must be one of file, endpoint, model; got 'fil'; did you mean 'file'"),
        ({}, r"judge must be one of"),
        ({"judge": "endpoint", "model": "m"}, r"judge=endpoint needs url="),
        ({"judge": "file"}, r"judge=file needs annotations="),
        ({"judge": "model", "model": "m", "url": "x"}, r"judge=model takes no url"),
        ({"judge": "endpoint", "url": "http://x", "model": "m", "attempts": "many"}, r"attempts must be an integer"),
        ({"judge": "endpoint", "url": "http://x", "model": "m", "limit": "0"}, r"limit must be positive; got '0'"),
        ({"judge": "endpoint", "url": "http://x", "model": "m", "both_orders": "yes"}, r"must be true or false"),
        ({"judge": "endpoint", "url": "http://x", "model": "m", "key_env": "NOT_THERE"}, r"no such environment"),
    ])  # fmt: skip
    def test_options_that_do_not_fit_are_explained(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            main(self.options(tmp_path, **options))

    def test_the_list_of_options_is_complete(self):
        assert {"judge", "outputs", "reference", "annotations", "url", "model", "source"} <= set(OPTIONS)


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
