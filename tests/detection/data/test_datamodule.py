import pytest

from unimoe.detection.data.datamodule import DetectionData
from unimoe.errors import UserError


def test_each_split_may_have_a_folder_of_pictures(world, tmp_path):
    copy = tmp_path / "val.json"
    copy.write_text((world / "val.json").read_text())
    data = DetectionData(str(world / "train.json"), str(copy), images={"val": str(world)})
    data.setup("fit")
    assert data.sets["val"].samples[0].path == data.sets["train"].samples[0].path == world / "0.png"
    with pytest.raises(UserError, match="data.images has 'vall', expected train, val and test"):
        DetectionData("x.json", images={"vall": "y"})
