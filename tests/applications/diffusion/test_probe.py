import torch

from unimoe.applications.diffusion.probe import LinearProbe


def test_classes_that_colours_tell_are_recognised():
    label_N = torch.arange(60) % 3
    images = torch.randn(60, 3, 4, 4) * 0.1
    images[torch.arange(60), label_N] += 1

    def colours(some):
        return some.mean(dim=(2, 3))

    probe = LinearProbe(colours, images[:30].repeat(99, 1, 1, 1), label_N[:30].repeat(99))
    assert probe.accuracy(images[30:], label_N[30:]) == 1
    assert probe.accuracy(images[30:], (label_N[30:] + 1) % 3) == 0
