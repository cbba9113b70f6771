import torch

from unimoe.detection import Prompt, PromptBatch, Target
from unimoe.detection.data.batches import EvalBatch, TrainBatch


def test_a_training_batch_moves_with_all_its_tensors(tokenizer):
    """A tensor that stays behind would be found on a GPU only; the meta device finds it here."""
    prompts = [Prompt.from_names(["cat", "dog"], tokenizer)]
    targets = [Target(torch.rand(2, 4), torch.tensor([0, 1]))]
    mask, maps = torch.ones(1, 8, 8), [torch.rand(1, 3, 4, 4), torch.rand(1, 5, 2, 2)]
    batch = TrainBatch(mask, prompts, PromptBatch.stack(prompts), targets, torch.rand(1, 3, 8, 8), maps)
    moved = batch.to("meta", non_blocking=True)  # as Lightning calls it
    tensors = [moved.pixel_mask, moved.pixel_values, *moved.image_features, *moved.prompt_batch.name_tokens]
    tensors += [*moved.prompt_batch.inputs().values(), moved.targets[0].boxes_M4, moved.targets[0].names_M]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and len(tensors) == 11
    assert moved.prompts == prompts, "their names are text"
    assert batch.pixel_mask is mask and batch.targets is targets, "the batch itself stays"


def test_what_a_batch_does_not_have_is_not_moved():
    maps = [torch.rand(2, 3, 4, 4)]
    moved = EvalBatch([4, 7], [(8, 8), (6, 8)], None, image_features=maps).to("meta")
    assert moved.pixel_mask is None and moved.pixel_values is None
    assert moved.image_features[0].is_meta and moved.rows == [4, 7] and moved.sizes == [(8, 8), (6, 8)]
