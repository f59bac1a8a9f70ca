from spin_lightning import Reward


class ShortAndRight(Reward):
    """1 for a response that has the real one in it, less a share for each character beyond ``length``.

    Args:
        length: Characters that cost nothing.
        share: What each one beyond costs.
    """

    needs_real = True

    def __init__(self, length: int = 20, share: float = 0.01) -> None:
        self.length, self.share = length, share

    def score(self, answers):
        return [
            None
            if answer.real is None
            else float(answer.real in answer.text) - self.share * max(0, len(answer.text) - self.length)
            for answer in answers
        ]
