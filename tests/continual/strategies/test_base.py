"""The contract: which hooks a run calls, in which order."""

from unimoe.commands.main import main
from unimoe.continual.strategies import Strategy, strategies

HOOKS = (
    *("model_adaptation", "before_training_exp", "replay_samples", "before_training_iteration", "loss"),
    *("penalty", "after_training_exp", "before_eval", "after_eval"),
)


def test_the_order_of_the_hooks(config, command, monkeypatch):
    calls = []

    class Watched(Strategy):
        """Without a name, so that no other test finds it."""

    def watch(hook):
        plain = getattr(Strategy, hook)
        return lambda self, *args: calls.append(hook) or plain(self, *args)

    for hook in HOOKS:
        setattr(Watched, hook, watch(hook))
    monkeypatch.setattr("unimoe.continual.cli.strategies", lambda: {**strategies(), "watched": Watched})
    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    for task in config["stream"]["tasks"]:
        task["steps"] = 2
    assert main(command(config, "run", "--strategy", "watched", "--eval_batch_size", "4")) == 0
    trained = [*HOOKS[:6], *HOOKS[3:6], HOOKS[6]]
    assert calls == [*trained, *HOOKS[7:], *trained, *HOOKS[7:], *HOOKS[7:]]
