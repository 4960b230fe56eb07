"""Nested calls, calls in several threads and calls with positional arguments edit as single ones do."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import torch.nn.functional as F
from laws import shaken
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import reft_lightning as rl

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
BATCH = tiny.padded(tiny.rows(5, 3), "left")
OTHER = tiny.padded(tiny.rows(7, 2, 4, seed=3), "left")


def attached(positions="f1+l1+decode", **settings):
    torch.manual_seed(1)
    reft = rl.attach(tiny.model("llama"), "loreft", rank=2, positions=positions, **settings).eval()
    shaken(reft.interventions)
    return reft


class Asks(LogitsProcessor):
    """Does something else with the model before every token, and changes nothing."""

    def __init__(self, ask):
        self.ask = ask

    def __call__(self, input_ids, scores):
        self.ask()
        return scores


def interrupted(reft, ask):
    return reft.generate(**BATCH, **GREEDY, logits_processor=LogitsProcessorList([Asks(ask)]))


def asks(reft):
    def trains():
        with torch.enable_grad():
            reft(**OTHER).logits.sum().backward()

    def fails():
        with pytest.raises(IndexError):
            reft(torch.tensor([[tiny.VOCABULARY]]))

    def compares():
        with reft.disabled():
            reft(**OTHER)

    return {
        "a forward pass": lambda: reft(**OTHER),
        "a generation": lambda: reft.generate(**OTHER, **GREEDY),
        "a comparison with the base": compares,
        "a training step": trains,
        "a call that fails": fails,
    }


@pytest.mark.parametrize("positions", ["f1+l1+decode", "decode", "l1"])
def test_a_call_inside_a_generation_does_not_end_its_edits(positions):
    reft = attached(positions)
    expected = reft.generate(**BATCH, **GREEDY)
    with reft.disabled():
        assert not torch.equal(reft.generate(**BATCH, **GREEDY), expected), "the edit must show in the ids"
    for what, ask in asks(reft).items():
        assert torch.equal(interrupted(reft, ask), expected), what


def test_a_call_inside_a_generation_gets_what_it_gets_by_itself():
    reft, found = attached(), []
    with torch.no_grad():
        expected = reft(**OTHER).logits
    interrupted(reft, lambda: found.append(reft(**OTHER).logits))
    assert len(found) == 6
    assert all(torch.equal(logits, expected) for logits in found)


def test_two_adapters_of_one_base_may_call_each_other():
    base = tiny.model("llama")
    first = rl.attach(base, "loreft", rank=2, positions="all").eval()
    second = rl.attach(base, "direft", rank=2, positions="all").eval()
    shaken(first.interventions), shaken(second.interventions)
    expected, found = first.generate(**BATCH, **GREEDY), []
    with torch.no_grad():
        alone = second(**OTHER).logits
    assert torch.equal(interrupted(first, lambda: found.append(second(**OTHER).logits)), expected)
    assert all(torch.equal(logits, alone) for logits in found)


def at_once(*jobs, rounds=5):
    """Run jobs in threads that start together, several times; return what each gave."""
    for _ in range(rounds):
        start = threading.Barrier(len(jobs))

        def run(job, start=start):
            start.wait()
            return job()

        with ThreadPoolExecutor(len(jobs)) as pool:
            yield list(pool.map(run, jobs))


def test_threads_with_one_model_do_not_disturb_each_other():
    reft = attached()

    def generates():
        return reft.generate(**BATCH, **GREEDY)

    def generates_others():
        return reft.generate(**OTHER, **GREEDY)

    def reads():
        with torch.no_grad():
            return torch.stack([reft(**OTHER).logits for _ in range(8)])

    def uses_the_base():
        with torch.no_grad():
            return torch.stack([reft.base_model(**OTHER).logits for _ in range(8)])

    jobs = (generates, generates_others, reads, uses_the_base)
    expected = [job() for job in jobs]
    for found in at_once(*jobs):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.no_grad():  # nothing of a thread is left
        shaken(reft.interventions, seed=7)
        other = copy.deepcopy(reft)
    assert torch.equal(reft(**BATCH).logits, other(**BATCH).logits)


def gradients(reft, batch):
    found = list(reft.interventions.parameters())
    loss = reft(**batch).logits.square().mean()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, found)])


@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_threads_get_their_own_gradients(checkpointing, component):
    reft = attached(component=component).train()
    if checkpointing:
        reft.base_model.gradient_checkpointing_enable()

    jobs = (lambda: gradients(reft, BATCH), lambda: gradients(reft, OTHER))
    expected = [job() for job in jobs]
    for found in at_once(*jobs):
        torch.testing.assert_close(found, expected)
    functions = [vars(m).get("_gradient_checkpointing_func") for m in reft.base_model.modules()]
    assert len({getattr(f, "func", f) for f in functions if f}) == checkpointing, "the base model's own again"


def test_a_checkpointed_pass_waits_until_another_has_ended():
    """Both replace the base model's checkpoint function: the last to end would put that of the other back."""
    reft, found = attached().train(), []
    reft.base_model.gradient_checkpointing_enable()
    layers = reft.base_model.model.layers
    expected, before = gradients(reft, OTHER), [layer._gradient_checkpointing_func for layer in layers]
    inside, ended = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: found.append(gradients(reft, OTHER)))

    def meet(*_):
        if threading.current_thread() is other:
            inside.set()
            ended.wait(30)
        elif other.ident is None:
            other.start()
            inside.wait(0.3)

    layers[0].register_forward_pre_hook(meet)
    gradients(reft, BATCH)
    ended.set()
    other.join()
    torch.testing.assert_close(found, [expected])
    assert [layer._gradient_checkpointing_func for layer in layers] == before


def test_positional_arguments_are_read_by_the_base_model_s_signature():
    reft = attached("all")
    expected = reft.generate(**BATCH, **GREEDY)

    def loop(model, input_ids, **given):
        attention_mask = given["attention_mask"]
        for _ in range(GREEDY["max_new_tokens"]):
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            following = model(input_ids, attention_mask, places).logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, following], 1)
            attention_mask = F.pad(attention_mask, (0, 1), value=1)
        return input_ids

    assert torch.equal(reft.generate(**BATCH, **GREEDY, custom_generate=loop), expected)


@pytest.mark.parametrize(
    "given", [{"guidance_scale": 2.0}, {"generation_config": GenerationConfig(guidance_scale=2)}]
)
def test_guidance_by_a_second_text_is_refused(given):
    with pytest.raises(ValueError, match="guidance_scale reads a second text"):
        attached().generate(**BATCH, **given)
    assert attached().generate(**BATCH, **GREEDY, guidance_scale=1.0).shape == (2, 11)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_made_during_a_generation_has_no_call_under_way(way):
    reft = attached()
    copies = []
    made = copy.deepcopy if way == "deepcopy" else lambda reft: pickle.loads(pickle.dumps(reft))
    interrupted(reft, lambda: copies.append(made(reft)))
    with torch.no_grad():
        expected = tiny.model("llama").eval()(**OTHER).logits
        assert torch.equal(copies[0].base_model(**OTHER).logits, expected)
        assert torch.equal(copies[0](**OTHER).logits, reft(**OTHER).logits)


def test_a_call_of_the_base_model_inside_disabled_is_unedited_within_a_generation():
    reft, untouched = attached(), tiny.model("llama").eval()
    expected, found = untouched(**OTHER).logits, []

    def ask():
        with reft.disabled(), torch.no_grad():
            found.append(reft.base_model(**OTHER).logits)

    undisturbed = reft.generate(**BATCH, **GREEDY)
    assert torch.equal(interrupted(reft, ask), undisturbed)
    assert found
    assert all(torch.equal(logits, expected) for logits in found)


@pytest.mark.parametrize("change", ["scale", "nulled"])
def test_blocks_that_are_run_again_edit_as_in_the_forward_pass(change):
    """What is set for a pass is over before the backward pass of gradient checkpointing runs its blocks again."""

    def gradients(checkpointing):
        reft = attached("f1+l1", component="attention_output").train()  # inside of what is run again
        if checkpointing:
            reft.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        if change == "nulled":
            with reft.nulled():
                logits = reft(**BATCH, use_cache=False).logits
        else:
            reft.scale = 3.0
            logits = reft(**BATCH, use_cache=False).logits
            reft.scale = 1.0
        logits.square().sum().backward()
        return [p.grad for p in reft.interventions.parameters() if p.grad is not None]

    again = gradients(True)
    assert again
    torch.testing.assert_close(again, gradients(False))
