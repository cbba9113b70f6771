import pytest
import torch
import torch.nn.functional as F

from unimoe.continual.strategies.lwf import LwF
from unimoe.model.host_loss import answer_logits


def test_the_distance_to_the_teacher_is_added(attach, tasks):
    strategy = attach(LwF(alpha=0.5, temperature=2.0))
    learner = strategy.learner
    batch = learner.collate(tasks[0].samples)
    plain = strategy.loss(batch, 0, 1).item()
    strategy.after_training_exp(tasks[0])
    assert strategy.loss(batch, 0, 1).item() == pytest.approx(plain, rel=1e-6)  # the student is the teacher
    (part,) = batch
    old_SV = answer_logits(learner.model, part)[0].detach()
    with torch.no_grad():
        for p in learner.adapters().values():
            p += 0.1 * torch.randn_like(p)
    after = {name: p.clone() for name, p in learner.adapters().items()}
    new_SV, labels_S = answer_logits(learner.model, part)
    old, new = (scores.double() / 2 for scores in (old_SV, new_SV))
    distance = (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1).mean()
    expected = F.cross_entropy(new_SV.double(), labels_S) + 0.5 * 4 * distance
    loss = strategy.loss(batch, 0, 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and distance > 1e-4
    assert all(torch.equal(p, after[name]) for name, p in learner.adapters().items())  # the student is back
    loss.backward()
    assert all(p.grad is not None for p in learner.trainable().values())
