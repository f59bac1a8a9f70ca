import lightning as L


class CountUpdates(L.Callback):
    """Prints, at each iteration's end, how many updates there were so far."""

    def __init__(self) -> None:
        self.updates = 0

    def on_train_batch_end(self, trainer, *args) -> None:
        self.updates = trainer.global_step

    def on_iteration_end(self, trainer, pl_module, iteration, summary) -> None:
        print(f"iteration {iteration}: {self.updates} updates so far")

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state_dict) -> None:
        self.updates = state_dict["updates"]
