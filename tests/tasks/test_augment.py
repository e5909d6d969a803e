"""Augmentation of whole batches: each image by its own draw, nothing invented, alike in pieces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clkit import api, build, resolve
from clkit.errors import CapabilityError
from clkit.tasks.augment import BRIGHTNESS, augment
from clkit.trainer import SequentialTrainer


def images(count=64, side=32):
    return torch.randint(1, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_every_image_is_a_crop_of_itself_and_half_are_mirrored():
    x = images()
    y = augment(x, "crop-flip", torch.Generator().manual_seed(1))
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    padded, seen = F.pad(x, (4, 4, 4, 4)), []
    for i in range(len(x)):
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal((y[i].flip(2) if flip else y[i]), padded[i, :, top : top + 32, left : left + 32])
        ]
        assert len(found) == 1
        seen += found
    tops, lefts, flips = map(list, zip(*seen, strict=True))
    assert {0, 8} <= set(tops) and {0, 8} <= set(lefts) and 16 < sum(flips) < 48


def test_brightness_scales_every_pixel_of_an_image_by_one_factor():
    x = torch.full((200, 3, 8, 8), 128, dtype=torch.uint8)
    y = augment(x, "crop-flip-brightness", torch.Generator().manual_seed(2))
    factors = [set(image.flatten().tolist()) - {0} for image in y]  # zeros come from the border
    assert all(len(values) == 1 for values in factors)
    levels = sorted(v for values in factors for v in values)
    assert levels[0] >= int(128 * (1 - BRIGHTNESS)) and levels[-1] <= 128 * (1 + BRIGHTNESS)
    assert levels[0] < 100 and levels[-1] > 155
    bright = augment(torch.full((50, 1, 8, 8), 250, dtype=torch.uint8), "crop-flip-brightness", torch.Generator())
    assert int(bright.max()) == 255, "what would overflow is cut off"


def test_a_batch_in_pieces_is_changed_alike():
    x, one, many = images(), torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    whole = augment(x, "crop-flip-brightness", one)
    parts = [augment(part, "crop-flip-brightness", many) for part in x.split(7)]
    assert torch.equal(whole, torch.cat(parts)) and torch.equal(one.get_state(), many.get_state())


@pytest.mark.parametrize(
    ("inputs", "kind"), [(torch.zeros(2, 5), "crop-flip"), (torch.zeros(2, 1, 8, 8), "crop-flip-brightness")]
)
def test_what_can_not_be_augmented_is_refused(inputs, kind):
    with pytest.raises(CapabilityError, match="train.augment"):
        augment(inputs, kind, torch.Generator())


def test_features_in_the_place_of_images_are_refused(vision_content):
    vision_content["model"]["freeze_backbone"] = True
    vision_content["train"]["augment"] = "crop-flip"
    config = resolve.validate(vision_content)
    tasks = build.make_tasks(config)
    model = build.make_model(config.model, tasks, 0, lambda text: None)
    with pytest.raises(CapabilityError, match=r"train.augment: 'crop-flip' needs images, and .* have features"):
        SequentialTrainer(model, "naive", config).fit(tasks)


def test_a_run_refuses_vectors_before_it_loads_anything(vision_content):
    content = {**vision_content, "tasks": {"source": "digits"}, "train": {"augment": "crop-flip"}}
    with pytest.raises(CapabilityError, match=r"train.augment: 'crop-flip' needs images, .* shape \(64,\)"):
        api.run(resolve.validate({**content, "model": {"name": "mlp"}}))
