from dataclasses import replace

import torch

from spin_lightning import ResponseGenerator
from spin_lightning.generation.base import as_set
from spin_lightning.types import Response


class NoRepeat(ResponseGenerator):
    """Samples one token after another, never the same one twice in a row."""

    @property
    def sampling(self):
        return {**super().sampling, "generator": "no repeat"}

    def generate(self, prompts, seeds, terminator_ids, pad_id):
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            yield number, self._respond(prompt, seed, as_set(terminator_ids))

    def _respond(self, prompt, seed, ends):
        model, random = self.opponent.model, torch.Generator().manual_seed(seed % 2**32)
        ids, log_probs = [], []
        while len(ids) < self.max_new_tokens and not (ids and ids[-1] in ends):
            logits = model(torch.tensor([prompt + ids], device=model.device)).logits[0, -1].float().cpu()
            laws = logits.log_softmax(-1)
            open_laws = laws.clone()
            open_laws[(prompt + ids)[-1]] = -torch.inf
            ids.append(int(torch.multinomial(open_laws.softmax(-1), 1, generator=random)))
            log_probs.append(float(laws[ids[-1]]))
        response = Response(ids, "stop" if ids[-1] in ends else "length", sum(log_probs))
        return replace(response, log_probs=log_probs)
