import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import BertConfig, TimmBackboneConfig

from unimoe.detection import DynamicDinoConfig


def test_the_defaults_are_those_of_the_edge_detector():
    config = DynamicDinoConfig()
    assert isinstance(config.backbone_config, TimmBackboneConfig)
    assert config.backbone_config.backbone == "efficientvit_l1"
    assert config.backbone_config.out_indices == [1, 2, 3], "strides 8, 16 and 32"
    assert isinstance(config.text_config, BertConfig)
    assert config.image_mean == [0.485, 0.456, 0.406] and config.image_std == [0.229, 0.224, 0.225]


def test_a_saved_configuration_is_read_back(tmp_path):
    text = BertConfig(hidden_size=16)
    config = DynamicDinoConfig(
        text_config=text, image_size=[400, 600], image_mean=[0.5] * 3, moe={"num_experts": 4, "top_k": 2}
    )
    config.save_pretrained(tmp_path)
    again = DynamicDinoConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.text_config, BertConfig) and again.text_config.hidden_size == 16
    assert again.backbone_config.backbone == "efficientvit_l1"


@pytest.mark.parametrize(
    ("width", "heads"),
    [(48, 8), (64, 5), (96, 9), (96, 3)],  # no multiple of 32, not of the heads (twice), odd heads
)
def test_a_width_that_no_part_can_be_built_with_is_refused(width, heads):
    message = f"d_model is {width} with {heads} heads, expected a multiple of 32 and of the heads"
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DynamicDinoConfig(d_model=width, num_heads=heads)


def test_values_of_another_type_are_refused():
    with pytest.raises(StrictDataclassFieldValidationError, match="expected one of .*'edge', 'full'"):
        DynamicDinoConfig(enhancer="fast")
    with pytest.raises(StrictDataclassFieldValidationError, match="num_queries"):
        DynamicDinoConfig(num_queries="many")
