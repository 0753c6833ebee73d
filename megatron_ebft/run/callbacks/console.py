"""Steps on the console and in TensorBoard, and a word about each checkpoint."""

from megatron_ebft.run.callbacks.callback import Callback


class Console(Callback):
    """Logs the steps that --log-interval shows."""

    def step_end(self, run, log, step):
        if step.is_logged:
            log.step(step.iteration, step.metrics, step.seconds, step.duration, {
                "restarts": run.state.restarts, "lost_to_restarts": run.state.lost_to_restarts,
                "lost_to_saves": run.state.lost_to_saves, "lost_to_evaluation": run.state.lost_to_evaluation})

    def saved(self, run, log, folder):
        log.print(f"saved {folder}")
