"""A detector in Python."""

from PIL import Image
from torch.testing import assert_close

from unimoe.detection.inference.predictor import Detector


def test_images_do_not_depend_on_one_another(folder):
    detector = Detector.load(folder, ["cat", "tree"])
    pictures = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (90, 30), "blue")]
    together = detector(pictures, threshold=0.0)
    for picture, one in zip(pictures, together, strict=True):
        (alone,) = detector([picture], threshold=0.0)
        assert_close(alone.scores_K, one.scores_K)
        assert_close(alone.boxes_K4, one.boxes_K4)
