import numpy as np
import pytest
import torch

from speccert.experiments.augment import augment


def images(count=64, channels=2, height=5, width=6):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0)) + 0.1


def moves(image, flip):
    """Every shift by up to 2 pixels of one image, and of its mirror image, with zeros around."""
    variants = [image, image[:, :, ::-1]] if flip else [image]
    for variant in variants:
        padded = np.pad(variant, ((0, 0), (2, 2), (2, 2)))
        for row in range(5):
            for column in range(5):
                yield padded[:, row : row + image.shape[1], column : column + image.shape[2]]


@pytest.mark.parametrize("name", ["shift", "shift-flip"])
def test_every_image_is_one_of_its_moves_and_all_moves_occur(name):
    x = images(count=1).repeat(2000, 1, 1, 1)
    moved = augment(x, name, torch.Generator().manual_seed(0)).numpy()
    allowed = [move.tobytes() for move in map(np.ascontiguousarray, moves(x[0].numpy(), name == "shift-flip"))]
    assert len(set(allowed)) == (50 if name == "shift-flip" else 25)
    assert {image.tobytes() for image in moved} == set(allowed)


def test_images_move_apart_and_the_input_stays():
    x = images()
    before = x.clone()
    moved = augment(x, "shift-flip", torch.Generator().manual_seed(0))
    assert torch.equal(x, before)
    assert moved.is_contiguous()
    for image, original in zip(moved.numpy(), x.numpy(), strict=True):
        assert any(np.array_equal(image, move) for move in moves(original, True))


def test_the_generator_sets_the_result_and_the_global_one_is_left_alone():
    before = torch.random.get_rng_state()
    results = [augment(images(), "shift-flip", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_none_changes_nothing_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert augment(x := torch.rand(3, 7), "none", generator) is x
    assert torch.equal(generator.get_state(), state)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown augmentation 'crop'; allowed: none, shift, shift-flip"):
        augment(images(), "crop", torch.Generator())
    with pytest.raises(
        ValueError, match=r"the augmentation shift needs images N x C x H x W, got inputs of shape \(3, 7\)"
    ):
        augment(torch.zeros(3, 7), "shift", torch.Generator())
