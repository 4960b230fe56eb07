"""Training with a shortened pass, against training with the plain one, on tiny models and invented rows."""

import random

import tiny
import torch
from laws import shaken
from model_laws import exact_loss

import reft_lightning as rl
from reft_lightning.data.encoding import Collator, Encoded, target_only
from reft_lightning.data.example import Example

ROWS, BATCH = 12, 4


class Rows(list):
    """Encoded rows with the lengths that the data set of a run knows."""

    lengths = property(lambda self: [len(row) for row in self])
    prompt_lengths = property(lambda self: [len(row.prompt_ids) for row in self])


def encoded(count=ROWS, seed=0, shortest=12):
    draw = random.Random(seed)
    example = Example("boolq", "prompt", "target", "answer")

    def ids(least, most):
        return [draw.randrange(3, tiny.VOCABULARY) for _ in range(draw.randint(least, most))]

    return Rows(Encoded(ids(shortest, 20), [*ids(1, 4), tiny.EOS], example, row=i) for i in range(count))


def attached(family, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    reft = rl.attach(tiny.model(family, dtype), "loreft", rank=2, **settings)
    shaken(reft.to(dtype).interventions)
    return reft.train()


def batches(rows, steps):
    order, found = random.Random(1), []
    while len(found) < steps:
        shuffled = order.sample(range(len(rows)), len(rows))
        found += [shuffled[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return [Collator(tiny.PAD)([rows[i] for i in batch]) for batch in found[:steps]]


def train(reft, rows, run=None, steps=6):
    """Return the losses, and the gradients of the last step."""
    optimizer = torch.optim.AdamW([p for p in reft.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for batch in batches(rows, steps):
        optimizer.zero_grad()
        inputs = target_only(batch)
        boundary, numbers = inputs.pop("boundary"), inputs.pop("rows")
        output = reft(**inputs) if run is None else run(inputs, numbers.tolist(), boundary)
        loss = exact_loss(output.logits, inputs["labels"])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [p.grad for p in reft.interventions.parameters()]


def assert_same_training(plain, short, run, rows, steps, tolerance):
    torch.manual_seed(3)
    expected, gradients = train(plain, rows, steps=steps)
    torch.manual_seed(3)
    losses, found = train(short, rows, run, steps=steps)
    torch.testing.assert_close(losses, expected, atol=0, rtol=tolerance)
    assert any(gradient.abs().max() > 0 for gradient in found)
    for gradient, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=tolerance * float(other.abs().max()), rtol=tolerance)
