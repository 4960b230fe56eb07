"""Prompt templates: Alpaca's text, chat templates, one BOS."""

import pytest

from reft_lightning.base_models.loading import byte_tokenizer
from reft_lightning.data.encoding import encode
from reft_lightning.data.example import Example
from reft_lightning.data.prompts import apply_template

EXAMPLE = Example("t", "Name a colour.", "Red", "Red", ("Red", "Blue"), "t/train.json, row 3")
# as for Llama-2: white space before an answer, BOS before everything
TURNS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<<' + m.content + '>>' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# ChatML: no white space, but a marker for whose turn it is
CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
BOS = "{{ bos_token }}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)


def chatting(template=TURNS, add_bos=True):
    tokenizer = byte_tokenizer(add_bos)
    tokenizer.chat_template = template
    return tokenizer


def one(name, example=EXAMPLE, tokenizer=None, **settings):
    (found,) = apply_template(name, [example], tokenizer or byte_tokenizer(), **settings)
    return found


def with_context(context):
    return Example("t", "Add up.", "3", "3", context=context)


class TestAlpaca:
    def test_the_header_without_input_is_stanfords(self):
        assert one("alpaca").prompt == (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n### Instruction:\nName a colour.\n\n### Response:\n"
        )

    def test_the_header_with_input_is_stanfords(self):
        assert one("alpaca", with_context("1 + 2")).prompt == (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd up.\n\n"
            "### Input:\n1 + 2\n\n### Response:\n"
        )

    def test_target_answer_and_options_stay(self):
        found = one("alpaca")
        assert (found.target, found.answer, found.options) == ("Red", "Red", ("Red", "Blue"))

    def test_braces_and_percent_signs_of_a_row_stay_text(self):
        example = Example("t", "Print {x} and 100 %s.", "ok", "ok")
        assert "Print {x} and 100 %s.\n" in one("alpaca", example).prompt


class TestPlain:
    def test_the_prompt_stays_as_it_is(self):
        assert one("plain") == EXAMPLE

    def test_a_context_follows_on_a_new_line(self):
        assert one("plain", with_context("1 + 2")).prompt == "Add up.\n1 + 2"


class TestChat:
    @pytest.mark.parametrize(
        ("template", "add_bos", "count"),
        [
            *(
                (template, True, 1)
                for template in (TURNS, BOS + TURNS, CHATML, BOS + CHATML, "\n" + BOS + TURNS)
            ),
            *((template, False, 1) for template in (BOS + TURNS, BOS + CHATML)),
            (CHATML, False, 0),  # none is invented
        ],
    )
    def test_there_is_one_bos_where_tokenizer_or_template_has_it(self, template, add_bos, count):
        tokenizer = chatting(template, add_bos)
        encoded = encode(tokenizer, one("chat", tokenizer=tokenizer), 512)
        assert (encoded.prompt_ids[0] == tokenizer.bos_token_id) == bool(count)
        assert (encoded.prompt_ids + encoded.target_ids).count(tokenizer.bos_token_id) == count

    @pytest.mark.parametrize("template", [TURNS, BOS + TURNS, CHATML, BOS + CHATML])
    @pytest.mark.parametrize("add_bos", [True, False])
    def test_training_reads_what_the_template_makes_of_the_whole_conversation(self, template, add_bos):
        tokenizer = chatting(template, add_bos)
        encoded = encode(tokenizer, one("chat", tokenizer=tokenizer), 512)
        messages = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red"}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False).removeprefix("<s>")
        said = tokenizer.decode(encoded.prompt_ids + encoded.target_ids, skip_special_tokens=True)
        assert whole.startswith(said)

    def test_the_prompt_ends_where_the_assistant_begins(self):
        found = one("chat", tokenizer=chatting(CHATML))
        assert found.prompt == "<user>Name a colour.\n<assistant>"
        assert (found.target, found.options) == ("Red", ("Red", "Blue"))

    def test_white_space_in_front_of_answers_belongs_to_target_and_options(self):
        found = one("chat", tokenizer=chatting(TURNS))
        assert found.prompt == "[INST] Name a colour. [/INST]"
        assert (found.target, found.options, found.answer) == (" Red", (" Red", " Blue"), "Red")

    def test_system_prompt_earlier_turns_and_context_are_rendered_in_order(self):
        example = Example(
            "t", "Add up.", "3", "3", context="1 + 2", turns=(("user", "Hi"), ("assistant", "Hello"))
        )
        found = one("chat", example, chatting(CHATML), system_prompt="Be brief.")
        assert found.prompt == (
            "<system>Be brief.\n<user>Hi\n<assistant>Hello\n<user>Add up.\n\n1 + 2\n<assistant>"
        )
        assert (found.turns, found.context) == ((), "")

    def test_a_rows_own_system_turn_stays(self):
        example = Example("t", "Hi", "Hello", "Hello", turns=(("system", "Own."),))
        assert "<system>Own.\n<user>" in one("chat", example, chatting(CHATML), system_prompt="Mine.").prompt


class TestErrors:
    def test_an_unknown_template_names_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"unknown prompt template 'alpca'; did you mean 'alpaca'\?; choose one of"
        ):
            one("alpca")

    def test_a_tokenizer_without_chat_template_is_named_with_the_way_out(self):
        with pytest.raises(
            ValueError, match=r"needs a tokenizer with a chat template.*template alpaca or plain"
        ):
            one("chat")

    @pytest.mark.parametrize("name", ["plain", "alpaca"])
    def test_templates_of_one_turn_refuse_a_conversation(self, name):
        example = Example(
            "t", "Hi", "Hello", "Hello", source="row 9", turns=(("user", "a"), ("assistant", "b"))
        )
        with pytest.raises(
            ValueError,
            match=rf"row 9: template {name} has no place for earlier turns of a conversation \(there are 2\)",
        ):
            one(name, example)

    @pytest.mark.parametrize("name", ["plain", "alpaca"])
    def test_templates_of_one_turn_refuse_a_system_prompt(self, name):
        with pytest.raises(ValueError, match=rf"template {name} has no place for a system prompt"):
            one(name, system_prompt="Be brief.")

    def test_a_template_that_knows_no_system_role_names_the_row(self):
        tokenizer = chatting(NO_SYSTEM + TURNS)
        with pytest.raises(
            ValueError, match=r"t/train.json, row 3: .* rejects the turns system, user: System"
        ):
            one("chat", tokenizer=tokenizer, system_prompt="Be brief.")

    def test_a_template_that_fails_names_the_row(self):
        """As in a template that concatenates texts, but is given the parts of a message."""
        with pytest.raises(
            ValueError, match=r"t/train.json, row 3: .* rejects the turns user: TypeError: .*concatenate"
        ):
            one("chat", tokenizer=chatting("{{ messages[0].content + [1] }}"))

    def test_a_template_that_writes_the_date_is_warned_of_once(self, caplog):
        tokenizer = chatting("{{ strftime_now('%d %b %Y') }}" + TURNS)
        for _ in range(2):
            one("chat", tokenizer=tokenizer)
        one("chat", tokenizer=chatting())
        assert caplog.text.count("the chat template writes today's date into prompts") == 1

    def test_an_unknown_role_names_row_and_nearest(self):
        example = Example("t", "Hi", "Hello", "Hello", source="row 9", turns=(("assistent", "a"),))
        with pytest.raises(
            ValueError, match=r"row 9: a turn's role .* got 'assistent'; did you mean 'assistant'"
        ):
            one("chat", example, chatting())
