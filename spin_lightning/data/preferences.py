"""Preference data: two responses to each prompt, the better and the worse one, for stages that learn from such pairs.

A row is read, encoded and counted as any other; its worse response is encoded behind the same prompt ids. What cannot
teach anything is left out and counted: pairs whose two responses are the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch.utils.data import DataLoader, Dataset

from spin_lightning.data.encoding import Encoded
from spin_lightning.data.loader import ResumableLoader
from spin_lightning.data.module import RowDataModule
from spin_lightning.data.training_set import Game
from spin_lightning.models.batches import collate_pairs
from spin_lightning.types import Prompt, Row, UserError


class PreferenceDataModule(RowDataModule):
    """Prompts with a better and a worse response each.

    Reads the columns ``chosen`` and ``rejected``, or ``real`` and ``generated``, each text or a list of turns, with a
    ``prompt`` or as whole conversations; and where they are there ``preference``, the probability that the first is the
    better one (below 1/2 both change places), and ``margin``, how much better it is. A game's own ``pairs/`` are such
    data. Takes every setting of ``RowDataModule`` too.

    Args:
        train_data: A file (JSON, JSONL, CSV, TSV, Parquet; also .gz or .zst), a folder, or a hub name. Several: a map
            from each to its weight, such as ``{a.jsonl: 1.0, b.jsonl: 0.5}``: 1 takes all of its rows, 0.5 a random
            half, 2 each row twice.
        val_data: The same, for held-out pairs. None sets ``val_fraction`` of the training rows aside.
        too_long: What is done with a response that is longer than ``max_response_tokens``: ``cut`` cuts it there,
            without a terminator; ``drop`` leaves its row out, counted. A row with too long a prompt is left out in any
            case.

    Raises:
        UserError: A setting is outside its range; or, in ``setup``, the data cannot be used.

    Example:
        >>> data = PreferenceDataModule("pairs.jsonl", too_long="drop", max_response_tokens=512)
        >>> data.needs_rejected
        True
    """

    needs_rejected = True
    also_counted: ClassVar[tuple[str, ...]] = ("cut_rejected", "same_answers", "long_answers")

    def __init__(
        self,
        train_data: str | dict[str, float],
        val_data: str | dict[str, float] | None = None,
        too_long: Literal["cut", "drop"] = "cut",
        **rows: Any,
    ) -> None:
        super().__init__(train_data, val_data, **rows)
        if too_long not in ("cut", "drop"):
            raise UserError(f"data.too_long must be 'cut' or 'drop', got {too_long!r}.")
        self.too_long = too_long
        #: The clock of a run that stores its pairs with their log-probs. None: they are served as they are read.
        self.game: Game | None = None

    def reason_to_leave_out(self, encoded: Encoded, other: Encoded) -> str | None:
        if self.too_long == "drop" and "length" in (encoded.finish_reason, other.finish_reason):
            return "long_answers"
        return "same_answers" if encoded.real_ids == other.real_ids else None

    def advice_on_left_out(self, rows: Sequence[Row]) -> str:
        differing = sum((row.real, row.real_extras) != (row.rejected, row.rejected_extras) for row in rows)
        if self.too_long == "cut" and self.report["train"]["same_answers"]["count"] and differing:
            return (
                f"The two responses of {differing} rows differ, likely only behind the cap, data.max_response_tokens "
                f"{self.max_response_tokens}: raise it."
            )
        return super().advice_on_left_out(rows)

    def train_dataloader(self) -> ResumableLoader:
        """The pairs of the iteration that begins; without a clock as they are: nobody has scored them."""
        if self.game is not None:
            return self._serve(self.game.ensure_iteration())
        pairs = Pairs(self.prompts)
        return self._make_loader(pairs, pairs.prompt_ids, collate_pairs)

    def val_dataloader(self) -> list[Any] | DataLoader[Any]:
        """The held-out pairs, as they are."""
        return self._beside_other(self._make_held_out_loader(Pairs(self.val_prompts), collate_pairs))


class Pairs(Dataset[dict[str, Any]]):
    """Prompts with two responses as rows of pairs, under the names of a pair store's columns.

    Rows that ask the same have one ``prompt_id``, that of the first, so that a batch computes their prompt once.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        first: dict[tuple[int, ...], int] = {}
        self.prompt_ids = [first.setdefault(tuple(prompt.prompt_ids), prompt.prompt_id) for prompt in prompts]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt = self.prompts[index]
        assert prompt.rejected_ids is not None
        return {
            "pair_id": index,
            "prompt_id": self.prompt_ids[index],
            "prompt_ids": prompt.prompt_ids,
            "real_ids": prompt.real_ids,
            "generated_ids": prompt.rejected_ids,
            "real_finish_reason": prompt.real_finish_reason,
            "generated_finish_reason": prompt.rejected_finish_reason,
            "preference": prompt.row.preference,
            "margin": prompt.row.margin,
        }
