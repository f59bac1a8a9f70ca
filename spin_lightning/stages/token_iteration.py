"""An iteration of token-level self-play: the opponent scores the real responses once, and the policy trains on them.

Nothing is generated: the opponent's law of each next token takes the place of a response that it would sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spin_lightning.generation import ContinuousGenerator
from spin_lightning.generation.synthetic_data import SyntheticDataModule, TrainingSet
from spin_lightning.losses import TokenLoss
from spin_lightning.models.batches import collate_laws
from spin_lightning.models.rope import refuse_crossing
from spin_lightning.models.saving import weights_hash
from spin_lightning.runs import processes
from spin_lightning.runs.shards import refuse_broken_chain, refuse_other_binding
from spin_lightning.stages.export import origin_of, plain_card
from spin_lightning.stages.iteration import Iteration, PolicyView, Run, iteration_folder
from spin_lightning.stages.law_table import LawStore, fill_laws
from spin_lightning.terminal import say


class TokenIteration(Iteration):
    """The opponent says what may stand in the place of each token of the real responses.

    Args:
        number: From 0.
        run: Where it is played, and with what.
        policy: The model under training, which is the opponent where the iteration begins.
        loss: Says how much of the opponent's laws is kept.
    """

    def __init__(self, number: int, run: Run, policy: PolicyView, loss: TokenLoss) -> None:
        super().__init__(number, run, policy)
        self.loss = loss

    def open(self, known: str | None, is_fresh: bool) -> LawStore:
        if not is_fresh:
            store = self._laws_of(self.number)
            self.refuse_other_table(store, known)
            keys = ("prompts_sha256", "encoding_sha256", "top_k", "shard_size")
            refuse_other_binding(store, self._depends_on(), keys)
            return store
        data, model, number = self.run.data, self.policy.model, self.number
        if number == 0:
            say_unused(data, type(self.loss).__name__)
        data.refuse_longer_than(getattr(model.config, "max_position_embeddings", math.inf))
        refuse_crossing(model, [len(prompt.prompt_ids) for prompt in data.prompts], data.max_response_tokens)
        refuse_broken_chain([self._laws_of(k) for k in range(number - 1, -1, -1)], known)
        weights = weights_hash(model)
        processes.refuse_different(weights, f"the weights at the start of iteration {number}")
        binding = {
            "iteration": number,
            "opponent_sha256": weights,
            LawStore.chained_by: known if number else None,
            **self._depends_on(),
        }
        return LawStore(self.folder / "laws", binding)

    def fill(self, store: LawStore) -> None:
        if store.is_complete:
            return
        data, number = self.run.data, self.number
        say(
            f"iteration {number}: the opponent scores {len(data.prompts)} real responses, its {self.loss.top_k} "
            "likeliest tokens at each place"
        )
        if kept := sum(shard["rows"] for shard in store.manifest["shards"]):
            say(f"continuing iteration {number} with the {kept} responses that are scored already")
        fill_laws(
            store,
            data.prompts,
            self.policy.model,
            numerics=self.policy.numerics,
            name=f"iteration_{number - 1}/policy" if number else self.policy.name,
            top_k=self.loss.top_k,
            shard_size=self.run.shard_size,
            micro_batch_tokens=data.micro_batch_tokens,
            poll=self.run.poll,
        )

    def training_set(self, store: LawStore) -> TrainingSet:
        """All real responses."""
        report = store.manifest["statistics"]
        sentence = (
            f"iteration {self.number}: {report['responses']} real responses of {report['real_mean_length']:.1f} tokens "
            f"on average to train on, {report['nll_per_token']:.3f} nats a token by the opponent"
        )
        return TrainingSet(
            store.read(), collate_laws, report, {"laws/nll_per_token": report["nll_per_token"]}, sentence
        )

    def card(self, summary: Mapping[str, Any]) -> str:
        title = f"Policy after iteration {self.number} of token-level self-play"
        return plain_card("spin", title, summary, origin_of(self.policy.name, self.run.data))

    def _laws_of(self, iteration: int) -> LawStore:
        """The finished laws of an iteration."""
        return LawStore(iteration_folder(self.run.folder, iteration) / "laws")

    def _depends_on(self) -> dict[str, Any]:
        data = self.run.data
        return {
            "prompts_sha256": data.prompts_hash,
            "encoding_sha256": data.encoder.fingerprint,
            "top_k": self.loss.top_k,
            "shard_size": self.run.shard_size,
            "dtype": str(self.policy.dtype),
        }


def say_unused(data: SyntheticDataModule, loss: str) -> None:
    """Say which settings of the data are there and do nothing, as nothing is generated."""
    plain = ContinuousGenerator(max_new_tokens=data.generator.max_new_tokens)
    is_set = {
        "data.generator": data.generator.sampling != plain.sampling,
        "data.answers_per_prompt": data.answers_per_prompt != 1,
        "data.history": data.history != 1,
    }
    if unused := [name for name, given in is_set.items() if given]:
        are = "is" if len(unused) == 1 else "are"
        say(
            f"note: {loss} generates nothing, so {', '.join(unused)} {are} not used; of the generator its "
            "max_new_tokens alone, which caps the real responses."
        )
