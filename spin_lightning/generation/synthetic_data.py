"""The data of a game: the rows of any stage, and the pairs the opponent makes of them.

The pairs come from the game's clock, which ``train_dataloader`` asks for them: it is the one hook that runs before the
loader is built, at the right epoch, on a fresh start and on a resume. Without a game it serves the real responses
alone.
"""

from __future__ import annotations

from typing import Any

from spin_lightning.data.loader import ResumableLoader
from spin_lightning.data.module import RowDataModule, refuse_below
from spin_lightning.data.training_set import NOTHING as NOTHING
from spin_lightning.data.training_set import Game
from spin_lightning.data.training_set import TrainingSet as TrainingSet
from spin_lightning.generation import ContinuousGenerator, ResponseGenerator
from spin_lightning.terminal import say
from spin_lightning.types import UserError


class SyntheticDataModule(RowDataModule):
    """Prompts and real responses of an SFT data set, and the pairs the opponent makes of them.

    Takes every setting of ``RowDataModule`` too.

    Args:
        train_data: A file (JSON, JSONL, CSV, TSV, Parquet; also .gz or .zst), a folder, or a hub name. Several: a map
            from each to its weight, such as ``{a.jsonl: 1.0, b.jsonl: 0.5}``: 1 takes all of its rows, 0.5 a random
            half, 2 each row twice. A target that moves: a list with one source, or such a map, an iteration.
        val_data: One source or such a map, for the held-out NLL. None sets ``val_fraction`` of the training rows aside.
        generator: What answers the prompts, with its settings: ``ContinuousGenerator``, ``TransformersGenerator``,
            ``VLLMGenerator`` (its ``python`` has vLLM), ``OpenAIGenerator`` (its ``url`` is a vLLM's), or the class
            path of your own. Its ``max_new_tokens`` also caps the real responses.
        answers_per_prompt: K, how many responses the opponent gives to each prompt in each iteration.
        history: How many earlier iterations' pairs are trained on beside the new ones. The paper: 1.
        keep_prompts_together: Put all pairs of a prompt next to each other, so that a batch computes the prompt and its
            real response once. Pays with ``answers_per_prompt`` above 1; costs variety, as a batch then holds fewer
            prompts: raise ``batch_size`` with it.
        max_response_tokens: None, or the generator's ``max_new_tokens``: one cap for real and generated responses.

    Raises:
        UserError: A setting is outside its range; or, in ``setup``, the data cannot be used.

    Example:
        >>> data = SyntheticDataModule("train.jsonl", generator=ContinuousGenerator(max_new_tokens=128), batch_size=16)
        >>> data.max_response_tokens
        128
    """

    cap_setting = "data.generator.max_new_tokens"
    has_iterations = True

    def __init__(
        self,
        train_data: str | dict[str, float] | list[str | dict[str, float]],
        val_data: str | dict[str, float] | None = None,
        generator: ResponseGenerator | None = None,
        answers_per_prompt: int = 1,
        history: int = 1,
        keep_prompts_together: bool = False,
        max_response_tokens: int | None = None,
        **rows: Any,
    ) -> None:
        generator = generator if generator is not None else ContinuousGenerator()
        if not isinstance(generator, ResponseGenerator):
            raise UserError(
                f"data.generator must be a ResponseGenerator, got {generator!r}. "
                "Of the settings, give all but the data by name."
            )
        generator.check_contract()
        if max_response_tokens not in (None, generator.max_new_tokens):
            raise UserError(
                f"data.max_response_tokens is {max_response_tokens!r}, and data.generator.max_new_tokens "
                f"{generator.max_new_tokens!r}: real and generated responses are cut at one length, or their lengths "
                "would give the generated ones away. Set data.generator.max_new_tokens alone."
            )
        source: Any = train_data  # the base takes a list of a class that has iterations
        super().__init__(source, val_data, max_response_tokens=generator.max_new_tokens, **rows)
        refuse_below(1, answers_per_prompt=answers_per_prompt)
        refuse_below(0, history=history)
        self.generator = generator
        self.answers_per_prompt = self.examples_per_prompt = answers_per_prompt
        self.history = history
        self.keep_prompts_together = keep_prompts_together
        #: The clock of the game, set by the SelfPlay callback. None: plain SFT.
        self.game: Game | None = None

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit" and getattr(self._module, "needs_generator", True):
            self._check_generator()
        self.max_response_tokens = self.generator.max_new_tokens  # of another generator, perhaps, than at first
        super().setup(stage)

    def _check_generator(self) -> None:
        """Refuse a generator that cannot respond; where training goes on first, on pairs that are there, say it only.

        Raises:
            UserError: It is needed at once.
        """
        try:
            self.generator.check_ready()
        except UserError as error:
            trainer: Any = self.trainer
            callbacks = [] if trainer is None else trainer.callbacks
            clock = next((each for each in callbacks if hasattr(each, "begins_iteration")), None)
            if clock is None or trainer.fast_dev_run or clock.begins_iteration():
                raise
            say(f"note: {error} Training goes on without; the next iteration needs it.")

    def teardown(self, stage: str) -> None:
        self.generator.shut_down()

    def on_exception(self, exception: BaseException) -> None:
        self.generator.shut_down()

    def train_dataloader(self) -> ResumableLoader:
        """Pairs of the iteration the next epoch belongs to; without a game, the real responses."""
        if self.game is None:
            if isinstance(self.train_data, list):
                raise UserError("data.train_data is a list with one source an iteration, and nothing plays iterations.")
            return super().train_dataloader()
        return self._serve(self.game.ensure_iteration(), self.keep_prompts_together)
