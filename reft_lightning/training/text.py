"""Train a language model on texts without prompts, and evaluate how well it predicts other texts."""

from __future__ import annotations

from .generation import GenerationModule


class TextModule(GenerationModule):
    r"""Log the loss of texts and its :math:`\exp`, the perplexity; takes the arguments of :class:`GenerationModule`."""

    generates = False

    def on_validation_epoch_end(self) -> None:
        """Log the loss and the perplexity of the validation rows."""
        super().on_validation_epoch_end()
        self.log(f"{self.prefix}val/perplexity", self.loss.compute().exp(), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the loss and the perplexity of the test rows."""
        super().on_test_epoch_end()
        self.log(f"{self.prefix}test/perplexity", self.loss.compute().exp(), sync_dist=True)
