from unimoe.continual.strategies.lora import Joint, SequentialLoRA


def test_all_tasks_train_one_bank(attach):
    strategy = attach(SequentialLoRA(), banks=3)
    assert {len(layer.banks) for layer in strategy.learner.layers.values()} == {1}
    assert all(layer.router is None for layer in strategy.learner.layers.values())
    assert set(strategy.learner.trainable()) == set(strategy.learner.adapters())


def test_joint_is_a_bound():
    assert Joint.joint and not SequentialLoRA.joint
