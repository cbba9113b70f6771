import torch
from torch.testing import assert_close

from unimoe.detection import Target
from unimoe.detection.model.denoising import DenoisingConfig, make_denoising

TARGETS = [
    Target(torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.7, 0.1, 0.1]]), torch.tensor([0, 2])),
    Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    Target(torch.tensor([[0.9, 0.9, 0.2, 0.2]]), torch.tensor([1])),
]
NAMES = [
    torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).bool(),
    torch.tensor([[0, 1, 0, 0, 0]]).bool(),
    torch.tensor([[0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).bool(),
]


def made(**settings):
    return make_denoising(TARGETS, NAMES, DenoisingConfig(queries=80, **settings))


def test_groups_hold_every_object_twice():
    queries = made()
    assert queries.boxes_BD4.shape == (3, 80, 4) and queries.group_D.unique().numel() == 20
    assert queries.labels.object_BD[0].view(20, 4).tolist() == [[0, 1, 0, 1]] * 20
    assert queries.labels.object_BD[1].unique().tolist() == [-1]
    assert queries.labels.object_BD[2].view(20, 4).tolist() == [[0, -1, 0, -1]] * 20
    assert queries.labels.positive_BD[0].view(20, 4).tolist() == [[True, True, False, False]] * 20


def test_positives_are_near_and_negatives_are_not():
    queries = made(box_noise=0.5)
    true_4 = TARGETS[0].boxes_M4[0]
    boxes_D4 = queries.boxes_BD4[0]
    corners = torch.cat([boxes_D4[:, :2] - boxes_D4[:, 2:] / 2, boxes_D4[:, :2] + boxes_D4[:, 2:] / 2], 1)
    true_corners = torch.cat([true_4[:2] - true_4[2:] / 2, true_4[:2] + true_4[2:] / 2])
    shift_D4 = ((corners - true_corners) / (true_4[2:].repeat(2) / 2)).abs()
    mine, positive = queries.labels.object_BD[0] == 0, queries.labels.positive_BD[0]
    assert shift_D4[mine & positive].max() <= 0.5
    assert shift_D4[mine & ~positive].min() >= 0.5 - 1e-5 and shift_D4[mine & ~positive].max() <= 1
    assert (queries.boxes_BD4 >= 0).all() and (queries.boxes_BD4 <= 1).all()


def test_a_quarter_of_the_names_is_drawn_anew():
    """Half of ``label_noise``, less the draws that hit the right name among three."""
    queries = make_denoising(TARGETS[:1], NAMES[:1], DenoisingConfig(queries=8000))
    right = (NAMES[0].float() / NAMES[0].sum(1, keepdim=True))[TARGETS[0].names_M]
    wrong = (queries.tokens_BDL[0].view(-1, 2, 5) != right).any(-1).float().mean()
    assert_close(wrong, torch.tensor(0.25 * 2 / 3), atol=0.02, rtol=0)
    assert_close(queries.tokens_BDL.sum(-1), torch.ones(1, 8000))


def test_nobody_sees_what_would_give_the_answer_away():
    queries = made()
    visible = queries.visible(queries=5)[:, 0]
    assert visible.shape == (3, 85, 85)
    assert not visible[:, 80:, :80].any(), "the other queries see none of them"
    assert visible[:, :, 80:].all()
    other_group = queries.group_D[:, None] != queries.group_D
    assert not visible[:, :80, :80][:, other_group].any()
    assert not visible[2, :80, :80][:, queries.labels.object_BD[2] < 0].any(), "nobody sees padding"


def test_without_objects_there_is_nothing_to_denoise():
    assert make_denoising(TARGETS[1:2], NAMES[1:2], DenoisingConfig()) is None
    assert make_denoising(TARGETS, NAMES, DenoisingConfig(queries=0)) is None
